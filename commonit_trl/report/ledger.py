"""Summarise an epoch by group: as JSON, as a table for the log and in the model card.

Cost: one count over the epoch's micro-batches.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.plan import EpochPlan
from commonit_trl.sanitize import cut, sanitize

MOST_GROUPS = 20  # per table
NAME_CHARACTERS = 40
CITATION = """@inproceedings{rao-etal-2024-commonit,
    title = "{C}ommon{IT}: Commonality-Aware Instruction Tuning for Large Language Models via Data Partitions",
    author = "Rao, Jun and Liu, Xuebo and Lian, Lian and Cheng, Shengjun and Liao, Yunjie and Zhang, Min",
    booktitle = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
    year = "2024",
    url = "https://aclanthology.org/2024.emnlp-main.561/",
}"""

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+.!|~$&-])")


def ledger(plan: EpochPlan, names: Sequence[str], dropped: DroppedRows = NONE_DROPPED) -> dict[str, Any]:
    """Return the epoch summary of `plan` as JSON values.

    Args:
        names: group names, by id.
        dropped: rows that training cannot use.

    Returns:
        Counts of the epoch: `samples`, `steps`, `vanilla_steps` (of the baseline), `lost` (samples that remainder or
        weights leave out), `repeated` and `dropped` (`rows`, `by_reason`, `by_group`). `groups` has the same counts for
        each group with samples or dropped rows; `dropped` is a number there, and `steps` a fraction where a step holds
        several groups.
    """
    summary = plan.summary()
    micro_batches = np.bincount(plan.micro_batch_groups.ravel(), minlength=len(names))
    steps = (micro_batches / (plan.world_size * plan.accumulation_steps)).round(3)
    dropped_of = dropped.by_group
    groups = [
        {
            "name": names[group],
            "samples": int(summary.group_samples[group]),
            "steps": float(steps[group]),
            "lost": int(summary.group_left_out[group]),
            "repeated": int(summary.group_repeated[group]),
            "dropped": dropped_of.pop(names[group], 0),
        }
        for group in np.flatnonzero(summary.group_samples).tolist()
    ]
    nothing = {"samples": 0, "steps": 0.0, "lost": 0, "repeated": 0}
    groups += [{"name": name, **nothing, "dropped": count} for name, count in dropped_of.items()]
    return {
        "samples": summary.num_samples,
        "steps": summary.num_steps,
        "vanilla_steps": summary.baseline_steps,
        "lost": summary.left_out,
        "repeated": summary.repeated,
        "dropped": dropped.to_json(),
        "groups": groups,
    }


_NUMBERS = {"samples": "samples", "steps": "steps", "lost": "left out", "repeated": "repeated", "dropped": "dropped"}


def _lines(groups: Sequence[Mapping[str, Any]], numbers: Sequence[str] = tuple(_NUMBERS)) -> list[list[str]]:
    """Return the cells of the largest groups and of the sum of all others."""
    kept = sorted(range(len(groups)), key=lambda number: (-groups[number]["samples"], -groups[number]["dropped"]))
    largest = set(kept[:MOST_GROUPS])
    lines = [
        [cut(sanitize(group["name"]), NAME_CHARACTERS), *(f"{group[name]:,g}" for name in numbers)]
        for number, group in enumerate(groups)
        if number in largest
    ]
    others = [group for number, group in enumerate(groups) if number not in largest]
    if others:
        sums = [sum(group[name] for group in others) for name in numbers]
        lines.append([f"{len(others)} smaller groups", *(f"{value:,g}" for value in sums)])
    return lines


def ledger_table(entry: Mapping[str, Any]) -> str:
    """Format `entry`, an epoch summary of `ledger`, as lines for a log."""
    cells = [["group", *_NUMBERS.values()], *_lines(entry["groups"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        )
        for name, *numbers in cells
    )


def model_card_section(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the model card's section in Markdown.

    Args:
        entry: an epoch summary of `ledger`.
        settings: option -> value.
    """
    options = ", ".join(f"`{name}={_markdown(str(value))}`" for name, value in settings.items())
    table = [["group", "samples", "steps per epoch", "rows dropped"], ["---", "---:", "---:", "---:"]]
    numbers = _lines(entry["groups"], ("samples", "steps", "dropped"))
    table += [[_markdown(name), *cells] for name, *cells in numbers]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return (
        "## CommonIT\n\n"
        "Trained with [CommonIT](https://arxiv.org/abs/2410.03077): every optimizer step holds samples of one group of "
        f"the data. {options}.\n\n{rows}\n\n"
        f"{entry['steps']:,} steps per epoch (baseline batches: {entry['vanilla_steps']:,}), {entry['samples']:,} "
        f"samples, {entry['lost']:,} left out, {entry['repeated']:,} repeated. Rows dropped before training: "
        f"{_markdown(_dropped(entry['dropped']))}.\n\n```bibtex\n{CITATION}\n```\n"
    )


def _dropped(dropped: Mapping[str, Any]) -> str:
    """Return the number of dropped rows, and the reasons in brackets."""
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in dropped["by_reason"].items())
    return f"{dropped['rows']:,}" + (f" ({sanitize(reasons)})" if reasons else "")


def _markdown(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
