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

import pytest
from helpers.hostile import HOSTILE, hostile_inspection
from helpers.made_runs import compared, result

from commonit_trl.compare.view import write_html as write_comparison
from commonit_trl.report import write_html
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


def look_at(browser, directory, report, width=1200, dark=False):
    """Return the findings of `LOOK` in a report that is `width` pixels wide."""
    page = directory / "look.html"
    page.write_text(LOOK % (report.as_uri(), width), encoding="utf-8")
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",  # containers have none
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",  # so that the page may look into the frame
        f"--user-data-dir={directory / 'profile'}",
        "--virtual-time-budget=60000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        page.as_uri(),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    return json.loads(escaping.unescape(printed.split('<pre id="found">')[1].split("</pre>")[0]))


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
    losses = {name: [(step, 1 / step) for step in range(1, 9)] for name in groups}
    write_html(directory / "report.html", [one], losses)
    return directory / "report.html"


def assert_safe(found, title, width):
    """Nothing of the data has run, the page requested nothing, and all text is text, in charts too."""
    assert (found["ran"], found["title"], found["foreign"]) == (None, title, [])
    assert (found["links"], found["images"]) == (0, 0)
    assert found["width"] == width
    assert found["charts"] >= 4
    for text in HOSTILE.values():
        assert sanitize(text) in found["text"]
        assert any(tick.startswith(sanitize(text)[:20]) for tick in found["ticks"]), text  # a chart cuts names


def test_the_report_is_safe_in_every_width_and_colour_scheme(browser, directory, report):
    found = look_at(browser, directory, report)
    dark = look_at(browser, directory, report, width=390, dark=True)
    assert_safe(found, "CommonIT report", 1200)
    assert_safe(dark, "CommonIT report", 390)
    for text in HOSTILE.values():
        assert any(sanitize(text)[:40] in hover for hover in found["hovers"]), text
    assert (found["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(21, 21, 21)")
    assert (found["ink"], dark["ink"]) == ("rgb(28, 28, 28)", "rgb(230, 230, 230)")


def test_the_policy_stops_what_escaping_would_let_through(browser, directory, report):
    text = report.read_text(encoding="utf-8")
    planted = HOSTILE["script"] + HOSTILE["handler"] + HOSTILE["svg"] + "<img src='https://example.org/x.png'>"
    page = directory / "planted.html"
    page.write_text(text.replace("<h1>", f"{planted}<h1>"), encoding="utf-8")
    found = look_at(browser, directory, page)
    assert (found["ran"], found["images"]) == (None, 2)  # they stand there and do nothing
    assert found["charts"] >= 4
    for kind in ("script", "handler", "svg"):  # without the policy, each of them runs
        unsafe = text.replace("Content-Security-Policy", "X").replace("<h1>", f"{HOSTILE[kind]}<h1>")
        page.write_text(unsafe, encoding="utf-8")
        assert look_at(browser, directory, page)["ran"] == kind


def test_the_page_of_a_comparison_is_as_safe(browser, directory):
    runs = [result(name, seed) for seed in range(3) for name in ("none", "length:num_groups=2")]
    runs += [result("task", seed, -0.1, groups=HOSTILE.values()) for seed in range(3)]
    page = directory / "compare.html"
    write_comparison(page, compared(runs, failed={"task@2": " ".join(HOSTILE.values())}))
    found = look_at(browser, directory, page, width=390)
    assert_safe(found, "CommonIT comparison", 390)
    assert found["hovers"][0].startswith("length:num_groups=2: ")
