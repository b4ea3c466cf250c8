"""Comparisons of runs: pairing, verdicts, tables and page."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.hostile import HOSTILE, SHOWN_SCRIPT
from helpers.made_runs import ROWS, STRATEGIES, compared, result
from rich.console import Console

from commonit_trl.compare.strategies import runs_of
from commonit_trl.compare.view import print_comparison, render, verdicts


def printed(comparison, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(comparison, "out/compare.html", console)
    return console.file.getvalue()


def test_verdicts_name_differences_and_their_absence():
    results = [result(name, seed, shift) for seed in range(3) for name, shift in (("none", 0), ("task", -0.2))]
    results += [result("length:num_groups=2", seed) for seed in range(3)]
    comparison = compared(results)
    better, same = verdicts(comparison)
    assert better.startswith("task: better, lower held-out loss than none, -0.2")
    assert same.startswith("length:num_groups=2: no difference in held-out loss")
    baseline, task, _ = comparison.strategies
    assert task.loss.value - baseline.loss.value == pytest.approx(-0.2, abs=0.01)
    assert (task.padding, task.tokens_per_second, task.lost, task.repeated) == (0.25, 300, 1, 2)
    assert [(group.name, group.rows) for group in task.groups] == [("first", 30), ("second", 30)]
    assert task.curves["loss"] == [(0.5, pytest.approx(2.8)), (1.0, pytest.approx(1.8))]


def test_a_different_number_of_steps_is_noted():
    few = compared([result("none", 0), result("task", 0, steps=10)])
    many = compared([result("none", 0), result("task", 0, steps=14)])
    note = "task: 14 steps, none: 10."
    assert note in printed(many, 200) and "commonit_min_group_size" not in printed(few, 200)


def test_seeds_without_a_baseline_run_are_ignored():
    results = [result("none", 0), result("none", 1), result("task", 1), result("task", 2), result("task", 0)]
    comparison = compared([*results[:4]], failed={"task@0": "it broke"})
    assert comparison.strategies[1].seeds == [1]
    assert "task: seeds 1 only." in printed(comparison)
    assert "Failed: task@0: it broke" in printed(comparison)
    assert compared(results).strategies[1].seeds == [0, 1]


@pytest.mark.parametrize(
    ("key", "name"),
    [("weights", "initial weights"), ("train_rows", "training rows"), ("held_out_rows", "held-out rows")],
)
def test_unpaired_runs_are_an_error(key, name):
    with pytest.raises(ValueError, match=rf"none@0 and task@0 have different {name}.*Name another output_dir"):
        compared([result("none", 0), result("task", 0, **{key: "other"})])


def test_weights_may_differ_between_seeds():
    compared([result("none", 0), result("task", 0), result("none", 1), result("task", 1)])


def test_missing_baseline_is_an_error():
    with pytest.raises(ValueError, match=r"'none'.*task@0: it broke"):
        compared([result("task", 1)], failed={"task@0": "it broke"})


def test_correct_answers_have_an_interval():
    few, many = np.arange(ROWS) % 3 == 0, np.arange(ROWS) % 3 > 0
    results = [result(name, seed, exact=exact) for seed in range(3) for name, exact in (("none", few), ("task", many))]
    comparison = compared(results)
    assert comparison.strategies[1].exact.value == pytest.approx(2 / 3)
    assert verdicts(comparison)[1].startswith("task: better, higher correct answers than none, +0.333")
    assert "+0.333" in printed(comparison)


def test_tables_fit_80_columns():
    results = [result(name, seed) for seed in range(2) for name in STRATEGIES]
    tables = printed(compared(results)).split("task: no difference")[0].splitlines()
    assert len(tables) > 20 and max(map(len, tables)) <= 80


def test_hostile_text_is_sanitized():
    results = [result("none", 0), result("task", 0, groups=list(HOSTILE.values())[:2])]
    comparison = compared(results, failed={"task@1": " ".join(HOSTILE.values())})
    page = render(comparison)
    assert SHOWN_SCRIPT not in page
    assert "\x1b" not in printed(comparison) + page

    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag, attributes):
            self.count += tag == "script"

    scripts = Scripts()
    scripts.feed(page)
    assert scripts.count == 3  # chart data, plotly, drawing code


def test_runs_are_ordered_by_seed():
    names = [run.name for run in runs_of(list(STRATEGIES.values()), 5, 2)]
    assert names == [f"{strategy}@{seed}" for seed in (5, 6) for strategy in STRATEGIES]
