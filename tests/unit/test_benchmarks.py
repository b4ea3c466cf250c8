"""Shared parts of the benchmarks: skipped cases have a reason, rounds are paired, reports are reproducible."""

import json

import numpy as np
import pytest

from benchmarks import __main__ as entry
from benchmarks import dtype, study
from benchmarks.common import RESULTS, Cases, Report, Settings, Skipped, Table, medians, paired_rounds, write_report


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
    assert ["".join(name for number, name in ran if number == each) for each in range(4)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


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


def test_missing_real_data_skips_the_benchmark():
    settings = Settings(size="quick", given={}, folder=None, out=RESULTS)
    with pytest.raises(Skipped, match="COMMONIT_REAL_DATA"):
        _ = settings.data


def test_all_benchmarks_are_listed():
    folder = RESULTS.parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert set(entry.NAMES) == modules - {"__init__", "__main__", "common", "mixture"}


def test_moved_rows_change_their_nearest_centroid():
    centroids = np.eye(2, dtype=np.float32)
    exact = np.array([[0.9, 0.1], [0.51, 0.49], [0.2, 0.8]], dtype=np.float32)
    reduced = np.array([[0.8, 0.2], [0.49, 0.51], [0.1, 0.9]], dtype=np.float32)
    assert dtype.moved_rows(exact, reduced, centroids).tolist() == [False, True, False]
    assert dtype.margins(exact, centroids) == pytest.approx([0.8, 0.02, 0.6], abs=1e-6)


@pytest.mark.parametrize(("text", "value"), [("rows=1e5", 1e5), ("rows=[1, 2]", [1, 2]), ("model=tiny", "tiny")])
def test_parameters_are_json_or_text(text, value):
    assert entry.parameter(text) == (text.partition("=")[0], value)


def test_study_marks_intervals_without_zero(tmp_path):
    def strategy(name, difference):
        measure = {"value": 3.0, "difference": difference}
        numbers = {"steps": 10, "left_out": 0, "repeated": 1, "padding": 0.25, "tokens_per_second": 50.0}
        return {"name": name, "loss": measure, "accuracy": measure, **numbers}

    found = {"value": -0.2, "low": -0.3, "high": -0.1}
    not_found = {"value": -0.2, "low": -0.5, "high": 0.1}
    strategies = [strategy("none", None), strategy("task", found), strategy("length", not_found)]
    comparison = {"strategies": strategies, "rates": {1e-3: 3.0}, "rate": 1e-3, "failed": {"task@1": "it broke"}}
    settings = Settings(size="full", given=study.SIZES["full"], folder=None, out=tmp_path)
    comparison |= {"train_rows": 5, "held_out_rows": 6}
    report = study.report(settings, 1_000_000, {1: comparison}, {"base": 60.0})
    text = "\n".join(part if isinstance(part, str) else part.markdown() for part in report.parts)
    assert "| none | 10 | 3.0000 |  |  | 0 / 1 | 25% | 1.00 |" in text
    assert "| task | 10 | 3.0000 | **-0.2000 ± 0.1000** |" in text
    assert "| length | 10 | 3.0000 | -0.2000 ± 0.3000 |" in text
    assert "Failed: task@1 (it broke)" in text
