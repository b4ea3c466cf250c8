"""Shared parts of the benchmarks: skipped cases have a reason, rounds are paired, reports are reproducible."""

import json

import pytest

from benchmarks import __main__ as entry
from benchmarks.common import RESULTS, Cases, Report, Table, medians, paired_rounds, write_report
from benchmarks.study import near_zero


def test_skipped_cases_have_a_reason():
    cases = Cases()
    for name, options in {
        "ours": {},
        "a peer": {"package": "numpy"},
        "absent": {"package": "no-such-package"},
        "slow": {"most": 1_000},
        "a sample": {"least": 2_000},
    }.items():
        cases(name, **options)(lambda name=name: name)
    functions, skipped = cases.present(1_001)
    assert {name: function() for name, function in functions.items()} == {"ours": "ours", "a peer": "a peer"}
    assert skipped == {
        "absent": "no-such-package is not installed",
        "slow": "too slow for more than 1,000",
        "a sample": "for 2,000 or more",
    }
    assert cases.present(1_000)[1].keys() == {"absent", "a sample"}
    assert cases.present()[1].keys() == {"absent"}


def test_rounds_rotate_their_first_case():
    ran = []

    def case(name):
        def run(number):
            ran.append((number, name))
            return {"seconds": 1.0}

        return run

    rounds = paired_rounds({name: case(name) for name in "abc"}, 4)
    assert [list(each) for each in rounds] == [list("abc")] * 4
    order = ["".join(name for number, name in ran if number == each) for each in range(4)]
    assert order == ["abc", "bca", "cab", "abc"]


def test_ratios_are_computed_within_a_round():
    """A round that runs ten times slower does not change the ratios."""
    rounds = [
        {"base": {"seconds": 1.0 * slow}, "ours": {"seconds": ratio * slow}}
        for slow, ratio in [(1, 2), (10, 3), (1, 4)]
    ]
    ours = medians(rounds, "seconds", "base")["ours"]
    assert (ours["ratio"], ours["ratio_low"], ours["ratio_high"], ours["seconds"]) == (3, 2, 4, 4)


def test_report_names_machine_versions_command_and_skipped_cases(tmp_path):
    table = Table(heading="Epochs", header=["", "s"], rows=[["ours", 1]], skipped={"theirs": "x is not installed"})
    report = Report(head={"data": "ten rows"}, parts=[table, "A note."], results={"ours": 1 / 3}, packages=["numpy"])
    path = write_report("speed", "Speed", "quick", "python -m benchmarks speed", report, tmp_path)
    text, content = path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    for part in ("- command: python -m benchmarks speed\n", "cores of an", "; Python 3.", "numpy ", "| ours | 1 |"):
        assert part in text
    assert "Not measured here: theirs (x is not installed)." in text and "A note." in text
    assert content["results"] == {"ours": 0.333333} and content["data"] == "ten rows"
    assert path.stem == f"speed-{content['date']}-quick"


def test_all_benchmarks_are_listed():
    folder = RESULTS.parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert set(entry.NAMES) == modules - {"__init__", "__main__", "common", "mixture"}


@pytest.mark.parametrize(("text", "value"), [("rows=1e5", 1e5), ("rows=[1, 2]", [1, 2]), ("model=tiny", "tiny")])
def test_parameters_are_json_or_text(text, value):
    assert entry.parameter(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize(
    "low, high, near",
    [
        (0.02, 0.12, True),
        (-0.01, 0.09, True),
        (-0.12, -0.02, True),
        (0.05, 0.15, False),  # clearly above zero
        (-0.05, 0.06, False),  # clearly around zero
        (None, None, False),  # too few seeds
    ],
)
def test_more_seeds_go_to_intervals_that_nearly_touch_zero(low, high, near):
    baseline = {"name": "none", "loss": {"difference": None}}
    result = {"name": "task", "loss": {"difference": {"value": 0.0, "low": low, "high": high}}}
    assert near_zero([baseline, result]) == ["task"] * near
