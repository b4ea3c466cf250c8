"""Print the numbers of a report as tables, cut to the width of the terminal.

Text of the data is sanitized and printed as `rich.text.Text`, which does not interpret markup.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from commonit_trl.grouping import Grouper
from commonit_trl.grouping.dropped import DroppedRows
from commonit_trl.report.analysis import GroupNumbers, Inspection
from commonit_trl.report.summary import largest
from commonit_trl.sanitize import cut, sanitize

MOST_GROUPS = 30  # per table
NAME_CHARACTERS = 120


def overview(inspections: Sequence[Inspection]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return headings and lines that compare inspections with each other and with the baselines of the first one.

    A line is a label, one cell per inspection, and one per baseline: random batches and, where the rows have token
    counts, batches by length. Cells of measures that a baseline lacks are empty.
    """
    first = inspections[0]
    baselines = {"random\nbatches": first.random, "by\nlength": first.by_length}
    baselines = {name: numbers for name, numbers in baselines.items() if numbers is not None}
    measures: list[tuple[str, str, Callable[[Any], str]]] = [
        ("Steps per epoch", "steps", "{:,}".format),
        ("Steps of one group", "pure_steps", "{:.1%}".format),
        ("Micro-steps of one group", "pure_micro_steps", "{:.1%}".format),
        ("Micro-batches of one group", "pure_micro_batches", "{:.1%}".format),
        ("Padding ratio", "padding_ratio", "{:.2f}".format),
        ("Straggler ratio", "straggler_ratio", "{:.2f}".format),
    ]
    counts: list[tuple[str, Callable[[Inspection], str]]] = [
        ("Longest run of one group, steps", lambda one: f"{one.longest_run:,}"),
        ("Samples in mixed steps", lambda one: f"{one.mixed_samples:,}"),
        ("Samples left out", lambda one: f"{one.left_out:,}"),
        ("Repeats", lambda one: f"{one.repeated:,}"),
        ("Rows dropped", lambda one: f"{one.dropped['rows']:,}"),
    ]
    empty = [""] * len(baselines)
    with_rows = [f"{sum(group.rows > 0 for group in one.groups)} of {one.possible_groups}" for one in inspections]
    lines = [("Groups with rows", *with_rows, *empty), ("Remainder", *map(_composition, inspections), *empty)]
    for label, name, text in measures:
        of_all = [*(one.planned for one in inspections), *baselines.values()]
        values = [getattr(numbers, name) for numbers in of_all]
        lines.append((label, *("-" if value is None else text(value) for value in values)))
    lines += [(label, *map(cell, inspections), *empty) for label, cell in counts]
    return ["", *(inspection.name for inspection in inspections), *baselines], lines


def _composition(one: Inspection) -> str:
    """Return remainder, purity, fraction and order, the last three where they are not the default."""
    fraction = [] if one.pure_fraction is None else [f"pure {'/'.join(f'{part:g}' for part in one.pure_fraction)}"]
    purity = ["by micro-batch"] if one.purity == "micro" else []
    return ", ".join([one.remainder, *purity, *fraction, *([one.order] if one.order != "random" else [])])


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
    prompt, response = (
        "-" if tokens is None else f"{tokens['median']:,.0f} / {tokens['p95']:,.0f}"
        for tokens in (group.prompt_tokens, group.response_tokens)
    )
    return (
        cut(sanitize(group.name), NAME_CHARACTERS),
        f"{group.rows:,}",
        f"{group.share:.1%}",
        prompt,
        response,
        f"{group.steps:,.0f}" if group.steps.is_integer() else f"{group.steps:,.1f}",
        f"{group.dropped:,}",
        f"{group.left_out:,}",
        f"{group.repeated:,}",
    )


def largest_groups(inspection: Inspection, most: int) -> list[GroupNumbers]:
    """Return the groups with most rows or, of those without, most dropped rows."""
    return largest(inspection.groups, most, lambda group: (group.rows, group.dropped))


def geometry(inspection: Inspection) -> str:
    """Describe rows and steps in one line."""
    one = inspection
    return (
        f"{one.rows:,} rows; a step is {one.accumulation_steps} × {one.world_size} micro-batches of "
        f"{one.micro_batch_size} samples (accumulation × ranks)"
    )


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, *, fold: bool = False
) -> Table:
    """Lay out sanitized cells; in narrow terminals the first column shrinks, and numbers are never cut.

    Args:
        headings: of the columns.
        rows: cells of each row.
        title: of the table.
        fold: whether the first column continues on another line, instead of being cut.
    """
    rows = list(rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(headings[0], min_width=8, overflow="fold")
    for heading, cells in zip(headings[1:], list(zip(*rows))[1:]):
        width = max(map(len, (*heading.split("\n"), *cells)))
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for name, *numbers in rows:
        first = Text(name) if fold else Text(name, no_wrap=True, overflow="ellipsis")
        table.add_row(first, *map(Text, numbers))
    return table


def print_inspections(inspections: Sequence[Inspection], console: Console) -> None:
    """Print a comparison of the metrics, then the groups of each."""
    headings, lines = overview(inspections)
    console.print(Text(geometry(inspections[0])), end="\n\n")
    headings = [*map(_heading, headings)]
    for columns in _columns_that_fit(headings, lines, console.width):
        picked = [[line[column] for column in columns] for line in [headings, *lines]]
        console.print(make_table(picked[0], picked[1:], "An epoch by each metric" if 1 in columns else None, fold=True))
    for number, inspection in enumerate(inspections):
        shown = {other.metric for other in inspections[:number]}
        _print_groups(inspection, console, examples=inspection.metric not in shown)


def _heading(name: str) -> str:
    """Break the name of a strategy at its options and their values, so that columns stay narrow."""
    return name.replace(":", "\n").replace("=", "=\n")


def _columns_that_fit(headings: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """Yield the columns of each of the tables that a wide one is cut into; each has the column of labels."""
    widths = [
        2 + max(len(part) for cell in column for part in cell.split("\n"))
        for column in zip(headings, *lines, strict=True)
    ]
    columns = [0]
    for column in range(1, len(headings)):
        if len(columns) > 1 and sum(widths[kept] for kept in [*columns, column]) > width:
            yield columns
            columns = [0]
        columns.append(column)
    yield columns


def _print_groups(inspection: Inspection, console: Console, *, examples: bool) -> None:
    kept = largest_groups(inspection, MOST_GROUPS)
    title = f"Groups by {inspection.name} (tokens: median / 95th percentile)"
    console.print(make_table(GROUP_HEADINGS, map(group_cells, kept), title))
    if others := len(inspection.groups) - len(kept):
        console.print(Text(f"and {others:,} smaller groups, which --json and --html list too.\n"))
    if examples and any(group.examples for group in kept):
        console.print(Text(f"Examples of each group, by {inspection.name}", style="bold"))
        for group in kept:
            if group.rows:
                _line(console, Text(sanitize(group.name)))
            for example in group.examples:
                _line(console, _one_line(example, console.width))
        console.print()
    for warning in inspection.warnings:
        console.print(Text.assemble((f"{inspection.name}: ", "yellow"), sanitize(warning)))


def _one_line(example: dict[str, str], width: int) -> Text:
    """Return prompt and response on one line; if both are long, each gets half the width."""
    prompt, response = Text(sanitize(example["prompt"])), Text(sanitize(example["response"]))
    for_prompt = width - 5 - min(response.cell_len, (width - 5) // 2)
    prompt.truncate(for_prompt if response else width - 2, overflow="ellipsis")
    return Text.assemble("  ", prompt, *((" → ", response) if response else ()))


def _line(console: Console, text: Text) -> None:
    console.print(text, no_wrap=True, overflow="ellipsis", crop=True)


def print_sizes(grouper: Grouper, group_ids: NDArray[np.int64], dropped: DroppedRows, console: Console) -> None:
    """Print the number of rows per group, and of dropped rows by reason.

    Args:
        grouper: fitted.
        group_ids: (rows,) group ids, -1 for unassigned rows.
        dropped: rows that training cannot use.
        console: where to print.
    """
    sizes = np.bincount(group_ids[group_ids >= 0], minlength=len(grouper.names))
    kept = largest(range(len(sizes)), MOST_GROUPS, sizes.__getitem__)
    lines = [(sanitize(grouper.names[group]), f"{sizes[group]:,}") for group in kept]
    console.print(make_table(["Group", "Rows"], lines))
    if len(sizes) > len(kept):
        console.print(Text(f"and {len(sizes) - len(kept):,} smaller groups."))
    if np.any(group_ids < 0):
        console.print(Text(f"{np.count_nonzero(group_ids < 0):,} rows are unassigned."))
    for reason, count in dropped.by_reason.items():
        groups = [(name, rows) for (other, name), rows in dropped.counts.items() if other == reason]
        most = ", ".join(f"{rows:,} of {name}" for name, rows in sorted(groups, key=lambda item: -item[1])[:5])
        console.print(Text(sanitize(f"{count:,} rows {reason} (most: {most}).")))
