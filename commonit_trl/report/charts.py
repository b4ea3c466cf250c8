"""Draw the charts of the HTML report as plotly figures: lengths, order, map and losses of the groups.

Plotly draws SVG, so a style sheet can set a dark theme and text is selectable, and its JavaScript evaluates no strings,
so a strict content security policy works. It adds 4.8 MB to each report (Bokeh: 1.3 MB, but a canvas whose colours are
fixed when the file is written). Plotly renders text as a subset of HTML, so this module escapes all text of the data.

Every figure is bounded: `CHART_GROUPS` groups, `MAP_ROWS` points, `ORDER_WINDOWS` columns, `LOSS_POINTS` per line. If a
figure cannot be drawn, the report omits it and logs a warning.
"""

import html
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from commonit_trl.report.analysis import CHART_GROUPS, QUANTILES, GroupNumbers, Inspection, Losses
from commonit_trl.report.optional import optional
from commonit_trl.report.summary import largest
from commonit_trl.sanitize import cut, sanitize

LOSS_POINTS = 300
OTHERS = "other or mixed groups"

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
_AXIS = {"automargin": True, "fixedrange": True, "zeroline": False}
_LAYOUT = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12},
    "hoverlabel": {
        "bgcolor": "#222222",
        "bordercolor": "#888888",
        "font": {"color": "#ffffff"},
        "align": "left",
    },
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1, "x": 0, "xanchor": "left", "itemsizing": "constant"},
    "xaxis": _AXIS,
    "yaxis": _AXIS,
}


def figures(inspection: Inspection, losses: Losses | None = None) -> dict[str, go.Figure]:
    """Return title -> figure for the charts that have data."""
    mapped = f"Map of the embeddings, {len(inspection.drawing.map):,} of {inspection.rows:,} rows"
    draw: dict[str, Callable[[], go.Figure | None]] = {
        "Tokens of each group": lambda: _lengths(inspection),
        "Order of the groups in the epoch": lambda: _order(inspection),
        mapped: lambda: _map(inspection),
        "Training loss of each group": lambda: _losses(inspection, losses or {}),
    }
    drawn = {}
    for title, chart in draw.items():
        with optional(f"the chart {title!r}"):
            drawn[title] = chart()
    return {title: figure for title, figure in drawn.items() if figure is not None}


def chart_text(text: str) -> str:
    """Escape text of the data for plotly, cut to one line."""
    return html.escape(cut(sanitize(text), _NAME_CHARACTERS), quote=False)


def figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    """Make a figure in the style of the report.

    Args:
        traces: of plotly.
        height: in pixels.
        layout: changes to `_LAYOUT`, in plotly's names with underscores, such as `xaxis_title`.
    """
    return go.Figure(traces, {"template": "none", "height": height, **_LAYOUT}).update_layout(**layout)


def line_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return a vertical axis with one line per name, the first on top."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": list(names),
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
    }


def curves(lines: Mapping[str, tuple[Any, str]], x: str, mode: str) -> go.Figure:
    """Draw losses over `x`.

    Args:
        lines: name -> points, as in `thinned`, and colour.
        x: title of the axis.
        mode: of plotly's lines.
    """
    traces = []
    for name, (points, colour) in lines.items():
        positions, losses = thinned(points)
        traces.append(
            go.Scatter(
                x=positions,
                y=losses,
                mode=mode,
                name=chart_text(name),
                meta=chart_text(name),
                line={"color": colour, "width": 1.5},
                marker={"size": 4},
                hovertemplate=f"%{{meta}}<br>{x} %{{x:.2~f}}: %{{y:.4f}}<extra></extra>",
            )
        )
    return figure(traces, 340 + 20 * len(traces), xaxis_title=x, yaxis_title="loss", showlegend=True)


def _charted(inspection: Inspection) -> dict[int, tuple[GroupNumbers, str]]:
    """Return id -> group and colour of the groups that have their own."""
    groups = {group.id: group for group in inspection.groups}
    return {id: (groups[id], colour) for id, colour in zip(inspection.drawing.order_groups, COLOURS)}


def _lengths(inspection: Inspection) -> go.Figure | None:
    groups = [group for group, _ in _charted(inspection).values()]
    boxes = []
    for of, colour in (("prompt", GREY), ("response", COLOURS[0])):
        tokens = [quantiles for group in groups if (quantiles := getattr(group, f"{of}_tokens")) is not None]
        if not tokens and of == "response":
            return None
        fences = dict(zip(("lowerfence", "q1", "median", "q3", "upperfence"), QUANTILES, strict=True))
        boxes.append(
            go.Box(
                name=f"{of} (5, 25, 50, 75, 95 %)",
                y=list(range(len(tokens))),
                orientation="h",
                **{fence: [quantiles[quantile] for quantiles in tokens] for fence, quantile in fences.items()},
                marker={"color": colour},
                line={"width": 1.5},
            )
        )
    return figure(
        boxes,
        130 + 38 * len(groups),
        yaxis=line_axis([chart_text(group.name) for group in groups]),
        xaxis={"title": "tokens of a row", "rangemode": "tozero"},
        boxmode="group",
        showlegend=True,
    )


def _order(inspection: Inspection) -> go.Figure:
    drawing, charted = inspection.drawing, _charted(inspection)
    names = [chart_text(charted[group][0].name) if group in charted else OTHERS for group in drawing.order_groups]
    per = drawing.steps_per_window
    starts = [round(window * per, 2) for window in range(len(drawing.order[0]))]
    colours = [*(colour for _, colour in charted.values()), GREY]
    traces = [
        go.Heatmap(
            z=[shares],
            x=starts,
            y=[number],
            colorscale=[[0, "rgba(0,0,0,0)"], [1, colour]],
            zmin=0,
            zmax=1,
            showscale=False,
            hovertemplate="step %{x:.0f}: %{meta}, %{z:.0%}<extra></extra>",
            meta=name,
        )
        for number, (name, colour, shares) in enumerate(zip(names, colours, drawing.order))
    ]
    unit = "optimizer step" if per == 1 else f"optimizer step ({per:.1f} in a column)"
    steps = {"title": unit, "showgrid": False, "range": [-per / 2, starts[-1] + per / 2]}
    return figure(traces, 80 + 22 * len(names), yaxis=line_axis(names), xaxis=steps)


def _map(inspection: Inspection) -> go.Figure | None:
    if not inspection.drawing.map:
        return None
    names = {group.id: chart_text(group.name) for group in inspection.groups}
    colours = {id: colour for id, (_, colour) in _charted(inspection).items()} | {-1: GREY}
    by_group = defaultdict(list)
    for point in inspection.drawing.map:
        by_group[point.group if point.group in colours else -1].append(point)
    traces = [
        go.Scatter(
            x=[point.x for point in by_group[group]],
            y=[point.y for point in by_group[group]],
            mode="markers",
            name=names.get(group, OTHERS),
            marker={"color": colour, "size": 7, "opacity": 0.75},
            customdata=[f"{names[point.group]}<br>{_hover(point.text)}" for point in by_group[group]],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for group, colour in colours.items()
        if group in by_group
    ]
    axis = {"showticklabels": False, "fixedrange": False}
    legend = {"y": -0.03, "yanchor": "top"}
    return figure(traces, 440 + 20 * len(traces), xaxis=axis, yaxis=axis, showlegend=True, legend=legend)


def _hover(text: str) -> str:
    lines = textwrap.wrap(sanitize(text), _HOVER_CHARACTERS)
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _losses(inspection: Inspection, losses: Losses) -> go.Figure | None:
    colours = {group.name: colour for group, colour in _charted(inspection).values()}
    names = largest([name for name, points in losses.items() if points], CHART_GROUPS, lambda name: len(losses[name]))
    lines = {name: (losses[name], colours.get(name, GREY)) for name in names}
    return curves(lines, "optimizer step", "lines+markers") if lines else None


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
