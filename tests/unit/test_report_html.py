"""The HTML report has all numbers and charts, stays small, and escapes all text of the data."""

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from helpers.hostile import HOSTILE, hostile_inspection

from commonit_trl.report import charts, html, write_html
from commonit_trl.report.analysis import MapPoint
from commonit_trl.sanitize import sanitize

PLOTLY = 5_000_000  # bytes, at most


class Page(HTMLParser):
    """Parse the elements and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text = [], [], ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def inspection():
    one = hostile_inspection()
    points = [MapPoint(x=n, y=-n, group=n, text=text) for n, text in enumerate(HOSTILE.values())]
    return dataclasses.replace(one, drawing=dataclasses.replace(one.drawing, map=tuple(points)))


@pytest.fixture(scope="module")
def losses(inspection):
    return {group.name: [(step, 1 / step) for step in range(1, 9)] for group in inspection.groups}


@pytest.fixture(scope="module")
def rendered(inspection, losses):
    return html.render_html([inspection], losses)


def test_data_text_is_escaped(rendered, inspection):
    page = Page(rendered)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "svg", "a", "b", "circle", "link", "iframe", "object", "base", "form"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for text in HOSTILE.values():
        assert page.text.count(sanitize(text)) >= 7  # name, summary, prompts and responses
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", page.text)
    assert "a notice about <script>" in page.text
    assert "noscript" in tags and "need JavaScript" in page.text


def test_page_sends_no_requests(rendered):
    page = Page(rendered)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "data", "style"} & set(attributes), tag
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    data, *scripts = page.scripts
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall("'sha256-(.*?)'", policy) == hashes and len(hashes) == 2
    assert "'unsafe-eval'" not in policy and policy.count("'unsafe-inline'") == 1
    assert json.loads(data)
    head = [tag for tag, _ in page.elements].index("style")
    assert [a.get("http-equiv") for _, a in page.elements].index("Content-Security-Policy") < head


def test_chart_data_cannot_close_their_element(rendered):
    data = Page(rendered).scripts[0]
    assert not re.search("[<>&]", data)
    figures = json.loads(data)
    assert len(figures) == 4
    for figure in figures.values():  # in plotly's own markup
        for string in strings(figure):
            assert not re.search("<(?!br>|extra>|/extra>)", string), string


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def test_every_chart_has_an_element(rendered, inspection, losses):
    page = Page(rendered)
    assert [a["id"] for tag, a in page.elements if a.get("class") == "chart"] == list(json.loads(page.scripts[0]))
    assert list(charts.figures(inspection, losses)) == [
        "Tokens of each group",
        "Order of the groups in the epoch",
        "Map of the embeddings, 11 of 44 rows",
        "Training loss of each group",
    ]
    bare = dataclasses.replace(
        inspection,
        groups=tuple(dataclasses.replace(g, prompt_tokens=None, response_tokens=None) for g in inspection.groups),
        drawing=dataclasses.replace(inspection.drawing, map=()),
    )
    assert list(charts.figures(bare)) == ["Order of the groups in the epoch"]


def test_charts_match_the_numbers(inspection):
    figures = charts.figures(inspection)
    prompt, response = figures["Tokens of each group"].data
    assert list(prompt.median) == [4.0] * 11 and list(response.upperfence) == [5.0] * 11
    order = figures["Order of the groups in the epoch"].data
    assert [tuple(trace.z[0]) for trace in order] == list(inspection.drawing.order)


def test_long_losses_are_averaged(inspection):
    name = inspection.groups[2].name
    points = [*((step, float(step % 2)) for step in range(1, 3001)), (5000, math.nan)]
    losses = {name: points, "gone": [(1, 2.0)], inspection.groups[0].name: []}
    known, gone = charts.figures(inspection, losses)["Training loss of each group"].data
    assert len(known.x) == charts.LOSS_POINTS and known.y[0] == 0.5 and known.x[0] == 5.5
    assert (list(gone.x), list(gone.y), gone.name) == ([1.0], [2.0], "gone")
    order = charts.figures(inspection)["Order of the groups in the epoch"].data
    assert known.line.color == order[2].colorscale[1][1]


def test_groups_beyond_the_colours_share_a_line(inspection):
    many = tuple(dataclasses.replace(inspection.groups[0], id=n, name=f"n{n}", rows=100 - n) for n in range(300))
    drawing = dataclasses.replace(inspection.drawing, order_groups=(*range(20), -1), order=((1.0,),) * 21)
    one = dataclasses.replace(inspection, groups=many, drawing=drawing)
    lines = charts.figures(one)["Order of the groups in the epoch"].data
    assert len({line.colorscale[1][1] for line in lines}) == 21 and lines[-1].meta == charts.OTHERS
    assert "and 200 smaller groups." in Page(html.render_html([one])).text


def test_report_is_written_to_the_path(tmp_path, inspection):
    path = tmp_path / "new" / "commonit" / "report.html"
    write_html(path, [inspection, dataclasses.replace(inspection, name="length")])
    assert path.stat().st_size < PLOTLY + 300_000
    text = path.read_text(encoding="utf-8")
    assert "<h2>Groups by task</h2>" in text and "<h2>Groups by length</h2>" in text
    assert Page(text).text.count("Steps of one group") == 1
