"""Draw the charts of the HTML report as plotly figures: sizes, lengths, map, order and losses of the groups.

Plotly draws SVG, so a style sheet can set a dark theme and text is selectable, and its JavaScript evaluates no strings,
so a strict content security policy works. It adds 4.8 MB to each report (Bokeh: 1.3 MB, but a canvas whose colours are
fixed when the file is written). Plotly renders text as a subset of HTML, so this module escapes all text of the data.

Every figure is bounded: `CHART_GROUPS` groups, `MAP_ROWS` points, `ORDER_WINDOWS` columns, `LOSS_POINTS` per line. If a
figure cannot be drawn, the report omits it and logs a warning.
"""

import html
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from commonit_trl.report.analysis import CHART_GROUPS, GroupNumbers, Inspection, LossRecord, Spread
from commonit_trl.report.optional import optional
from commonit_trl.sanitize import cut, sanitize

LOSS_POINTS = 300
OTHERS = "other groups"

_NAME_CHARACTERS = 26  # fits a phone
_HOVER_CHARACTERS = 60  # per line
# Readable on white and on black.
# fmt: off
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#ff9da6", "#9d755d", "#59a7c9",
    "#1f9ed1", "#d67195", "#439894", "#c99a2e", "#8f6bb3", "#5fae3a", "#d9583b", "#6b8fd6", "#b5588c", "#7d9b4e",
)
# fmt: on
GREY = "#8c8c8c"


def figures(inspection: Inspection, losses: Iterable[LossRecord] = ()) -> dict[str, go.Figure]:
    """Return title -> figure for the charts that have data."""
    mapped = f"Map of the embeddings, {len(inspection.drawing.map):,} of {inspection.rows:,} rows"
    draw: dict[str, Callable[[], go.Figure | None]] = {
        "Rows of each group": lambda: _sizes(inspection),
        "Tokens of each group": lambda: _lengths(inspection),
        "Order of the groups in the epoch": lambda: _order(inspection),
        mapped: lambda: _map(inspection),
        "Training loss of each group": lambda: _losses(inspection, losses),
    }
    drawn = {}
    for title, chart in draw.items():
        with optional(f"the chart {title!r}"):
            drawn[title] = chart()
    return {title: figure for title, figure in drawn.items() if figure is not None}


def chart_text(text: str, characters: int = _NAME_CHARACTERS) -> str:
    """Escape text of the data for plotly, cut to one line."""
    return html.escape(cut(sanitize(text), characters), quote=False)


def _hover(text: str) -> str:
    lines = textwrap.wrap(sanitize(text), _HOVER_CHARACTERS)
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _charted(inspection: Inspection) -> list[GroupNumbers]:
    """Return the groups with their own line and colour, by id."""
    ids = set(inspection.drawing.order_groups)
    return [group for group in inspection.groups if group.id in ids]


def _colours(inspection: Inspection) -> dict[int, str]:
    return dict(zip((group.id for group in _charted(inspection)), COLOURS))


def figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    margins = {"l": 8, "r": 8, "t": 8, "b": 8}
    return go.Figure(
        traces,
        {
            "template": "none",
            "height": height,
            "margin": margins,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12},
            "hoverlabel": {
                "bgcolor": "#222222",
                "bordercolor": "#888888",
                "font": {"color": "#ffffff"},
                "align": "left",
            },
            "showlegend": False,
            **layout,
        },
    )


def line_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return a vertical axis with one line per name, the first on top."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names)}
    return {
        **ticks,
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "fixedrange": True,
        "showgrid": False,
        "zeroline": False,
    }


def number_axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, "fixedrange": True, "zeroline": False, **more}


ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1, "x": 0, "xanchor": "left", "itemsizing": "constant"}


def _sizes(inspection: Inspection) -> go.Figure:
    groups, colours = _charted(inspection), _colours(inspection)
    names = [chart_text(group.name) for group in groups]
    rows = [group.rows for group in groups]
    fill = [colours[group.id] for group in groups]
    if -1 in inspection.drawing.order_groups:
        names.append(OTHERS)
        rows.append(inspection.rows - sum(rows))
        fill.append(GREY)
    bars = go.Bar(
        x=rows,
        y=list(range(len(rows))),
        orientation="h",
        marker={"color": fill},
        customdata=[[name, share / inspection.rows] for name, share in zip(names, rows)],
        hovertemplate="%{customdata[0]}: %{x:,} rows, %{customdata[1]:.1%}<extra></extra>",
    )
    return figure(
        [bars], 70 + 24 * len(rows), yaxis=line_axis(names), xaxis=number_axis("rows", rangemode="tozero"), bargap=0.25
    )


def _lengths(inspection: Inspection) -> go.Figure | None:
    groups = _charted(inspection)
    spreads = {
        "prompt": [group.prompt_tokens for group in groups],
        "response": [group.response_tokens for group in groups],
    }
    if None in spreads["response"]:
        return None
    names = [chart_text(group.name) for group in groups]
    boxes = [
        _boxes(f"{of} (5, 25, 50, 75, 95 %)", [spread for spread in found if spread is not None], colour)
        for (of, found), colour in zip(spreads.items(), (GREY, COLOURS[0]))
    ]
    return figure(
        boxes,
        130 + 38 * len(groups),
        yaxis=line_axis(names),
        xaxis=number_axis("tokens of a row", rangemode="tozero"),
        boxmode="group",
        showlegend=True,
        legend=ABOVE,
    )


def _boxes(name: str, spreads: Sequence[Spread], colour: str) -> Any:
    return go.Box(
        name=name,
        y=list(range(len(spreads))),
        orientation="h",
        lowerfence=[spread.p5 for spread in spreads],
        q1=[spread.p25 for spread in spreads],
        median=[spread.median for spread in spreads],
        q3=[spread.p75 for spread in spreads],
        upperfence=[spread.p95 for spread in spreads],
        marker={"color": colour},
        line={"width": 1.5},
    )


def _order(inspection: Inspection) -> go.Figure:
    drawing, colours = inspection.drawing, _colours(inspection)
    names = {group.id: chart_text(group.name) for group in inspection.groups}
    lines = [names.get(group, OTHERS) for group in drawing.order_groups]
    per = drawing.steps_per_window
    starts = [round(window * per, 2) for window in range(len(drawing.order[0]))]
    traces = [
        go.Heatmap(
            z=[shares],
            x=starts,
            y=[number],
            colorscale=[[0, "rgba(0,0,0,0)"], [1, colours.get(group, GREY)]],
            zmin=0,
            zmax=1,
            showscale=False,
            hovertemplate="step %{x:.0f}: %{meta}, %{z:.0%}<extra></extra>",
            meta=name,
        )
        for number, (group, name, shares) in enumerate(zip(drawing.order_groups, lines, drawing.order))
    ]
    unit = "optimizer step" if per == 1 else f"optimizer step ({per:.1f} in a column)"
    steps = number_axis(unit, showgrid=False, range=[-per / 2, starts[-1] + per / 2])
    return figure(traces, 80 + 22 * len(lines), yaxis=line_axis(lines), xaxis=steps)


def _map(inspection: Inspection) -> go.Figure | None:
    points = inspection.drawing.map
    if not points:
        return None
    colours = _colours(inspection)
    names = {group.id: chart_text(group.name) for group in inspection.groups}
    by_group = defaultdict(list)
    for point in points:
        by_group[point.group if point.group in colours else -1].append(point)
    traces = [
        go.Scatter(
            x=[point.x for point in members],
            y=[point.y for point in members],
            mode="markers",
            name=names[group] if group >= 0 else OTHERS,
            marker={"color": colours.get(group, GREY), "size": 7, "opacity": 0.75},
            customdata=[f"{names[point.group]}<br>{_hover(point.text)}" for point in members],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for group, members in sorted(by_group.items(), key=lambda item: item[0] % (1 << 62))  # the others last
    ]
    axis = {"showticklabels": False, "zeroline": False, "automargin": True}
    return figure(
        traces,
        440 + 20 * len(traces),
        xaxis=axis,
        yaxis=axis,
        showlegend=True,
        legend={**ABOVE, "y": -0.03, "yanchor": "top"},
    )


def _losses(inspection: Inspection, losses: Iterable[LossRecord]) -> go.Figure | None:
    by_group = defaultdict(list)
    for record in losses:
        by_group[record["group"]].append((record["step"], record["loss"]))
    if not by_group:
        return None
    ids = {group.name: group.id for group in inspection.groups}
    most = sorted(by_group, key=lambda name: -len(by_group[name]))[:CHART_GROUPS]
    colours = _colours(inspection)
    traces = []
    for name in sorted(most, key=lambda name: ids.get(name, len(ids))):
        steps, values = thinned(sorted(by_group[name]))
        traces.append(
            go.Scatter(
                x=steps,
                y=values,
                mode="lines+markers",
                name=chart_text(name),
                meta=chart_text(name),
                line={"color": colours.get(ids.get(name, -1), GREY), "width": 1.5},
                marker={"size": 4},
                hovertemplate="%{meta}<br>step %{x:.0f}: %{y:.4f}<extra></extra>",
            )
        )
    return figure(
        traces,
        340 + 20 * len(traces),
        xaxis=number_axis("optimizer step"),
        yaxis=number_axis("loss"),
        showlegend=True,
        legend=ABOVE,
    )


def thinned(points: Any) -> tuple[list[float], list[float]]:
    """Average neighbouring points so that at most `LOSS_POINTS` remain.

    Args:
        points: (points, 2) steps and losses; a loss that is not finite is ignored.

    Returns:
        Steps and losses.
    """
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    finite = points[np.isfinite(points[:, 1])]
    parts = np.array_split(finite, min(LOSS_POINTS, max(len(finite), 1)))
    means = [part.mean(axis=0).round(5).tolist() for part in parts if len(part)]
    return [step for step, _ in means], [loss for _, loss in means]
