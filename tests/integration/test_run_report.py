"""A training run writes an epoch summary to the log and `groups.json`, a report, and a section of the model card."""

import json
import logging
import re
from collections import Counter

import pytest
from helpers.toys import id_rows, plan_of
from helpers.trainers import make_trainer
from transformers import TrainerCallback
from transformers.utils import logging as verbosity

from commonit_trl import load_grouper
from commonit_trl.grouping.dropped import DroppedRows
from commonit_trl.report import epoch_summary, model_card_section, summary_table

SIZES = [13, 9, 1]
EVIL = '<script>document.title="ran"</script>|`[x](javascript:1)`'


def expected_groups(rows, **geometry):
    """The same numbers, counted over the batches of the plan that anyone can compute."""
    plan = plan_of(rows, seed=7, **geometry)
    seen = Counter(row for batch in plan.batches(0) for row in batch)
    tasks = rows["task"]
    steps = Counter(tasks[batch[0]] for batch in plan.batches(0))
    return {
        name: {
            "samples": tasks.count(name),
            "steps": steps[name] / geometry.get("accumulation_steps", 1),
            "left_out": sum(tasks[row] == name and row not in seen for row in range(len(tasks))),
            "repeated": sum(count - 1 for row, count in seen.items() if tasks[row] == name),
            "dropped": 0,
        }
        for name in sorted(set(tasks))
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory, rows = tmp_path_factory.mktemp("report"), id_rows(SIZES)
    trainer = make_trainer(
        directory, rows, commonit_report=True, gradient_accumulation_steps=3, save_strategy="epoch", num_train_epochs=2
    )
    before = []
    report = directory / "out" / "commonit" / "report.html"

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not before:
                before.append(report.read_text(encoding="utf-8"))

    trainer.add_callback(Watch())
    trainer.train()
    return directory / "out", rows, trainer, before[0], report.read_text(encoding="utf-8")


def test_the_epoch_summary_in_groups_json_is_that_of_the_batches(run):
    out, rows, trainer, *_ = run
    checkpoint = f"checkpoint-{trainer.state.global_step}"
    for directory in (out / "commonit", out / checkpoint / "commonit"):
        entry = json.loads((directory / "groups.json").read_text(encoding="utf-8"))["epoch_summary"]
        groups = {group.pop("name"): group for group in entry.pop("groups")}
        assert groups == expected_groups(rows, accumulation_steps=3)
        assert entry == {
            "samples": sum(SIZES),
            "steps": trainer.state.global_step / 2,
            "pure_steps": trainer.state.global_step / 2,
            "mixed_samples": 0,
            "baseline_steps": -(-sum(SIZES) // 6),
            "left_out": 0,
            "repeated": 2,
            "dropped": {"rows": 0, "by_reason": {}, "by_group": {}},
        }
        assert load_grouper(directory).names == ["g000", "g001", "g002"]


def test_the_log_has_the_summary_once_and_repeats_are_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="commonit_trl"):
        make_trainer(tmp_path, id_rows(SIZES), gradient_accumulation_steps=3)
    (table,) = [record for record in caplog.records if "steps per epoch" in record.getMessage()]
    assert table.levelno == logging.INFO
    lines = table.getMessage().splitlines()
    assert re.split("  +", lines[1]) == ["group", "samples", "steps", "left out", "repeated", "dropped"]
    assert [line.split() for line in lines[2:]] == [
        ["g000", "13", "3", "0", "0", "0"],
        ["g001", "9", "2", "0", "0", "0"],
        ["g002", "1", "1", "0", "2", "0"],
    ]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "repeats 2 of 23 samples" in warning and "'g002'" in warning


@pytest.mark.parametrize(
    "options, level, shown",
    [
        ({"disable_tqdm": False}, logging.WARNING, True),
        ({"disable_tqdm": False}, logging.INFO, False),  # the log has it
        ({"disable_tqdm": True}, logging.WARNING, False),
        ({"disable_tqdm": False, "log_level": "error"}, logging.WARNING, False),
        ({"disable_tqdm": False}, logging.ERROR, False),
    ],
)
def test_the_epoch_summary_is_printed_once_unless_it_is_logged_or_silenced(
    options, level, shown, tmp_path, caplog, capsys
):
    with caplog.at_level(level, logger="commonit_trl"):
        trainer = make_trainer(tmp_path, id_rows(SIZES), max_steps=1, **options)
        trainer.train()
    verbosity.set_verbosity_warning()  # `log_level` sets it for the process
    printed = capsys.readouterr().out
    assert printed.count("steps per epoch") == shown
    logged = [record for record in caplog.records if "steps per epoch" in record.getMessage()]
    assert len(logged) == (level == logging.INFO)
    if shown:
        assert re.search(r"^g002 +1 +1 +0 +0 +0$", printed, re.MULTILINE), printed


def test_the_report_is_there_before_the_first_step_and_gets_the_logged_losses(run):
    *_, trainer, before, after = run
    charts = [json.loads(re.search(r'id="charts"[^>]*>(.*?)</script>', text, re.S)[1]) for text in (before, after)]
    assert all(name in text for name in ("g000", "g001", "g002") for text in (before, after))
    assert len(charts[1]) == len(charts[0]) + 1
    logged = {
        (entry["step"], name.removeprefix("loss_")): value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.startswith("loss_")
    }
    *_, losses = charts[1].values()
    drawn = {(step, line["name"]): loss for line in losses["data"] for step, loss in zip(line["x"], line["y"])}
    assert drawn == pytest.approx(logged, rel=1e-3)


def test_the_model_card_says_what_was_trained_once(run):
    out, *_ = run
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.count("## CommonIT") == 1 and "commonit\\_metric=task" not in card and "`commonit_metric=task`" in card
    assert "| g000 | 13 | 3 |" in card and "@inproceedings{rao-etal-2024-commonit" in card


def test_no_report_where_it_is_switched_off(tmp_path):
    trainer = make_trainer(tmp_path, id_rows(SIZES), max_steps=1)
    trainer.train()
    assert sorted(file.name for file in (tmp_path / "out" / "commonit").iterdir()) == ["groups.json", "run.json"]


def test_packed_runs_have_a_report_of_rows_and_packs(tmp_path):
    options = {"packing": True, "max_length": 24, "commonit_report": True, "max_steps": 2}
    make_trainer(tmp_path, id_rows(SIZES), **options).train()
    assert "g002" in (tmp_path / "out" / "commonit" / "report.html").read_text(encoding="utf-8")


def test_many_groups_are_summed_up():
    rows = id_rows([1] * 25)
    lines = summary_table(epoch_summary(plan_of(rows), [f"g{number}" for number in range(25)])).splitlines()
    assert len(lines) == 22 and lines[-1].split() == ["5", "smaller", "groups", "5", "5", "0", "0", "0"]


def test_dropped_rows_are_in_epoch_summary_table_and_model_card():
    """A group whose rows are all dropped has a line, and the lines add up to the dropped rows."""
    dropped = DroppedRows(counts={("too long", "g1"): 2, ("too long", EVIL): 5, ("empty", "g1"): 1})
    entry = epoch_summary(plan_of(id_rows([3, 2])), ["g0", "g1"], dropped)
    assert entry["dropped"] == dropped.to_json() and entry["dropped"]["rows"] == 8
    counts = {group["name"]: (group["samples"], group["dropped"]) for group in entry["groups"]}
    assert counts == {"g0": (3, 0), "g1": (2, 3), EVIL: (0, 5)}
    table, card = summary_table(entry).splitlines(), model_card_section(entry, {"commonit_metric": "task"})
    assert [line.split()[-1] for line in table[1:]] == ["0", "3", "5"]
    assert "| g1 | 2 | 1 | 3 |" in card and "too long: 7" in card and "empty: 1" in card and "<script>" not in card
