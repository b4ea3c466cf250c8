"""Print the numbers of a report as tables, cut to the width of the terminal.

Text of the data is sanitized and printed as `rich.text.Text`, which does not interpret markup.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from commonit_trl.grouping import Grouper
from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.report.analysis import BatchNumbers, Example, GroupNumbers, Inspection, Spread
from commonit_trl.sanitize import cut, sanitize

MOST_GROUPS = 30  # per table
NAME_CHARACTERS = 120


def overview(inspections: Sequence[Inspection]) -> list[tuple[str, list[str]]]:
    """Return lines that compare the metrics: a label and one cell per inspection."""
    share, ratio = "{:.1%}".format, "{:.2f}".format
    lines: list[tuple[str, Callable[[Inspection], str]]] = [
        ("Groups that have rows", lambda one: f"{len(one.groups):,} of {one.possible_groups:,}"),
        ("Steps per epoch (random batches)", lambda one: f"{one.planned.steps:,} ({one.random.steps:,})"),
        ("Steps of one group (random)", lambda one: _beside(one, share, "pure_steps")),
        ("Micro-steps of one group (random)", lambda one: _beside(one, share, "pure_micro_steps")),
        ("Micro-batches of one group (random)", lambda one: _beside(one, share, "pure_micro_batches")),
        ("Padding ratio (random; by length)", lambda one: _beside(one, ratio, "padding_ratio")),
        ("Straggler ratio (random; by length)", lambda one: _beside(one, ratio, "straggler_ratio")),
        ("Longest run of one group, steps", lambda one: f"{one.longest_run:,}"),
        ("Rows dropped", lambda one: f"{one.dropped.rows:,}"),
        ("Samples left out; repeats", lambda one: f"{one.lost:,}; {one.repeated:,}"),
    ]
    return [(label, [cell(one) for one in inspections]) for label, cell in lines]


def _beside(one: Inspection, text: Callable[[float], str], name: str) -> str:
    """Return a measure of the planned batches, and in brackets of the baselines: random and, for ratios, by length."""
    others: list[BatchNumbers | None] = [one.random, one.by_length] if name.endswith("ratio") else [one.random]
    planned = getattr(one.planned, name)
    if planned is None:
        return "-"
    return f"{text(planned)} ({'; '.join(text(getattr(other, name)) for other in others if other is not None)})"


GROUP_HEADINGS = (
    "Group",
    "Rows",
    "Share",
    "Prompt\ntokens",
    "Response\ntokens",
    "Steps",
    "Drop-\nped",
    "Left\nout",
    "Re-\npeated",
)


def group_cells(group: GroupNumbers) -> tuple[str, ...]:
    """Return the cells of one group below `GROUP_HEADINGS`."""
    return (
        cut(sanitize(group.name), NAME_CHARACTERS),
        f"{group.rows:,}",
        f"{group.share:.1%}",
        _median_and_p95(group.prompt_tokens),
        _median_and_p95(group.response_tokens),
        f"{group.steps:,.0f}" if group.steps.is_integer() else f"{group.steps:,.1f}",
        f"{group.dropped:,}",
        f"{group.lost:,}",
        f"{group.repeated:,}",
    )


def dropped_cells(inspection: Inspection, most: int) -> list[tuple[str, ...]]:
    """Return the cells of at most `most` groups of which every row was dropped."""
    present = {group.name for group in inspection.groups}
    counts = [(name, count) for name, count in inspection.dropped.by_group.items() if name not in present]
    counts.sort(key=lambda item: -item[1])
    return [
        (cut(sanitize(name), NAME_CHARACTERS), "0", "0.0%", "-", "-", "0", f"{count:,}", "0", "0")
        for name, count in counts[:most]
    ]


def _median_and_p95(tokens: Spread | None) -> str:
    return "-" if tokens is None else f"{tokens.median:,.0f} / {tokens.p95:,.0f}"


def largest(groups: Sequence[GroupNumbers], most: int) -> list[GroupNumbers]:
    """Return the `most` largest groups, in the order of `groups`."""
    kept = {group.id for group in sorted(groups, key=lambda group: -group.rows)[:most]}
    return [group for group in groups if group.id in kept]


def geometry(inspection: Inspection) -> str:
    """Describe rows and steps in one line."""
    one = inspection
    return (
        f"{one.rows:,} rows; a step is {one.accumulation_steps} × {one.world_size} micro-batches of "
        f"{one.micro_batch_size} samples (accumulation × ranks); purity {one.purity!r}, remainder {one.remainder!r}"
    )


def print_inspections(inspections: Sequence[Inspection], console: Console | None = None) -> None:
    """Print a comparison of the metrics, then the groups of each."""
    console = console or Console(highlight=False)
    table = Table(title="An epoch by each metric", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for inspection in inspections:
        table.add_column(inspection.metric, justify="right")
    for label, cells in overview(inspections):
        table.add_row(label, *cells)
    console.print(Text(geometry(inspections[0])), table, sep="\n\n")
    for inspection in inspections:
        _print_groups(inspection, console)


def _print_groups(inspection: Inspection, console: Console) -> None:
    kept = largest(inspection.groups, MOST_GROUPS)
    title = f"Groups by {inspection.metric} (tokens: median / 95th percentile)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = [*map(group_cells, kept), *dropped_cells(inspection, MOST_GROUPS)]
    widths = [max(map(len, (*heading.split("\n"), *cells))) for heading, cells in zip(GROUP_HEADINGS, zip(*rows))]
    # Narrow terminals cut names, not numbers. Each column adds two characters, and so does the table.
    available = console.width - 2 - sum(width + 2 for width in widths[1:]) - 2
    table.add_column(GROUP_HEADINGS[0], overflow="ellipsis", no_wrap=True, max_width=max(available, 8))
    for heading, width in zip(GROUP_HEADINGS[1:], widths[1:]):
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(kept) < len(inspection.groups):
        others = len(inspection.groups) - len(kept)
        console.print(Text(f"and {others:,} smaller groups, which --json and --html list too.\n"))
    if any(group.examples for group in kept):
        console.print(Text(f"Examples of each group, by {inspection.metric}", style="bold"))
        for group in kept:
            _line(console, Text(sanitize(group.name)))
            for example in group.examples:
                _line(console, _one_line(example, console.width))
        console.print()
    for warning in inspection.warnings:
        console.print(Text.assemble((f"{inspection.metric}: ", "yellow"), sanitize(warning)))


def _one_line(example: Example, width: int) -> Text:
    """Return prompt and response on one line; if both are long, each gets half the width."""
    prompt, response = Text(sanitize(example.prompt)), Text(sanitize(example.response))
    for_prompt = width - 5 - min(response.cell_len, (width - 5) // 2)
    prompt.truncate(for_prompt if response else width - 2, overflow="ellipsis")
    return Text.assemble("  ", prompt, *((" → ", response) if response else ()))


def _line(console: Console, text: Text) -> None:
    console.print(text, no_wrap=True, overflow="ellipsis", crop=True)


def print_sizes(
    grouper: Grouper,
    group_ids: NDArray[np.int64],
    dropped: DroppedRows = NONE_DROPPED,
    console: Console | None = None,
) -> None:
    """Print the number of rows per group, and of dropped rows by reason.

    Args:
        group_ids: (rows,) group ids, -1 for unassigned rows.
        dropped: rows that training cannot use.
    """
    console = console or Console(highlight=False)
    sizes = np.bincount(group_ids[group_ids >= 0], minlength=len(grouper.names))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Group", overflow="ellipsis", no_wrap=True)
    table.add_column("Rows", justify="right")
    order = np.sort(np.argsort(-sizes, kind="stable")[:MOST_GROUPS])
    for group in order:
        table.add_row(Text(sanitize(grouper.names[group])), f"{sizes[group]:,}")
    console.print(table)
    if len(sizes) > len(order):
        console.print(Text(f"and {len(sizes) - len(order):,} smaller groups."))
    if np.any(group_ids < 0):
        console.print(Text(f"{np.count_nonzero(group_ids < 0):,} rows are unassigned."))
    for reason, count in dropped.by_reason.items():
        groups = [(name, rows) for (other, name), rows in dropped.counts.items() if other == reason]
        most = ", ".join(f"{rows:,} of {name}" for name, rows in sorted(groups, key=lambda item: -item[1])[:5])
        console.print(Text(sanitize(f"{count:,} rows {reason} (most: {most}).")))
