"""The HTML report in a real browser: nothing in the data runs, nothing is asked for, charts are drawn, text is text.

A page beside the report holds it in a frame of a given width, waits until the charts are drawn, looks inside and puts
what it found into its own document, which Chromium prints. That needs no driver beside the browser.
"""

import dataclasses
import html as escaping
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.hostile import HOSTILE, hostile_inspection
from helpers.made_runs import compared, result

from commonit_trl.compare.view import write_html as write_comparison
from commonit_trl.report import html, write_html
from commonit_trl.report.analysis import MapPoint
from commonit_trl.sanitize import sanitize

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = """
<body style="margin: 0"><iframe id="report" src="%s" style="border: 0; width: %dpx; height: 3000px"></iframe>
<pre id="found"></pre><script>
async function look() {
  const page = document.getElementById("report").contentWindow, body = page.document.body;
  await new Promise(done => setTimeout(done, 3000));
  const hovers = [];
  for (const chart of body.querySelectorAll(".chart")) {
    for (let trace = 0; trace < (chart.data ?? []).length; trace++) {
      page.Plotly.Fx.hover(chart, [{curveNumber: trace, pointNumber: chart.data[trace].z ? [0, 0] : 0}]);
      await new Promise(done => setTimeout(done, 60));
      hovers.push([...chart.querySelectorAll(".hoverlayer text")].map(text => text.textContent).join(" "));
    }
  }
  document.getElementById("found").textContent = JSON.stringify({
    ran: page.ran ?? null,
    title: page.document.title,
    text: body.innerText,
    charts: body.querySelectorAll(".chart svg.main-svg").length,
    links: body.querySelectorAll("a").length,
    images: body.querySelectorAll("img").length,
    foreign: page.performance.getEntriesByType("resource").map(entry => entry.name),
    width: page.document.documentElement.scrollWidth,
    background: page.getComputedStyle(body).backgroundColor,
    ticks: [...body.querySelectorAll(".ytick text")].map(text => text.textContent),
    ink: page.getComputedStyle(body.querySelector(".ytick text") ?? body).fill,
    hovers,
  });
}
document.getElementById("report").onload = look;
</script>
"""


def find_browser():
    return os.environ.get("COMMONIT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH (or COMMONIT_BROWSER)")
    return found


def chromium(browser, directory, *options):
    """What headless Chromium prints with these options."""
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",  # containers have none
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",  # so that the page may look into the frame
        f"--user-data-dir={directory / 'profile'}",
        "--virtual-time-budget=60000",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def look_at(browser, directory, report, width=1200, dark=False):
    """What the page of `LOOK` found in a report, shown `width` pixels wide; a picture of it lies beside it."""
    beside = directory / f"{Path(report).stem}-{width}{'-dark' if dark else ''}"
    beside.with_suffix(".look.html").write_text(LOOK % (Path(report).as_uri(), width), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    address = beside.with_suffix(".look.html").as_uri()
    printed = chromium(browser, directory, *scheme, "--dump-dom", address)
    found = escaping.unescape(printed.split('<pre id="found">')[1].split("</pre>")[0])
    picture = [f"--screenshot={beside.with_suffix('.png')}", f"--window-size={max(width, 500)},3000"]
    chromium(browser, directory, *scheme, *picture, address)
    assert beside.with_suffix(".png").stat().st_size > 10_000
    return json.loads(found)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(directory):
    """The report on hostile rows, with all its charts."""
    one = hostile_inspection()
    groups = {group.name: group.id for group in one.groups}
    points = tuple(
        MapPoint(x=n % 4, y=n // 4, group=groups[text], text=text) for n, text in enumerate(HOSTILE.values())
    )
    one = dataclasses.replace(one, drawing=dataclasses.replace(one.drawing, map=points))
    losses = [{"step": step, "group": name, "loss": 1 / step} for step in range(1, 9) for name in groups]
    write_html(directory / "report.html", [one], losses)
    return directory / "report.html"


@pytest.fixture(scope="module")
def found(browser, directory, report):
    return look_at(browser, directory, report)


def test_nothing_in_the_data_runs(found):
    assert found["ran"] is None
    assert found["title"] == "CommonIT report"
    assert (found["links"], found["images"]) == (0, 0)
    assert found["foreign"] == []


def test_charts_are_drawn_and_all_text_is_text(found):
    assert found["charts"] >= 5
    cut_to = 20  # characters of a name that a chart has room for
    for text in HOSTILE.values():
        assert sanitize(text) in found["text"]
        assert any(tick.startswith(sanitize(text)[:cut_to]) for tick in found["ticks"]), text
        line = sanitize(text)[:40]
        assert any(line in hover for hover in found["hovers"]), text


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_as_wide_as_the_window(browser, directory, report, width):
    assert look_at(browser, directory, report, width)["width"] == width


def test_the_page_follows_the_colour_scheme(browser, directory, report, found):
    dark = look_at(browser, directory, report, dark=True)
    assert (found["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(21, 21, 21)")
    assert (found["ink"], dark["ink"]) == ("rgb(28, 28, 28)", "rgb(230, 230, 230)")


# --- what these tests would see -----------------------------------------------------------------------------------


def test_text_that_runs_is_seen(browser, directory):
    """Without escaping and without a policy, each of these does run."""
    for kind in ("script", "handler", "svg"):
        page = directory / f"{kind}.html"
        page.write_text(f"<title>CommonIT report</title><p>{'word ' * 900}</p>{HOSTILE[kind]}", encoding="utf-8")
        assert look_at(browser, directory, page)["ran"] == kind


def test_the_policy_stops_what_escaping_would_let_through(browser, directory, report):
    text = report.read_text(encoding="utf-8")
    planted = HOSTILE["script"] + HOSTILE["handler"] + HOSTILE["svg"] + "<img src='https://example.org/x.png'>"
    page = directory / "planted.html"
    page.write_text(text.replace("<h1>", f"{planted}<h1>"), encoding="utf-8")
    found = look_at(browser, directory, page)
    assert (found["ran"], found["images"]) == (None, 2)  # they stand there and do nothing
    assert found["charts"] >= 5
    page.write_text(text.replace("Content-Security-Policy", "X").replace("<h1>", f"{planted}<h1>"), encoding="utf-8")
    assert look_at(browser, directory, page)["ran"] is not None


def test_the_policy_lets_no_other_script_draw(browser, directory, report):
    page = directory / "changed.html"
    page.write_text(report.read_text(encoding="utf-8").replace(html._DRAW, "window.ran = 1"), encoding="utf-8")
    found = look_at(browser, directory, page)
    assert (found["ran"], found["charts"]) == (None, 0)


def test_the_page_of_a_comparison_is_as_safe(browser, directory):
    runs = [result(name, seed) for seed in range(2) for name in ("none", "length:num_groups=2")]
    runs += [result("task", seed, -0.1, groups=HOSTILE.values()) for seed in range(2)]
    page = directory / "compare.html"
    write_comparison(page, compared(runs, failed={"task@2": " ".join(HOSTILE.values())}))
    found = look_at(browser, directory, page, width=390)
    assert (found["ran"], found["title"], found["foreign"]) == (None, "CommonIT comparison", [])
    assert (found["links"], found["images"]) == (0, 0)
    assert found["width"] <= 390
    assert found["charts"] >= 4  # differences, training loss, groups of two strategies
    for text in HOSTILE.values():
        assert sanitize(text) in found["text"]
        assert any(tick.startswith(sanitize(text)[:20]) for tick in found["ticks"]), text
    assert found["hovers"][0].startswith("length:num_groups=2: ")
