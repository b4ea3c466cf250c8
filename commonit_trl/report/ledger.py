"""The ledger of an epoch: what each group gives to it, as JSON, as a table for the log, and in the model card.

Cost: one count over the epoch's micro-batches.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from commonit_trl.plan import EpochPlan
from commonit_trl.sanitize import cut, shown

MOST_GROUPS = 20  # in a table
NAME_CHARACTERS = 40
CITATION = """@inproceedings{rao-etal-2024-commonit,
    title = "{C}ommon{IT}: Commonality-Aware Instruction Tuning for Large Language Models via Data Partitions",
    author = "Rao, Jun and Liu, Xuebo and Lian, Lian and Cheng, Shengjun and Liao, Yunjie and Zhang, Min",
    booktitle = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
    year = "2024",
    url = "https://aclanthology.org/2024.emnlp-main.561/",
}"""

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+.!|~$&-])")


def ledger(plan: EpochPlan, names: Sequence[str]) -> dict[str, Any]:
    """What an epoch of `plan` holds, as JSON values.

    Args:
        names: of the groups, by id.

    Returns:
        `samples`, `steps`, `vanilla_steps`, `lost` and `repeated` of the epoch, and under `groups` those of each group
        that has samples; a group's `steps` are a fraction where a step holds several groups.
    """
    summary = plan.summary()
    micro_batches = np.bincount(plan.micro_batch_groups.ravel(), minlength=len(names))
    steps = (micro_batches / (plan.world_size * plan.accumulation_steps)).round(3)
    return {
        "samples": summary.num_samples,
        "steps": summary.num_steps,
        "vanilla_steps": summary.vanilla_steps,
        "lost": summary.lost,
        "repeated": summary.repeated,
        "groups": [
            {
                "name": names[group],
                "samples": int(summary.group_samples[group]),
                "steps": float(steps[group]),
                "lost": int(summary.group_lost[group]),
                "repeated": int(summary.group_repeated[group]),
            }
            for group in np.flatnonzero(summary.group_samples).tolist()
        ],
    }


def _lines(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the largest groups, and of all others together."""
    numbers = ("samples", "steps", "lost", "repeated")
    largest = sorted(groups, key=lambda group: -group["samples"])[:MOST_GROUPS]
    kept = [group for group in groups if group in largest][:MOST_GROUPS]
    lines = [[cut(shown(group["name"]), NAME_CHARACTERS), *(f"{group[name]:,g}" for name in numbers)] for group in kept]
    others = [group for group in groups if group not in kept]
    if others:
        sums = [sum(group[name] for group in others) for name in numbers]
        lines.append([f"{len(others)} smaller groups", *(f"{value:,g}" for value in sums)])
    return lines


def ledger_table(entry: Mapping[str, Any]) -> str:
    """`entry`, as `ledger` gives it, as lines for a log."""
    cells = [["group", "samples", "steps", "lost", "repeated"], *_lines(entry["groups"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        )
        for name, *numbers in cells
    )


def model_card_section(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What a model card says of a run: its settings, `entry` as `ledger` gives it, and whom to cite, in Markdown."""
    options = ", ".join(f"`{name}={_markdown(str(value))}`" for name, value in settings.items())
    table = [["group", "samples", "steps an epoch"], ["---", "---:", "---:"]]
    table += [[_markdown(name), samples, steps] for name, samples, steps, *_ in _lines(entry["groups"])]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return (
        "## CommonIT\n\n"
        "Trained with [CommonIT](https://arxiv.org/abs/2410.03077): every optimizer step holds samples of one group of "
        f"the data. {options}.\n\n{rows}\n\n"
        f"{entry['steps']:,} steps an epoch (plain batches: {entry['vanilla_steps']:,}), {entry['samples']:,} samples, "
        f"{entry['lost']:,} lost, {entry['repeated']:,} repeated.\n\n```bibtex\n{CITATION}\n```\n"
    )


def _markdown(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
