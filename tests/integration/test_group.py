"""`commonit group` saves groups and assignments and assigns new rows; training then loads the groups."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from helpers.trainers import SFT_FLAGS, rows_of_task, write_jsonl

from commonit_trl import load_grouper
from commonit_trl.cli import main as cli
from commonit_trl.cli.group import FITTED_WITH
from commonit_trl.config import READ_BY

TASKS = ("add", "sort", "spell")

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def data(tmp_path):
    """24 rows of three tasks."""
    return write_jsonl(tmp_path / "data.jsonl", [row for task in TASKS for row in rows_of_task(task, 8)])


def group(*argv):
    return cli.main(["group", *map(str, argv)])


def assignment(directory):
    """The group ids of `assignment.parquet`, whose rows are those of the source, in order."""
    table = pq.read_table(Path(directory) / "assignment.parquet")
    assert table.column_names == ["row", "group", "name", "dropped"]
    assert table["row"].to_pylist() == list(range(len(table)))
    return table["group"].to_pylist()


@pytest.mark.parametrize(
    ("metric", "packing"), [("task", "bfd"), ("length", None), ("length", "wrapped"), ("embedding", None)]
)
def test_training_loads_saved_groups(metric, packing, model, data, minilm, tmp_path, capfd):
    recipe = {
        "commonit_metric": metric,
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": "out",
        **SFT_FLAGS,
        "max_steps": 1,
        "max_length": 40,
        "packing": packing is not None,
        "packing_strategy": packing or "bfd",
    }
    if metric == "embedding":
        recipe |= {"commonit_embedding_model": minilm, "commonit_num_groups": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    assert group("--config", "run.yaml", "--output", "saved") == 0
    out, err = capfd.readouterr()
    assert "Loaded groups from" not in err and "Saved in saved." in out
    assert not Path("out").exists()

    assert cli.main(["sft", "--config", "run.yaml"]) == 0
    assert "Loaded groups from" in capfd.readouterr().err
    assert load_grouper("saved").description() == load_grouper("out/commonit").description()


def test_assignment_of_every_row(data, capsys):
    assert group(data, "--commonit_metric", "task", "--output", "saved") == 0
    assert assignment("saved") == [0] * 8 + [1] * 8 + [2] * 8
    assert load_grouper("saved").names == list(TASKS)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "8" in line] == [[t, "8"] for t in TASKS]


LONG = "x" * 60


def long_rows(tmp_path):
    """Rows of three tasks, in turn; the prompts of every 4th row and of a whole task do not fit in 40 tokens."""
    rows = [row for rows in zip(*(rows_of_task(task, 16) for task in TASKS), strict=True) for row in rows]
    rows = [row | {"prompt": LONG} if n % 4 == 0 or row["task"] == "spell" else row for n, row in enumerate(rows)]
    return write_jsonl(tmp_path / "long.jsonl", rows), rows


@pytest.mark.parametrize(("metric", "shuffle"), [("task", False), ("length", True)])
def test_the_assignment_has_every_source_row_also_the_dropped_ones(metric, shuffle, model, tmp_path, capsys):
    """I2: each source row has a group or the reason why it is dropped."""
    data, rows = long_rows(tmp_path)
    options = ("--tokenizer", model, "--max_length", 40, "--shuffle_dataset", str(shuffle).lower())
    assert group(data, "--commonit_metric", metric, *options, "--output", "saved") == 0
    out = capsys.readouterr().out
    table = pq.read_table("saved/assignment.parquet")
    long = [row["prompt"] == LONG for row in rows]
    assert table["row"].to_pylist() == list(range(48))
    assert [reason is not None for reason in table["dropped"].to_pylist()] == long
    (reason,) = set(table["dropped"].to_pylist()) - {None}
    assert "no token to train on" in reason and "max_length=40" in reason
    names = load_grouper("saved").names
    for row, number, name, dropped in zip(rows, table["group"], table["name"], long, strict=True):
        number, name = number.as_py(), name.as_py()
        assert (number is None) == (name is None) == dropped
        if not dropped:
            assert names[number] == name
            assert metric != "task" or name == row["task"]
    assert f"{sum(long)} rows" in out and "max_length=40" in out
    if metric == "task":
        assert names == ["add", "sort"] and "16 of spell" in out


def test_new_rows_join_fitted_groups(data, model, tmp_path, capfd):
    options = ["--commonit_num_groups", 3, "--tokenizer", model, "--output", "a"]
    assert group(data, "--commonit_metric", "length", *options) == 0
    new = write_jsonl(tmp_path / "new.jsonl", rows_of_task("walk", 10))
    assert group(new, "--load", "a", "--tokenizer", model, "--output", "b") == 0
    assert load_grouper("a").description() == load_grouper("b").description()
    edges = load_grouper("b").edges
    lengths = [len(row["completion"]) + 1 for row in rows_of_task("walk", 10)]  # and the end of the text
    assert assignment("b") == [sum(edge <= length for edge in edges) for length in lengths]

    assert group(data, "--commonit_metric", "task", "--output", "c") == 0
    new = write_jsonl(tmp_path / "more.jsonl", [*rows_of_task("walk", 2), *rows_of_task("sort", 2)])
    capfd.readouterr()
    assert group(new, "--load", "c", "--output", "d") == 0
    out, err = capfd.readouterr()
    assert assignment("d") == [None, None, 1, 1]
    table = pq.read_table("d/assignment.parquet")
    assert table["name"].to_pylist() == [None, None, "sort", "sort"] and table["dropped"].null_count == 4
    assert "2 of 4 rows are unassigned" in err and "2 rows are unassigned." in out


def test_loaded_groups_take_the_options_they_were_fitted_with(data):
    fitted = ["--commonit_task_column", "task", "--commonit_min_group_size", 2]
    assert group(data, "--commonit_metric", "task", *fitted, "--output", "saved") == 0
    assert group(data, "--commonit_metric", "task", *fitted, "--load", "saved", "--output", "again") == 0


def test_every_option_that_fits_groups_is_compared():
    assert set(FITTED_WITH) == {*READ_BY, "commonit_min_group_size"}
