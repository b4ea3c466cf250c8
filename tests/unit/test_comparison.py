"""Comparisons of runs: pairing, verdicts, tables and page."""

import io
import re

import numpy as np
import pytest
from helpers.hostile import HOSTILE, SHOWN_SCRIPT
from helpers.made_runs import ROWS, STRATEGIES, compared, result
from rich.console import Console

from commonit_trl.compare.strategies import runs_of
from commonit_trl.compare.view import print_comparison, render, verdicts


def made(seeds=3, **shifts):
    """A comparison of `none` with the strategies of `shifts`."""
    return compared([result(name, seed, by) for seed in range(seeds) for name, by in {"none": 0, **shifts}.items()])


def printed(comparison, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(comparison, "out/compare.html", console)
    return console.file.getvalue()


def test_verdicts_name_differences_and_their_absence():
    comparison = made(task=-0.2, **{"length:num_groups=2": 0})
    better, same = verdicts(comparison)
    assert better.startswith("task: better, lower held-out loss than none, -0.2")
    assert same.startswith("length:num_groups=2: no difference in held-out loss")
    baseline, task, _ = comparison.strategies
    assert task.loss.value - baseline.loss.value == pytest.approx(-0.2, abs=0.01)
    assert (task.padding, task.tokens_per_second, task.left_out, task.repeated) == (0.25, 300, 1, 2)
    assert [(group.name, group.rows) for group in task.groups] == [("first", 30), ("second", 30)]
    assert task.curves["loss"] == [[0.5, pytest.approx(2.8)], [1.0, pytest.approx(1.8)]]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_fewer_than_three_seeds_give_no_verdict_and_no_interval(seeds):
    comparison = made(seeds, task=-0.2)
    (verdict,) = verdicts(comparison)
    text, page = printed(comparison), render(comparison)
    enough = seeds >= 3
    assert ("too few seeds" not in verdict) == ("--seeds 3" not in verdict) == ("better" in verdict) == enough
    assert ("±" in text) == ("95 % interval" in text) == ("difference to the baseline" in page) == enough
    assert "-0.2" in text


def test_a_different_number_of_steps_is_part_of_the_verdict():
    for steps, noted in ((10, False), (14, True)):
        for seeds in (1, 3):
            runs = [result(name, n, steps=s) for n in range(seeds) for name, s in (("none", 10), ("task", steps))]
            (verdict,) = verdicts(compared(runs))
            assert ("14 steps, none 10" in verdict) == ("commonit_min_group_size" in verdict) == noted


def test_seeds_without_a_baseline_run_are_ignored():
    results = [result("none", 0), result("none", 1), result("task", 1), result("task", 2), result("task", 0)]
    comparison = compared([*results[:4]], failed={"task@0": "it broke"})
    assert comparison.strategies[1].seeds == [1]
    assert "task: seeds 1 only." in printed(comparison)
    assert "Failed: task@0: it broke" in printed(comparison)
    assert compared(results).strategies[1].seeds == [0, 1]  # whose weights differ


def test_runs_that_cannot_be_paired_are_an_error():
    with pytest.raises(ValueError, match=r"none@0 and task@0 have different initial weights.*Name another output_dir"):
        compared([result("none", 0), result("task", 0, weights="other")])
    with pytest.raises(ValueError, match=r"'none'.*task@0: it broke"):
        compared([result("task", 1)], failed={"task@0": "it broke"})


def test_runs_on_different_processors_are_named():
    one, other = result("none", 0), result("task", 0, processor="another CPU")
    said = "made on different processors. one CPU: none@0; another CPU: task@0."
    assert said in printed(compared([one, other])) and said in render(compared([one, other]))
    assert "processors" not in printed(compared([one, result("task", 0)]))


def test_scores_of_the_harness_have_an_interval():
    few, many = np.arange(ROWS) % 3 == 0, np.arange(ROWS) % 3 > 0
    results = [
        result(name, seed, scores={"gsm8k exact_match": exact.astype(float)})
        for seed in range(3)
        for name, exact in (("none", few), ("task", many), ("length:num_groups=2", few))
    ]
    comparison = compared(results)
    assert comparison.strategies[1].scores["gsm8k exact_match"].value == pytest.approx(2 / 3)
    _, better, _, same = verdicts(comparison)
    assert better.startswith("task: higher gsm8k exact_match than none, +0.333")
    assert same == "length:num_groups=2: the same gsm8k exact_match as none on every example."
    assert "+0.333" in printed(comparison) and "+0.333" in render(comparison)


def test_tables_fit_80_columns():
    tables = printed(made(task=0, **{"length:num_groups=2": 0})).split("task: the same")[0].splitlines()
    assert len(tables) > 20 and max(map(len, tables)) <= 80


def test_hostile_text_is_sanitized():
    results = [result("none", 0), result("task", 0, groups=list(HOSTILE.values())[:2])]
    comparison = compared(results, failed={"task@1": " ".join(HOSTILE.values())})
    page = render(comparison)
    assert SHOWN_SCRIPT not in page and "\x1b" not in printed(comparison) + page
    assert len(re.findall("<script[ >]", page)) == 3  # chart data, plotly, drawing code


def test_runs_are_ordered_by_seed():
    names = [run.name for run in runs_of(list(STRATEGIES.values()), 5, 2)]
    assert names == [f"{strategy}@{seed}" for seed in (5, 6) for strategy in STRATEGIES]
