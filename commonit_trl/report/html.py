"""Write the report as one HTML file that needs neither network nor server.

Jinja2 renders `page.html`, which extends `base.html`, and escapes all text; the chart data are JSON that cannot close
its element. The content security policy allows two scripts by hash, plotly and `_DRAW`: no other script, event handler
or request.

Cost for any size of data: half a second and about 5 MB, of which 4.8 are plotly's JavaScript.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commonit_trl.files import write_text
from commonit_trl.report import tables
from commonit_trl.report.analysis import Inspection, Losses
from commonit_trl.sanitize import sanitize

MOST_GROUPS = 100  # per table

_TEMPLATES = Path(__file__).parent
_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const config = {displayModeBar: false, responsive: true, typesetMath: false, scrollZoom: false};
for (const [id, figure] of Object.entries(charts)) Plotly.newPlot(id, figure.data, figure.layout, config);
"""


def write_html(path: str | Path, inspections: Sequence[Inspection], losses: Losses | None = None) -> None:
    """Write the report on one or several metrics to `path`.

    Args:
        path: file to write; its directory is created if missing.
        inspections: results of `inspect_groups`, all on the same rows.
        losses: of the first inspection's groups, after training.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_html(inspections, losses))


def render_html(inspections: Sequence[Inspection], losses: Losses | None = None) -> str:
    """Return the text of the file that `write_html` writes."""
    from commonit_trl.report.charts import figures

    charts: dict[str, Any] = {}
    sections = []
    for number, inspection in enumerate(inspections):
        drawn = figures(inspection, losses if number == 0 else None)
        ids = {f"chart-{number}-{position}": title for position, title in enumerate(drawn)}
        charts |= dict(zip(ids, drawn.values(), strict=True))
        kept = tables.largest_groups(inspection, MOST_GROUPS)
        sections.append(
            {
                "inspection": inspection,
                "charts": ids,
                "groups": kept,
                "rows": list(map(tables.group_cells, kept)),
                "not_shown": len(inspection.groups) - len(kept),
            }
        )
    metrics, lines = tables.overview(inspections)
    return render_page(
        "page.html",
        charts,
        title="CommonIT report",
        metrics=metrics,
        overview=lines,
        geometry=tables.geometry(inspections[0]),
        headings=[heading.replace("-\n", "") for heading in tables.GROUP_HEADINGS],
        sections=sections,
    )


def render_page(template: str, charts: Mapping[str, Any], **values: Any) -> str:
    """Render a template and its charts.

    Args:
        template: file name, in this directory, of a template that extends `base.html`.
        charts: element id -> plotly figure.
        values: variables of the template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sanitize"] = sanitize
    scripts = (_plotly(), _DRAW)
    drawn = json.dumps({chart: json.loads(figure.to_json()) for chart, figure in charts.items()})
    return environment.get_template(template).render(
        **values,
        scripts=scripts,
        hashes=list(map(_hash, scripts)),
        # As in plotly's own pages. In JSON, these characters occur in strings only.
        charts=drawn.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    )


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n")  # browsers normalise line ends before hashing


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
