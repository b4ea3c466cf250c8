"""Print a comparison as tables and sentences, and write it as an HTML page in the style of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.text import Text

from commonit_trl.compare.comparison import Comparison, GroupResult, Measure, StrategyResult
from commonit_trl.compare.statistics import MIN_SEEDS, Difference
from commonit_trl.compare.strategies import BASELINE
from commonit_trl.files import write_text
from commonit_trl.report.charts import COLOURS, GREY, chart_text, curves, figure, line_axis
from commonit_trl.report.html import render_page
from commonit_trl.report.summary import largest
from commonit_trl.report.tables import make_table
from commonit_trl.sanitize import sanitize

MOST_GROUPS = 20  # in a table or chart
MORE_STEPS = 0.1  # share of the baseline's steps from which a difference is part of the verdict
VERSUS = f"vs {BASELINE}\n(95 %)"
HEADINGS = ("Strategy", "Held-out\nloss", VERSUS, "Token\naccuracy", VERSUS)
COST_HEADINGS = ("Strategy", "Steps", "Left out /\nrepeated", "Padding", "Tokens\nper second")
GROUP_HEADINGS = ("Group", "Rows", *HEADINGS[1:])
CURVES = {"loss": "Training loss", "eval_loss": "Evaluation loss during training"}


def tables(comparison: Comparison) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return headings and rows of the tables of strategies: results, each score of the harness, and costs."""
    made: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [(HEADINGS, [])]
    made += [(("Strategy", sanitize(name).replace(" ", "\n"), VERSUS), []) for name in comparison.strategies[0].scores]
    made += [(COST_HEADINGS, [])]
    for result in comparison.strategies:
        cells = [
            (*_measured(result.loss, 4), *_measured(result.accuracy, 4)),
            *(_measured(score, 4) for score in result.scores.values()),
            (
                f"{result.steps:,.0f}",
                f"{result.left_out:,} / {result.repeated:,}",
                f"{result.padding:.0%}",
                f"{result.tokens_per_second:,.0f}",
            ),
        ]
        for (_, rows), row in zip(made, cells, strict=True):
            rows.append((result.name, *row))
    return made


def group_cells(group: GroupResult) -> tuple[str, ...]:
    """Return a group's row for `GROUP_HEADINGS`."""
    return (sanitize(group.name), f"{group.rows:,}", *_measured(group.loss, 4), *_measured(group.accuracy, 4))


def _measured(measure: Measure, digits: int) -> tuple[str, str]:
    return f"{measure.value:.{digits}f}", "" if measure.difference is None else measure.difference.text(digits)


def verdicts(comparison: Comparison) -> list[str]:
    """Return one sentence for each strategy and measure; a different number of steps is part of it."""
    baseline = comparison.strategies[0].steps
    sentences = []
    for result in comparison.strategies[1:]:
        caveat = ""
        if abs(result.steps - baseline) > MORE_STEPS * baseline:
            caveat = (
                f" It took {result.steps:,.0f} steps, {BASELINE} {baseline:,.0f}: the number of steps is part of the "
                "difference. A larger commonit_min_group_size reduces it."
            )
        if len(result.seeds) < MIN_SEEDS:
            sentences.append(f"{result.name}: too few seeds to tell; use --seeds {MIN_SEEDS} or more.")
        else:
            sentences.append(_verdict(result.name, "held-out loss", result.loss.difference, 4, sign=-1))
            for name, measure in result.scores.items():
                sentences.append(_verdict(result.name, name, measure.difference, 4, sign=None))
        sentences[-1] += caveat
    return sentences


def _verdict(name: str, measure: str, difference: Difference | None, digits: int, *, sign: int | None) -> str:
    """Return a sentence on `difference`, of which values with `sign` are better; None: the reader knows."""
    if difference is None or difference.low is None:
        return f"{name}: too few held-out rows to compare the {measure}."
    if difference.low == difference.high:
        return f"{name}: the same {measure} as {BASELINE} on every example."
    if not difference.visible:
        return f"{name}: no difference in {measure} visible at this size, {difference.text(digits)}."
    direction = "higher" if difference.value > 0 else "lower"
    better = "" if sign is None else "better, " if difference.value * sign > 0 else "worse, "
    return f"{name}: {better}{direction} {measure} than {BASELINE}, {difference.text(digits)}."


def notes(comparison: Comparison) -> list[str]:
    """Return sentences on how the runs were made and how to read the numbers."""
    seeds = len(comparison.strategies[0].seeds)
    measured = [group for result in comparison.strategies[1:] for group in (result, *result.groups)]
    intervals = sum(one.loss.difference is not None and one.loss.difference.low is not None for one in measured)
    sentences = [
        f"Training rows: {comparison.train_rows:,}, epochs: {comparison.epochs:g}, seeds: {seeds}; the same weights, "
        f"rows and seed for each pair. Held-out rows: {comparison.held_out_rows:,}; loss: mean over their tokens.",
    ]
    if intervals:
        sentences.append(
            "A 95 % interval covers the chance of seeds and held-out rows, for this model, data and settings. "
            "Of 20 intervals of equal strategies, one excludes zero by chance; there are "
            f"{intervals} loss intervals here."
        )
    if comparison.at_a_time > 1:
        sentences.append(f"Tokens per second: {comparison.at_a_time} runs shared the machine at a time.")
    if len(comparison.processors) > 1:
        runs_on = "; ".join(f"{processor}: {', '.join(runs)}" for processor, runs in comparison.processors.items())
        sentences.append(
            f"The runs were made on different processors. {runs_on}. Rounding differs between them, so the differences "
            "are not those of the strategies alone. To repeat a run, remove its folder."
        )
    for result in comparison.strategies[1:]:
        if len(result.seeds) < seeds:
            sentences.append(f"{result.name}: seeds {', '.join(map(str, result.seeds))} only.")
    return sentences + [f"Failed: {run}: {reason}" for run, reason in comparison.failed.items()]


def kept_groups(result: StrategyResult) -> list[GroupResult]:
    """Return the groups with most held-out rows, in the order of the groups."""
    return largest(result.groups, MOST_GROUPS, lambda group: group.rows)


def print_comparison(comparison: Comparison, page: Path, console: Console | None = None) -> None:
    """Print the tables, the sentences and the path of the page."""
    console = console or Console(highlight=False)
    for headings, rows in tables(comparison):
        console.print(make_table(headings, rows, fold=True))
    for result in comparison.strategies:
        if groups := kept_groups(result):
            console.print(make_table(GROUP_HEADINGS, map(group_cells, groups), f"Groups by {result.name}", fold=True))
            if len(groups) < len(result.groups):
                console.print(f"and {len(result.groups) - len(groups):,} smaller groups, listed by --json.\n")
    for line in (*verdicts(comparison), "", *notes(comparison), "", f"Curves and charts: {page}"):
        console.print(Text(sanitize(line)), soft_wrap=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def write_html(path: Path, comparison: Comparison) -> None:
    """Write the page to `path`; it needs neither network nor server."""
    write_text(path, render(comparison))


def render(comparison: Comparison) -> str:
    """Return the HTML of the page."""
    charts: dict[str, Any] = {}

    def place(title: str, chart: go.Figure | None) -> dict[str, str]:
        """Add a chart, if there is one, and return id -> title."""
        if chart is None:
            return {}
        charts[f"chart-{len(charts)}"] = chart
        return {f"chart-{len(charts) - 1}": title}

    overall = place("Held-out loss, difference to the baseline", _intervals(comparison.strategies[1:]))
    for curve, title in CURVES.items():
        found = zip(comparison.strategies, (GREY, *COLOURS))
        lines = {one.name: (one.curves[curve], colour) for one, colour in found if one.curves.get(curve)}
        overall |= place(f"{title}, mean over seeds", curves(lines, "epoch", "lines") if lines else None)
    sections = [
        {
            "name": result.name,
            "charts": place("Held-out loss of the groups, difference to the baseline", _intervals(groups)),
            "rows": list(map(group_cells, groups)),
            "not_shown": len(result.groups) - len(groups),
        }
        for result in comparison.strategies
        if (groups := kept_groups(result))
    ]
    return render_page(
        "compare.html",
        charts,
        title="CommonIT comparison",
        tables=tables(comparison),
        verdicts=verdicts(comparison),
        notes=notes(comparison),
        charts_of=overall,
        group_headings=GROUP_HEADINGS,
        sections=sections,
    )


def _intervals(results: Sequence[GroupResult]) -> go.Figure | None:
    """Draw a row for each result that has an interval: the difference in loss and its interval, with a line at zero."""
    known = [
        (chart_text(result.name), difference, difference.high - difference.value)
        for result in results
        if (difference := result.loss.difference) is not None and difference.high is not None
    ]
    if not known:
        return None
    marks = go.Scatter(
        x=[difference.value for _, difference, _ in known],
        y=list(range(len(known))),
        mode="markers",
        marker={"size": 9, "color": [COLOURS[0] if difference.visible else GREY for _, difference, _ in known]},
        error_x={"type": "data", "array": [reach for *_, reach in known], "color": GREY},
        customdata=[[name, difference.low, difference.high] for name, difference, _ in known],
        hovertemplate="%{customdata[0]}: %{x:+.4f} (%{customdata[1]:+.4f} to %{customdata[2]:+.4f})<extra></extra>",
    )
    return figure(
        [marks],
        90 + 28 * len(known),
        yaxis=line_axis([name for name, *_ in known]),
        xaxis_title="loss minus that of the baseline (left is better)",
    ).add_vline(0, line={"color": GREY, "dash": "dot"})
