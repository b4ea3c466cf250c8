"""Task labels through Axolotl's data preparation.

Every prepared row has the label of its raw row, whose number it contains as `#12#`, and the rows are those that Axolotl
prepares without the plugin, in the same order.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from helpers.axolotl_recipes import PLUGIN, recipe, write_recipe, write_rows
from helpers.axolotl_recorder import MARK
from helpers.toys import tiny_tokenizer

from axolotl_plugin.labels import carried_columns, try_load_from_hub

TOKENIZER = tiny_tokenizer()
SUFFIX = "-commonit-task"
Entries = list[dict[str, Any]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels")


def prepare(
    directory: Path, entries: Entries, metric: str | None = "task", training: bool = True, **keys: Any
) -> tuple[Any, Any]:
    """Return the training and evaluation rows of `axolotl train`; without `training`, those of `axolotl evaluate`."""
    keys = {"plugins": [PLUGIN] if metric else None, "commonit_metric": metric, **keys}
    path = write_recipe(directory / "recipe.yml", recipe(directory, entries, **keys))
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    cfg = load_cfg(str(path))
    if cfg.plugins and training:
        assert manager.load_datasets(cfg) is None
    loaded = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    return loaded.train_dataset, loaded.eval_dataset


def tokens(dataset: Dataset) -> list[tuple[list[int], ...]]:
    names = [name for name in ("input_ids", "attention_mask", "labels", "position_ids") if name in dataset.column_names]
    return list(zip(*(dataset[name] for name in names), strict=True))


def number_of(row: list[int]) -> int:
    (number,) = {int(number) for number in MARK.findall(TOKENIZER.decode(row))}
    return number


@pytest.fixture
def axolotl_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Catch the messages of the loggers that Axolotl configures not to propagate."""
    for name in ("axolotl", "axolotl_plugin"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


def warnings_of(log: pytest.LogCaptureFixture, start: str) -> list[str]:
    messages = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    return [message for message in messages if message.startswith(start)]


def labels_of(dataset: Dataset) -> list[tuple[int, str]]:
    """(number of the raw row, label) of each row."""
    (column,) = carried_columns(dataset)
    return list(zip(map(number_of, dataset["input_ids"]), dataset[column], strict=True))


def assert_labelled(
    directory: Path, entries: Entries, label: Callable[[int], str], **keys: Any
) -> tuple[Dataset, Dataset | None]:
    """Prepare with the labels and without the plugin, compare, and return the rows with labels.

    `folder` and `plain_folder` separate recipes that Axolotl's cache does not distinguish.
    """
    ours = {name: keys.pop(name) for name in list(keys) if name.startswith("commonit")}
    folder = str(directory / keys.pop("folder", "prepared"))
    plain_folder = str(directory / keys.pop("plain_folder", "plain"))
    plain = prepare(directory, entries, metric=None, dataset_prepared_path=plain_folder, **keys)
    labelled = prepare(directory, entries, dataset_prepared_path=folder, **ours, **keys)
    for with_labels, without in zip(labelled, plain, strict=True):
        assert (with_labels is None) == (without is None)
        if with_labels is not None:
            assert len(with_labels)
            assert tokens(with_labels) == tokens(without)
            for number, found in labels_of(with_labels):
                assert found == label(number), number
    return labelled


def write(directory: Path, name: str, rows: Entries) -> str:
    return str(write_rows(directory / name, rows))


# --- dataset types ----------------------------------------------------------------------------------------------------

TOPICS = ["maths", "code", "chat"]


def topic_of(number: int) -> str:
    return TOPICS[number % len(TOPICS)]


def rows_of(number: int, kind: str) -> dict[str, Any]:
    """Return the raw row of this number for the dataset type `kind`; test_axolotl_platform.py covers other types."""
    mark, answer = f"#{number}#", "a" * (1 + number % 7)
    turn = [{"role": "user", "content": mark}, {"role": "assistant", "content": answer}]
    body = {
        "alpaca": lambda: {"instruction": mark, "input": "", "output": answer},
        "chat": lambda: {"messages": turn * (1 + number % 2)},
        "text": lambda: {"text": mark * (60 * (number % 4) + 1)},  # up to 4 rows of 256 tokens
        "tokens": lambda: tokenized(f"{mark}{answer}", masked=len(mark)),
    }[kind]()
    return {**body, "topic": topic_of(number), "level": number % 2}


def tokenized(text: str, masked: int) -> dict[str, list[int]]:
    ids = TOKENIZER(text)["input_ids"]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * masked + ids[masked:]}


TYPES: dict[str, Any] = {
    "alpaca": "alpaca",
    "chat": "chat_template",
    "text": "completion",
    "tokens": None,
}


def entries_of_all_types(directory: Path) -> Entries:
    entries = []
    for place, (kind, type_) in enumerate(TYPES.items()):
        rows = [rows_of(number, kind) for number in range(100 * place, 100 * place + 12)]
        if kind == "tokens":
            path = str(directory / kind)
            types = {"input_ids": Value("int32"), "attention_mask": Value("int8"), "labels": Value("int64")}
            features = Features({name: List(value) for name, value in types.items()}, topic=Value("string"))
            Dataset.from_list([{name: row[name] for name in features} for row in rows], features).save_to_disk(path)
        else:
            path = write(directory, f"{kind}.jsonl", rows)
        entry = {"path": path, "type": type_}
        if kind == "chat":
            entry |= {"chat_template": "tokenizer_default", "roles_to_train": ["assistant"]}
        entries.append({name: value for name, value in entry.items() if value is not None})
    return entries


@pytest.mark.parametrize("processes", [1, 2])
def test_every_type_carries_the_column(directory: Path, processes: int) -> None:
    entries = entries_of_all_types(directory)
    keys = {"sequence_len": 256, "dataset_num_proc": processes, "folder": f"{processes} processes"}
    rows, _ = assert_labelled(directory, entries, topic_of, commonit_task_column="topic", **keys)
    numbers = [number for number, _ in labels_of(rows)]
    expected = {number for place in range(len(TYPES)) for number in range(100 * place, 100 * place + 12)}
    assert set(numbers) == expected
    assert max(map(numbers.count, range(200, 212))) == 4, "long texts were not split"
    assert carried_columns(rows) == ["commonit_task[topic]"]
    assert "topic" not in rows.column_names, "packing reads all columns of tokenised rows as numbers"


def test_every_type_is_a_task_by_its_entry(directory: Path) -> None:
    entries = entries_of_all_types(directory)
    kinds = list(TYPES)
    rows, _ = assert_labelled(directory, entries, lambda number: kinds[number // 100], sequence_len=256)
    assert carried_columns(rows) == ["commonit_task[datasets]"]


def test_label_values_become_text(directory: Path) -> None:
    """A row without a label has an empty one."""
    given: dict[str, list[Any]] = {
        "text": ["maths", None, "", "  ", " code "],
        "numbers": [3, 0, None, -1, 10],
        "truth": [True, False, None, True, True],
    }
    expected = ["maths", "", "", "", "code", "3", "0", "", "-1", "10", "True", "False", "", "True", "True"]
    entries = []
    for place, (name, values) in enumerate(given.items()):
        rows = [{"instruction": f"#{5 * place + n}#", "output": "a", "kind": kind} for n, kind in enumerate(values)]
        entries.append({"path": write(directory, f"kind-{name}.jsonl", rows), "type": "alpaca"})
    classes = Features(instruction=Value("string"), output=Value("string"), kind=ClassLabel(names=["easy", "hard"]))
    columns = {"instruction": [f"#{15 + n}#" for n in range(3)], "output": ["a"] * 3, "kind": [0, 1, -1]}
    Dataset.from_dict(columns, features=classes).save_to_disk(directory / "classes")
    expected += ["easy", "hard", ""]
    entries.append({"path": str(directory / "classes"), "type": "alpaca"})
    rows, _ = assert_labelled(directory, entries, lambda number: expected[number], commonit_task_column="kind")
    assert len(rows) == len(expected)


# --- entries as tasks -------------------------------------------------------------------------------------------------


def test_entries_of_one_path_are_different_tasks(directory: Path) -> None:
    """They differ in split, name or type; the shards of an entry are one task."""
    halves = {"easy": range(0, 10), "hard": range(10, 20)}
    splits = {name: Dataset.from_list([rows_of(n, "alpaca") for n in numbers]) for name, numbers in halves.items()}
    DatasetDict(splits).save_to_disk(directory / "splits")
    named = directory / "named"
    configs = []
    for place, name in enumerate(["algebra", "geometry"]):
        write(named, f"{name}.jsonl", [rows_of(n, "alpaca") for n in range(20 + 10 * place, 30 + 10 * place)])
        configs.append({"config_name": name, "data_files": f"{name}.jsonl"})
    (named / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", encoding="utf-8")
    both = [{**rows_of(n, "alpaca"), "text": f"#{n + 100}#"} for n in range(40, 50)]
    twice = write(directory, "twice.jsonl", both)
    sharded = write(directory, "sharded.jsonl", [rows_of(n, "alpaca") for n in range(50, 60)])
    half = write(directory, "half.jsonl", [rows_of(n, "alpaca") for n in range(60, 70)])
    entries = [
        {"path": str(directory / "splits"), "split": "easy", "type": "alpaca"},
        {"path": str(directory / "splits"), "split": "hard", "type": "alpaca"},
        {"path": str(named), "name": "algebra", "split": "train", "type": "alpaca"},
        {"path": str(named), "name": "geometry", "split": "train", "type": "alpaca"},
        {"path": twice, "type": "alpaca"},
        {"path": twice, "type": "completion"},
        {"path": sharded, "preprocess_shards": 3, "type": "alpaca"},
        {"path": half, "shards": 2, "type": "alpaca"},
    ]
    split = str(directory / "splits")
    labels = [split, f"{split} (2)", "named/algebra", "named/geometry", twice, "sharded", "half", *[None] * 7]
    rows, _ = assert_labelled(
        directory, entries, lambda number: f"{twice} (2)" if number >= 100 else str(labels[number // 10])
    )
    assert len(rows) == 75


def test_the_labels_of_one_entry_come_from_columns(directory: Path) -> None:
    """By default from the first of `DEFAULT_TASK_COLUMNS`; several columns are joined."""
    rows = [{**rows_of(n, "alpaca"), "category": topic_of(n), "source": "one source"} for n in range(12)]
    entry = {"path": write(directory, "default.jsonl", rows), "type": "alpaca", "preprocess_shards": 2}
    prepared, _ = assert_labelled(directory, [entry], topic_of)
    assert carried_columns(prepared) == ["commonit_task[default]"]
    prepared, _ = assert_labelled(
        directory,
        [entry],
        lambda number: f"{topic_of(number)} / {number % 2}",
        commonit_task_column=["topic", "level"],
        training=False,
        folder="joined",
    )
    assert carried_columns(prepared) == ["commonit_task[topic+level]"]


# --- shuffling, splits, shards, packing ------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "in order": {"shuffle_merged_datasets": False, "excess_length_strategy": "truncate", "dataset_num_proc": 2},
    "shuffled": {"shuffle_before_merging_datasets": True, "val_set_size": 0.25},
    "a shard": {"dataset_shard_num": 2, "dataset_shard_idx": 1},
    "packed": {"sample_packing": True, "sample_packing_eff_est": 0.9, "val_set_size": 9, "eval_sample_packing": False},
}


def long_and_short(directory: Path) -> tuple[Entries, Callable[[int], str]]:
    """Two entries, each with rows that are too long for 256 tokens."""
    entries = []
    for place, name in enumerate(["left", "right"]):
        rows = [rows_of(number, "alpaca") for number in range(30 * place, 30 * place + 30)]
        for row in rows[::5]:
            row["output"] = "b" * 200
        entries.append({"path": write(directory, f"{name}.jsonl", rows), "type": "alpaca"})
    return entries, lambda number: "left" if number < 30 else "right"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_labels_stay_with_their_rows(directory: Path, variant: str) -> None:
    entries, label = long_and_short(directory)
    keys = {"sequence_len": 256, **VARIANTS[variant], "folder": variant, "plain_folder": f"{variant}, plain"}
    rows, evaluation = assert_labelled(directory, entries, label, **keys)
    numbers = [number for number, _ in labels_of(rows)]
    in_all = numbers + ([] if evaluation is None else [number for number, _ in labels_of(evaluation)])
    expected = {"in order": 60, "a shard": 24}.get(variant, 48)  # of 60 rows, 12 are too long
    assert len(in_all) == len(set(in_all)) == expected
    assert (numbers == sorted(numbers)) == (variant == "in order")
    assert (evaluation is not None) == ("val_set_size" in keys)
    assert ("position_ids" in rows.column_names) == (variant == "packed")


@pytest.mark.parametrize("tokenised", [False, True])
def test_a_test_set_without_the_label_column_has_no_labels(
    directory: Path, tokenised: bool, axolotl_log: pytest.LogCaptureFixture
) -> None:
    """Training continues: only the evaluation losses by group need the labels."""
    train = [{"path": write(directory, "labelled.jsonl", [rows_of(n, "alpaca") for n in range(12)]), "type": "alpaca"}]
    if tokenised:
        test = {"path": str(directory / "unlabelled"), "split": "train"}
        rows = Dataset.from_list([tokenized(f"#{n}#aa", masked=4) for n in range(20, 26)])
        rows.save_to_disk(test["path"])
    else:
        raw = [{"instruction": f"#{n}#", "output": "a"} for n in range(20, 26)]
        test = {"path": write(directory, "unlabelled.jsonl", raw), "type": "alpaca", "split": "train"}
    keys = {"test_datasets": [test], "dataset_prepared_path": str(directory / f"unlabelled-{tokenised}-prepared")}
    rows, evaluation = prepare(directory, train, commonit_task_column="topic", **keys)
    assert {label for _, label in labels_of(rows)} == {*TOPICS}
    assert sorted(labels_of(evaluation)) == [(number, "") for number in range(20, 26)]
    (warning,) = warnings_of(axolotl_log, "test_datasets: ")
    assert f"path={test['path']!r}" in warning and "commonit_task_column='topic'" in warning
    assert "\n" not in warning and "give the test set the columns" in warning


def test_test_sets_with_other_names_cause_a_warning(directory: Path, axolotl_log: pytest.LogCaptureFixture) -> None:
    entries, label = long_and_short(directory)
    tests = [{**entry, "split": "train"} for entry in entries]
    keys = {"test_datasets": tests, "folder": "same-names", "plain_folder": "same-names-plain"}
    _, evaluation = assert_labelled(directory, entries, label, **keys)
    assert len(evaluation) == 60 and not warnings_of(axolotl_log, "test_datasets: ")
    renamed = write(directory, "left-heldout.jsonl", [rows_of(number, "alpaca") for number in range(70, 76)])
    tests[0] = {**tests[0], "path": renamed}
    keys = {"test_datasets": tests, "dataset_prepared_path": str(directory / "other-names")}
    _, evaluation = prepare(directory, entries, **keys)
    assert {name for _, name in labels_of(evaluation)} == {"left-heldout", "right"}
    (warning,) = warnings_of(axolotl_log, "test_datasets: ")
    assert "'left-heldout'" in warning and "('left', 'right')" in warning and "commonit_task_column" in warning


@pytest.mark.parametrize("validation", [0, 6])
def test_equal_rows_are_dropped_as_without_labels(directory: Path, validation: int) -> None:
    """Axolotl ignores tasks: the first of equal rows stays, with its task."""
    once = [rows_of(number, "alpaca") for number in range(12)]
    entries = [
        {"path": write(directory, f"equal-{name}.jsonl", rows), "type": "alpaca"}
        for name, rows in {"first": once[:8], "second": once[4:] + once[10:]}.items()
    ]
    keys = {"dataset_exact_deduplication": True, "val_set_size": validation, "shuffle_merged_datasets": False}
    rows, evaluation = assert_labelled(
        directory, entries, lambda number: "equal-first" if number < 8 else "equal-second", **keys
    )
    found = labels_of(rows) + (labels_of(evaluation) if evaluation else [])
    assert sorted(number for number, _ in found) == list(range(12))


# --- prepared data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(directory: Path, request: pytest.FixtureRequest) -> tuple[Entries, dict[str, Any]]:
    """Return an entry and the folder of its prepared rows."""
    rows = [rows_of(number, "alpaca") for number in range(12)]
    entry = {"path": write(directory, "prepared.jsonl", rows), "type": "alpaca"}
    return [entry], {"dataset_prepared_path": str(directory / f"of-{request.node.name}")}


def folders(keys: dict[str, Any]) -> set[str]:
    return {path.name for path in Path(keys["dataset_prepared_path"]).iterdir() if path.is_dir()}


def test_rows_with_labels_are_kept_apart(directory: Path, prepared: Any) -> None:
    """A recipe with the metric `task` and one without it do not read each other's rows."""
    entries, keys = prepared
    labelled, _ = prepare(directory, entries, commonit_task_column="topic", **keys)
    (folder,) = folders(keys)
    assert folder.endswith(SUFFIX)
    again, _ = prepare(directory, entries, commonit_task_column="topic", **keys)
    assert again["commonit_task[topic]"] == labelled["commonit_task[topic]"]
    assert folders(keys) == {folder}, "prepared twice"
    for metric in (None, "none", "length"):
        rows, _ = prepare(directory, entries, metric=metric, **keys)
        assert carried_columns(rows) == []
        assert tokens(rows) == tokens(labelled)
    assert folders(keys) == {folder, folder.removesuffix(SUFFIX)}


def test_rows_from_the_hub_are_checked(directory: Path, prepared: Any) -> None:
    entries, keys = prepared
    labelled, _ = prepare(directory, entries, commonit_task_column="topic", **keys)
    (folder,) = folders(keys)
    hub = directory / "hub"
    labelled.to_parquet(hub / "rows.parquet")
    config = {"configs": [{"config_name": folder, "data_files": "rows.parquet"}]}
    (hub / "README.md").write_text(f"---\n{json.dumps(config)}\n---\n", encoding="utf-8")
    keys = {"dataset_prepared_path": str(directory / "empty"), "push_dataset_to_hub": str(hub)}
    keys["hf_use_auth_token"] = True
    again, _ = prepare(directory, entries, commonit_task_column="topic", **keys)
    assert labels_of(again) == labels_of(labelled)
    with pytest.raises(ValueError, match=r"made with commonit_task\[topic\]:") as error:
        prepare(directory, entries, commonit_task_column="level", **keys)
    assert str(hub) in str(error.value)
    cfg = load_cfg(str(directory / "recipe.yml"))
    cfg.is_preprocess = True
    assert try_load_from_hub(cfg, folder, "train") is None, "the fix would fail too"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_label_column_is_an_error_that_names_the_entry(directory: Path) -> None:
    rows = [rows_of(number, "alpaca") for number in range(4)]
    with_topic = write(directory, "with.jsonl", rows)
    without = write(directory, "without.jsonl", [{"topics": row.pop("topic"), **row} for row in rows])
    entries = [{"path": path, "type": "alpaca"} for path in (with_topic, without)]
    with pytest.raises(ValueError) as error:
        prepare(directory, entries, commonit_task_column="topic")
    line = str(error.value)
    assert line.startswith(f"datasets: path={without!r}: commonit_task_column='topic': not a column"), line
    assert "topics" in line and "\n" not in line
    with pytest.raises(ValueError, match=r"commonit_metric='task': .*task, task_name") as error:
        prepare(directory, entries[1:])
    assert str(error.value).startswith(f"datasets: path={without!r}: ")


def test_generated_rows_need_an_entry_for_each_task(directory: Path) -> None:
    made = {"path": "synthetic", "type": "_synthetic", "length": 6, "sequence_length": 16, "max_input_id": 200}
    with pytest.raises(ValueError, match="commonit_metric='task': "):
        prepare(directory, [made])
    path = write(directory, "beside.jsonl", [rows_of(number, "alpaca") for number in range(4)])
    rows, _ = prepare(directory, [made, {"path": path, "type": "alpaca"}])
    assert sorted(rows["commonit_task[datasets]"]) == ["beside"] * 4 + ["synthetic"] * 6
