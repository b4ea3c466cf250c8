"""Copy measured figures from benchmarks/results into the pages that state them.

A comment after a figure names its source, and so does a comment on the line above a table:

    0.98<!-- NAME: PATH -->          a figure of benchmarks/results/NAME.json, written with its present digits
    44 %<!-- NAME: PATH -->          the same as a percentage
    15<!-- NAME: PATH * 1000 -->     the same in another unit; also / and -
    <!-- NAME: PATH | PATH -->       a table: one PATH for each column after the first, where * stands for the row's
                                     first cell, or for the name in a comment inside that cell
    <!-- NAME.md: HEADING -->        a table: the whole table below that heading of benchmarks/results/NAME.md

A PATH is a list of keys, such as `cases > ours > ratio`; a whole number selects an item of a list, or a number in a
text. NAME.md reads the tables of a Markdown file (`HEADING > ROW > COLUMN`), `output` those of the page's own text
blocks (`METRIC > LABEL`, where the block has a line "Groups by METRIC").

    python -m docs.figures

rewrites all pages; tests/docs/test_figures.py fails where a page and its sources differ.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "axolotl_plugin" / "README.md", *sorted((ROOT / "docs").glob("*.md")))

SOURCE = re.compile(r"<!--\s+(?P<name>[\w.+-]+):\s+(?P<path>.*?)\s+-->", re.DOTALL)
FIGURE = re.compile(r"(?P<figure>-?\d[\d,]*(?:\.\d+)?(?:\s?%)?)(?P<source>" + SOURCE.pattern + ")", re.DOTALL)
TABLE = re.compile(r"^(?P<source>" + SOURCE.pattern + r")\n(?P<table>(?:\|[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s?%)?")
ROW_NAME = re.compile(r"<!-- (.*?) -->")
CALCULATION = re.compile(r"(.*) ([-*/]) (-?[\d.]+)", re.DOTALL)
BLOCK = re.compile(r"^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fill(text: str) -> str:
    """Write the figures of a page's sources into the page.

    Raises:
        KeyError: when a source does not have a key.
    """
    text = TABLE.sub(lambda match: f"{match['source']}\n{_table(text, match)}", text)
    return FIGURE.sub(
        lambda match: _written(_value(text, match["name"], match["path"]), match["figure"]) + match["source"], text
    )


def _table(page: str, match: re.Match[str]) -> str:
    if "|" not in match["path"] and "*" not in match["path"]:
        return _tables(match["name"])[_one_line(match["path"])]

    def filled(path: str, cell: str) -> str:
        return NUMBER.sub(lambda found: _written(_value(page, match["name"], path), found[0]), cell, count=1)

    head, separator, *rows = _rows(match["table"])
    paths = match["path"].split("|")
    lines = [head, separator]
    for first, *cells in rows:
        named = ROW_NAME.search(first)
        key = named[1] if named else first.replace("`", "")
        lines.append(
            [first, *(filled(path.replace("*", key, 1), cell) for path, cell in zip(paths, cells, strict=True))]
        )
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _value(page: str, name: str, path: str) -> float:
    """The number that a source has under `path`."""
    calculation = CALCULATION.fullmatch(_one_line(path))
    keys, operator, operand = calculation.groups() if calculation else (_one_line(path), "*", "1")
    value = _outputs(page) if name == "output" else _result(name)
    for key in keys.split(" > "):
        if isinstance(value, str):
            value = NUMBER.findall(value)[int(key)]
        else:
            value = value[int(key) if isinstance(value, list) else key]
    number = _read(value) if isinstance(value, str) else float(value)
    by = float(operand)
    return {"*": number * by, "/": number / by, "-": number - by}[operator]


def _written(value: float, as_in: str) -> str:
    """`value` with the decimals and the percent sign of `as_in`."""
    digits = as_in.rstrip("% \n")
    sign = as_in[len(digits) :]
    return f"{value * (100 if sign else 1):,.{len(digits.partition('.')[2])}f}{sign}"


def _read(text: str) -> float:
    number = NUMBER.search(text)
    if number is None:
        raise KeyError(f"no number in {text!r}")
    digits = number[0].rstrip("% ")
    return float(digits.replace(",", "")) / (100 if digits != number[0] else 1)


@cache
def _result(name: str) -> Any:
    if name.endswith(".md"):
        return {heading: _cells(table) for heading, table in _tables(name).items()}
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content.get("results", content) if isinstance(content, dict) else content


@cache
def _tables(name: str) -> dict[str, str]:
    """The first table below each heading of a result's Markdown file."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    found = {heading: re.search(r"(?:^\|.*\n)+", body, re.MULTILINE) for heading, body in zip(*[iter(sections)] * 2)}
    return {heading: table[0] for heading, table in found.items() if table}


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def _cells(table: str) -> dict[str, dict[str, str]]:
    head, _, *rows = _rows(table)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def _outputs(page: str) -> dict[str, dict[str, str]]:
    """The labelled lines of each text block: a label, two spaces or more, and the rest of the line."""
    outputs = {}
    for block in BLOCK.findall(page):
        metric = re.search(r"^Groups by (\w+)", block, re.MULTILINE)
        if metric:
            outputs[metric[1]] = dict(re.findall(r"^ +(\S.*?) {2,}(\S.*)$", block, re.MULTILINE))
    return outputs


def _one_line(path: str) -> str:
    return " ".join(path.split())


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
