"""Tables show the numbers and fit the terminal, and text of the data is sanitized."""

import dataclasses
import io
import re

import numpy as np
import pytest
from helpers.bad_input import acting
from helpers.hostile import HOSTILE, hostile_inspection, hostile_rows
from rich.console import Console

from commonit_trl.grouping import TaskGrouper
from commonit_trl.grouping.dropped import DroppedRows
from commonit_trl.report import print_inspections, print_sizes, tables
from commonit_trl.rows import Rows
from commonit_trl.sanitize import cut, sanitize


def printed(*inspections, width=100, terminal=False):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, highlight=False, color_system=None)
    print_inspections(inspections, console)
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_text_is_sanitized_and_lines_fit(width, terminal):
    text = printed(hostile_inspection(), width=width, terminal=terminal)
    assert not acting(text, but="\n")
    assert max(map(len, text.splitlines())) <= max(width, 76)  # numbers are not cut; names and rows are


@pytest.mark.parametrize("width", [80, 100])
def test_numbers_are_never_cut(width):
    one = hostile_inspection()
    groups = tuple(dataclasses.replace(group, rows=7_000, repeated=123_456_000 + group.id) for group in one.groups)
    lines = printed(dataclasses.replace(one, groups=groups), width=width).splitlines()
    assert [line.split()[-1] for line in lines if "7,000" in line] == [f"123,456,{n:03d}" for n in range(len(groups))]
    assert max(map(len, lines)) == width


def test_text_of_the_data_is_shown_escaped():
    text = printed(hostile_inspection(), width=400)
    for name in ("script", "handler", "markup", "template"):
        assert sanitize(HOSTILE[name]) in text
    assert "\\u001b[2J" in text and "\\u202egnp.exe\\u202c" in text and "שלום مرحبا" in text
    assert "a notice about <script>" in text and "</script> [bold]\\u001b[2J" in text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\x1b[0m", "a\\u001b[0m"),
        (" two\n lines\t", "two lines"),
        ("\u202etxt", "\\u202etxt"),
        ("مرحبا \u200f!", "مرحبا \u200f!"),
        ("👩\u200d💻 é", "👩\u200d💻 é"),
        ("\x00\x9b\x7f", "\\u0000\\u009b\\u007f"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_sanitize(text, safe):
    assert sanitize(text) == safe


def test_cut_marks_the_cut():
    assert (cut("abc", 3), cut("abcd", 3)) == ("abc", "ab…")


LABELS = ("Samples left out", "Samples in mixed", "Remainder")


def test_metrics_are_compared_side_by_side():
    inspection = hostile_inspection()
    mixed = {"name": "task:remainder=mix", "remainder": "mix", "order": "ascending", "pure_fraction": [1.0, 0.5]}
    other = dataclasses.replace(inspection, left_out=7, mixed_samples=1_234, **mixed)
    lines = printed(inspection, other).splitlines()
    cells = {label: next(line.split() for line in lines if label in line) for label in (*LABELS, "Padding ratio")}
    assert cells["Samples left out"][-2:] == ["0", "7"] and cells["Samples in mixed"][-2:] == ["0", "1,234"]
    assert "keep" in cells["Remainder"] and " ".join(cells["Remainder"]).endswith("mix, pure 1/0.5, ascending")
    planned, random, by_length = inspection.planned, inspection.random, inspection.by_length
    ratios = [f"{numbers.padding_ratio:.2f}" for numbers in (planned, planned, random, by_length)]
    assert cells["Padding ratio"][-4:] == ratios
    assert sum("Examples of each group" in line for line in lines) == 1  # the groups are the same


@pytest.mark.parametrize("width", [60, 80])
def test_many_strategies_take_several_tables_that_fit(width):
    names = [f"task:remainder=mix:pure_fraction=0.{number}" for number in range(6)]
    many = [dataclasses.replace(hostile_inspection(), name=name, groups=()) for name in names]
    lines = printed(*many, width=width).splitlines()
    lines = lines[: next(number for number, line in enumerate(lines) if "Groups by" in line)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("Padding ratio") > 1 and all(f"0.{number}" in text for number in range(6))


def test_group_cells():
    group = hostile_inspection().groups[0]
    assert tables.group_cells(group)[1:] == ("4", "9.1%", "4 / 4", "5 / 5", "1", "0", "0", "0")
    group = dataclasses.replace(group, steps=2.5, rows=12_000, response_tokens=None)
    assert tables.group_cells(group)[1:6] == ("12,000", "9.1%", "4 / 4", "-", "2.5")


def test_every_dropped_row_is_counted_in_one_line():
    dropped = DroppedRows(counts={("too long", HOSTILE["svg"]): 3, ("too long", "gone"): 41, ("empty", "gone"): 1})
    inspection = hostile_inspection(dropped)
    cells = list(map(tables.group_cells, inspection.groups))
    column = tables.GROUP_HEADINGS.index("Drop-\nped")
    assert sum(int(line[column]) for line in cells) == dropped.rows == 45
    lines = printed(inspection, width=100).splitlines()
    (gone,) = (line.split() for line in lines if line.split()[:1] == ["gone"])
    assert gone == ["gone", "0", "0.0%", "-", "-", "0", "42", "0", "0"]
    with_rows, total = (line.split() for line in lines if "Rows dropped" in line or "Groups with" in line)
    assert total[-1] == "45" and with_rows[-3:] == ["11", "of", "11"]


def test_largest_groups_are_listed_in_order():
    inspection = hostile_inspection()
    groups = [dataclasses.replace(inspection.groups[0], id=n, name=f"<{n}>", rows=n % 50) for n in range(100)]
    text = printed(dataclasses.replace(inspection, groups=tuple(groups)))
    listed = [int(name) for name in re.findall(r"^ +<(\d+)>", text, re.MULTILINE)]
    assert listed == [*range(35, 50), *range(85, 100)]
    assert "70 smaller groups" in text


def test_print_sizes():
    rows = Rows(hostile_rows())
    grouper = TaskGrouper(columns=["task"]).fit(rows)
    stream = io.StringIO()
    ids = np.where(np.arange(len(rows)) < 3, -1, grouper.assign(rows))
    dropped = DroppedRows(counts={("too\x1b[2J long", "gone\x1b[2J"): 12_345})
    print_sizes(grouper, ids, dropped, Console(file=stream, width=200))
    assert not acting(stream.getvalue(), but="\n")
    assert "3 rows are unassigned" in stream.getvalue()
    assert "12,345 rows too" in stream.getvalue()
    assert sum(line.rstrip().endswith(" 4") for line in stream.getvalue().splitlines()) == len(HOSTILE) - 1
