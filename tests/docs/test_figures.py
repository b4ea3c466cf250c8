"""Measured figures in the pages equal those in the result files.

1. `docs/figures.py` changes no page, and would correct any changed figure.
2. Every source comment belongs to a figure or a table.
3. Every figure with a unit in prose has a source, or is listed in `FROM_NO_RUN`.
"""

import re

import pytest

from docs import figures

FROM_NO_RUN = {
    "choosing-a-metric.md": {"2.1 %", "5.2 %", "3.8 %", "100 %"},  # the paper's
    "compare.md": {"95 %"},
    "limits.md": {"20 bytes", "65 bytes"},  # array item sizes
    "ray.md": {"8 GB", "65 GB"},  # 8 and 65 bytes for each of 10⁹ rows
    "speed.md": {"1.05 times"},  # a bound set in commonit_trl/plan/balance.py
    "study.md": {"95 %"},
}
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK_TARGET = re.compile(r"\]\([^)]*\)")
PROJECTION = re.compile(r"^For 10⁹ rows.*?(?=\n\n[^|])", re.MULTILINE | re.DOTALL)
WITH_UNIT = re.compile(r"\d[\d,.]* ?(?:%|µs|ms|s|[GM]B|min|minutes|hours|seconds|bytes|times)(?!\w)")

OTHER_DIGITS = str.maketrans("0123456789", "1234567890")

every_page = pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: str(page.relative_to(figures.ROOT)))


@every_page
def test_figures_equal_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert figures.fill(text) == text, "run `make figures`"


@every_page
def test_changed_figures_are_corrected(page):
    text = page.read_text(encoding="utf-8")

    def changed_rows(table):
        head, separator, *rows = table.splitlines(keepends=True)
        cut = [row.index("|", 1) for row in rows]
        return head + separator + "".join(row[:at] + row[at:].translate(OTHER_DIGITS) for row, at in zip(rows, cut))

    changed = figures.TABLE.sub(lambda match: f"{match['source']}\n{changed_rows(match['table'])}", text)
    changed = figures.FIGURE.sub(lambda match: match["figure"].translate(OTHER_DIGITS) + match["source"], changed)
    assert (changed != text) == bool(figures.SOURCE.search(text))
    assert figures.fill(changed) == text


@every_page
def test_every_source_has_a_figure(page):
    text = page.read_text(encoding="utf-8")
    unattached = figures.SOURCE.findall(figures.FIGURE.sub("", figures.TABLE.sub("", text)))
    assert unattached == []


@every_page
def test_every_figure_with_a_unit_has_a_source(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    text = figures.FIGURE.sub("", figures.TABLE.sub("", PROJECTION.sub("", text)))
    found = set(WITH_UNIT.findall(LINK_TARGET.sub("]", text)))
    assert found <= FROM_NO_RUN.get(page.name, set())
