"""Print a comparison as tables and sentences, and write it as an HTML page in the style of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from commonit_trl.compare.comparison import Comparison, GroupResult, Measure, StrategyResult
from commonit_trl.compare.statistics import Interval
from commonit_trl.compare.strategies import BASELINE
from commonit_trl.files import write_text
from commonit_trl.report.charts import ABOVE, COLOURS, GREY, chart_text, figure, line_axis, number_axis, thinned
from commonit_trl.report.html import render_page
from commonit_trl.sanitize import sanitize

MOST_GROUPS = 20  # in a table or chart
MORE_STEPS = 0.1  # share of the baseline's steps from which a difference is noted
VERSUS = f"vs {BASELINE}\n(95 %)"
HEADINGS = ("Strategy", "Held-out\nloss", VERSUS, "Token\naccuracy", VERSUS)
EXACT_HEADINGS = ("Correct\nanswers", VERSUS)
COST_HEADINGS = ("Strategy", "Steps", "Dropped /\nrepeated", "Padding", "Tokens\nper second")
GROUP_HEADINGS = ("Group", "Rows", *HEADINGS[1:])
CURVES = {"loss": "Training loss", "eval_loss": "Evaluation loss during training"}


def cells(result: StrategyResult) -> tuple[str, ...]:
    """Return a strategy's row for `HEADINGS` and, if answers were generated, `EXACT_HEADINGS`."""
    return (
        result.name,
        *_measured(result.loss, 4),
        *_measured(result.accuracy, 4),
        *(() if result.exact is None else _measured(result.exact, 3)),
    )


def cost_cells(result: StrategyResult) -> tuple[str, ...]:
    """Return a strategy's row for `COST_HEADINGS`."""
    return (
        result.name,
        f"{result.steps:,.0f}",
        f"{result.lost:,} / {result.repeated:,}",
        f"{result.padding:.0%}",
        f"{result.tokens_per_second:,.0f}",
    )


def group_cells(group: GroupResult) -> tuple[str, ...]:
    """Return a group's row for `GROUP_HEADINGS`."""
    return (sanitize(group.name), f"{group.rows:,}", *_measured(group.loss, 4), *_measured(group.accuracy, 4))


def tables(comparison: Comparison) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return headings and rows of the two tables of strategies: results and costs."""
    measured = HEADINGS if comparison.strategies[0].exact is None else HEADINGS + EXACT_HEADINGS
    return [
        (measured, [cells(result) for result in comparison.strategies]),
        (COST_HEADINGS, [cost_cells(result) for result in comparison.strategies]),
    ]


def _measured(measure: Measure, digits: int) -> tuple[str, str]:
    return f"{measure.value:.{digits}f}", _interval(measure.difference, digits)


def _interval(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    return f"{interval.value:+.{digits}f} ± {interval.high - interval.value:.{digits}f}"


def verdicts(comparison: Comparison) -> list[str]:
    """Return one sentence for each strategy and measure."""
    sentences = []
    for result in comparison.strategies[1:]:
        sentences.append(_verdict(result.name, "held-out loss", result.loss.difference, 4, lower_is_better=True))
        if result.exact is not None:
            sentences.append(
                _verdict(result.name, "correct answers", result.exact.difference, 3, lower_is_better=False)
            )
    return sentences


def _verdict(name: str, measure: str, interval: Interval | None, digits: int, *, lower_is_better: bool) -> str:
    if interval is None:
        return f"{name}: too few held-out rows to compare the {measure}."
    if interval.has_zero:
        return f"{name}: no difference in {measure} visible at this size, {_interval(interval, digits)}."
    is_lower = interval.value < 0
    better = "better" if is_lower == lower_is_better else "worse"
    direction = "lower" if is_lower else "higher"
    return f"{name}: {better}, {direction} {measure} than {BASELINE}, {_interval(interval, digits)}."


def notes(comparison: Comparison) -> list[str]:
    """Return sentences on how the runs were made and how to read the numbers."""
    seeds = len(comparison.strategies[0].seeds)
    intervals = sum(1 + len(result.groups) for result in comparison.strategies[1:])
    sentences = [
        f"Training rows: {comparison.train_rows:,}, epochs: {comparison.epochs:g}, seeds: {seeds}; the same weights, "
        f"rows and seed for each pair. Held-out rows: {comparison.held_out_rows:,}; loss: mean over their tokens.",
        "A 95 % interval covers the chance of seeds and held-out rows, for this model, data and settings. "
        f"Of 20 intervals of equal strategies, one excludes zero by chance; there are {intervals} here.",
    ]
    if seeds == 1:
        sentences.append("--seeds 1: the intervals do not cover the chance of seeds. Use --seeds 3 or more.")
    if comparison.at_a_time > 1:
        sentences.append(f"Tokens per second: {comparison.at_a_time} runs shared the machine at a time.")
    baseline = comparison.strategies[0].steps
    for result in comparison.strategies[1:]:
        if abs(result.steps - baseline) > MORE_STEPS * baseline:
            sentences.append(
                f"{result.name}: {result.steps:,.0f} steps, {BASELINE}: {baseline:,.0f}. The number of steps is part "
                "of the difference; a larger commonit_min_group_size reduces it."
            )
        if len(result.seeds) < seeds:
            sentences.append(f"{result.name}: seeds {', '.join(map(str, result.seeds))} only.")
    sentences += [f"Failed: {run}: {reason}" for run, reason in comparison.failed.items()]
    return sentences


def kept_groups(result: StrategyResult) -> list[GroupResult]:
    """Return the groups with most held-out rows, in the order of the groups."""
    most = sorted(result.groups, key=lambda group: -group.rows)[:MOST_GROUPS]
    return [group for group in result.groups if group in most]


def print_comparison(comparison: Comparison, page: Path, console: Console | None = None) -> None:
    """Print the tables, the sentences and the path of the page."""
    console = console or Console(highlight=False)
    for heads, rows in tables(comparison):
        console.print(_table("", heads, rows))
    for result in comparison.strategies:
        if groups := kept_groups(result):
            lines = [group_cells(group) for group in groups]
            console.print(_table(f"Groups by {result.name}", GROUP_HEADINGS, lines))
            if len(groups) < len(result.groups):
                console.print(f"and {len(result.groups) - len(groups):,} smaller groups, listed by --json.\n")
    for line in (*verdicts(comparison), "", *notes(comparison), "", f"Curves and charts: {page}"):
        console.print(Text(sanitize(line)), soft_wrap=True)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# --- the page ---------------------------------------------------------------------------------------------------------


def write_html(path: Path, comparison: Comparison) -> None:
    """Write the page to `path`; it needs neither network nor server."""
    write_text(path, render(comparison))


def render(comparison: Comparison) -> str:
    """Return the HTML of the page."""
    drawn = {"Held-out loss, difference to the baseline": _intervals(_overall(comparison))}
    for curve, title in CURVES.items():
        if any(result.curves.get(curve) for result in comparison.strategies):
            drawn[f"{title}, mean over seeds"] = _curves(comparison, curve)
    titles = {f"chart-{number}": title for number, title in enumerate(drawn)}
    charts: dict[str, Any] = dict(zip(titles, drawn.values()))
    sections = []
    for number, result in enumerate(comparison.strategies):
        if not (groups := kept_groups(result)):
            continue
        chart = f"groups-{number}"
        points = [(sanitize(group.name), group.loss.difference) for group in groups]
        charts[chart] = _intervals(points)
        sections.append(
            {
                "name": result.name,
                "chart": chart,
                "rows": [group_cells(group) for group in groups],
                "not_shown": len(result.groups) - len(groups),
            }
        )
    return render_page(
        "compare.html",
        charts,
        title="CommonIT comparison",
        tables=tables(comparison),
        verdicts=verdicts(comparison),
        notes=notes(comparison),
        charts_of=titles,
        group_headings=GROUP_HEADINGS,
        sections=sections,
    )


def _overall(comparison: Comparison) -> list[tuple[str, Interval | None]]:
    return [(result.name, result.loss.difference) for result in comparison.strategies[1:]]


def _intervals(points: Sequence[tuple[str, Interval | None]]) -> go.Figure:
    """Draw a row for each name: the difference and its interval, with a line at zero."""
    known = [(name, interval) for name, interval in points if interval is not None]
    marks = go.Scatter(
        x=[interval.value for _, interval in known],
        y=list(range(len(known))),
        mode="markers",
        marker={"size": 9, "color": [GREY if interval.has_zero else COLOURS[0] for _, interval in known]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [interval.high - interval.value for _, interval in known],
            "arrayminus": [interval.value - interval.low for _, interval in known],
            "color": GREY,
        },
        customdata=[[chart_text(name), interval.low, interval.high] for name, interval in known],
        hovertemplate="%{customdata[0]}: %{x:+.4f} (%{customdata[1]:+.4f} to %{customdata[2]:+.4f})<extra></extra>",
    )
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "dash": "dot"}}
    names = [chart_text(name) for name, _ in known]
    return figure(
        [marks],
        90 + 28 * len(known),
        yaxis=line_axis(names),
        xaxis=number_axis("loss minus that of the baseline (left is better)"),
        shapes=[zero],
    )


def _curves(comparison: Comparison, curve: str) -> go.Figure:
    traces = []
    for result, colour in zip(comparison.strategies, (GREY, *COLOURS)):
        epochs, losses = thinned(result.curves.get(curve, []))
        name = chart_text(result.name)
        traces.append(
            go.Scatter(
                x=epochs,
                y=losses,
                mode="lines",
                name=name,
                meta=name,
                line={"color": colour, "width": 1.5},
                hovertemplate="%{meta}<br>epoch %{x:.2f}: %{y:.4f}<extra></extra>",
            )
        )
    return figure(
        traces,
        340 + 20 * len(traces),
        xaxis=number_axis("epoch"),
        yaxis=number_axis("loss"),
        showlegend=True,
        legend=ABOVE,
    )
