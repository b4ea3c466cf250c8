"""Summarise an epoch by group: as JSON, as a table for the log and in the model card.

Cost: one count over the epoch's micro-batches.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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

Group = TypeVar("Group")
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+.!|~$&-])")
_COUNTS = ("samples", "steps", "left_out", "repeated", "dropped")


def epoch_summary(plan: EpochPlan, names: Sequence[str], dropped: DroppedRows = NONE_DROPPED) -> dict[str, Any]:
    """Return the counts of an epoch as JSON values.

    Args:
        plan: of the epoch.
        names: group names, by id.
        dropped: rows that training cannot use.

    Returns:
        `samples`, `steps`, `pure_steps`, `mixed_samples`, `baseline_steps`, `left_out` and `repeated`, as in
        `PlanSummary`, and `dropped` (`rows`, `by_reason`, `by_group`). `groups` has the same counts for each group with
        samples or dropped rows; `dropped` is a number there, and `steps` a fraction where a step holds micro-batches of
        several groups. Mixed micro-batches count for no group.
    """
    summary = plan.summary()
    groups_of = plan.micro_batch_groups
    micro_batches = np.bincount(groups_of[groups_of >= 0], minlength=len(names))
    steps = (micro_batches / (plan.world_size * plan.accumulation_steps)).round(3)
    dropped_of = dropped.by_group
    groups = [
        {
            "name": names[group],
            "samples": int(summary.group_samples[group]),
            "steps": float(steps[group]),
            "left_out": int(summary.group_left_out[group]),
            "repeated": int(summary.group_repeated[group]),
            "dropped": dropped_of.pop(names[group], 0),
        }
        for group in np.flatnonzero(summary.group_samples).tolist()
    ]
    nothing = {"samples": 0, "steps": 0.0, "left_out": 0, "repeated": 0}
    groups += [{"name": name, **nothing, "dropped": count} for name, count in dropped_of.items()]
    return {
        "samples": summary.num_samples,
        "steps": summary.num_steps,
        "pure_steps": summary.pure_steps,
        "mixed_samples": summary.mixed_samples,
        "baseline_steps": summary.baseline_steps,
        "left_out": summary.left_out,
        "repeated": summary.repeated,
        "dropped": dropped.to_json(),
        "groups": groups,
    }


def largest(groups: Sequence[Group], most: int, size: Callable[[Group], Any]) -> list[Group]:
    """Return the `most` largest groups, in the order of `groups`."""
    by_size = sorted(range(len(groups)), key=lambda number: size(groups[number]), reverse=True)
    return [groups[number] for number in sorted(by_size[:most])]


def _cells(groups: Sequence[Mapping[str, Any]], counts: Sequence[str]) -> list[list[str]]:
    """Return the cells of the largest groups and of the sum of all others."""
    kept = largest(groups, MOST_GROUPS, lambda group: (group["samples"], group["dropped"]))
    others = [group for group in groups if group not in kept]
    lines = [{**group, "name": cut(sanitize(group["name"]), NAME_CHARACTERS)} for group in kept]
    if others:
        sums = {count: sum(group[count] for group in others) for count in counts}
        lines.append({"name": f"{len(others)} smaller groups", **sums})
    return [[line["name"], *(f"{line[count]:,g}" for count in counts)] for line in lines]


def summary_table(summary: Mapping[str, Any]) -> str:
    """Format an epoch summary as lines for a log."""
    cells = [["group", *(count.replace("_", " ") for count in _COUNTS)], *_cells(summary["groups"], _COUNTS)]
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, numbers, widths)]) for name, *numbers in cells)


def model_card_section(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the model card's section in Markdown.

    Args:
        summary: an epoch summary.
        settings: option -> value.
    """
    options = ", ".join(f"`{name}={_markdown(str(value))}`" for name, value in settings.items())
    table = [["group", "samples", "steps per epoch", "rows dropped"], ["---", "---:", "---:", "---:"]]
    for name, *cells in _cells(summary["groups"], ("samples", "steps", "dropped")):
        table.append([_markdown(name), *cells])
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in summary["dropped"]["by_reason"].items())
    return (
        "## CommonIT\n\n"
        "Trained with [CommonIT](https://arxiv.org/abs/2410.03077): optimizer steps hold samples of one group of the "
        f"data. {options}.\n\n{rows}\n\n"
        f"{summary['steps']:,} steps per epoch (baseline batches: {summary['baseline_steps']:,}), "
        f"{summary['pure_steps']:,} of them of one group, "
        f"{summary['samples']:,} samples, {summary['left_out']:,} left out, {summary['repeated']:,} repeated. Rows "
        f"dropped before training: {summary['dropped']['rows']:,}"
        f"{_markdown(f' ({sanitize(reasons)})') if reasons else ''}.\n\n```bibtex\n{CITATION}\n```\n"
    )


def _markdown(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
