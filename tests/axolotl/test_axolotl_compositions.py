"""Compositions of an epoch with Axolotl, and carried columns, checked on the model's inputs and prepared rows.

1. Every trained row once per epoch; only pure steps of small groups repeat rows.
2. Pure steps, and packed bins in mixed steps too, hold one group; as many steps are pure as the composition promises.
3. The number of steps, the schedule's end and `commonit inspect --axolotl` agree with the plan.
4. Prepared rows have the label, number and vector of the raw row that they were made of.

The expected group of a row follows from its construction, not from the computed groups.
"""

import json
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.axolotl_recipes import launch, recipe, result, seen, write_recipe, write_rows
from helpers.toys import epochs_of, rows_in
from test_axolotl_inspect import commonit
from test_axolotl_labels import number_of, prepare, tokenized

from axolotl_plugin.dropped import dropped_rows
from axolotl_plugin.labels import carried_columns, with_source_names
from commonit_trl.rows import Rows

SIZES = {"a": 13, "b": 9, "c": 3}
BATCH_SIZE, ACCUMULATION, EPOCHS = 2, 2, 2
FORMAT = {"field_instruction": "instruction", "field_output": "output", "format": "{instruction}"}
PACKED = {"sample_packing": True, "multipack_real_batches": False}


def make_rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    tasks = [task for task, size in SIZES.items() for _ in range(size)]
    rng.shuffle(tasks)
    rows = []
    for number, task in enumerate(tasks):
        vector = [rng.gauss(0, 0.01) + (dimension == number % 3) for dimension in range(4)]
        rows.append(
            {
                "instruction": f"#{number}#",
                "output": "a" * rng.choice([5, 35]),
                "task": task,
                "difficulty": None if number == 7 else 0.5 * (number % 3),
                "vector": vector,
            }
        )
    return rows


ROWS = make_rows()
GROUPS: dict[str, list[Any]] = {
    "task": [row["task"] for row in ROWS],
    "column": [3 if row["difficulty"] is None else 2 * row["difficulty"] for row in ROWS],
    "embedding": [number % 3 for number in range(len(ROWS))],
    "task+length": [(row["task"], len(row["output"])) for row in ROWS],
}


@dataclass(frozen=True)
class Case:
    name: str
    keys: dict[str, Any] = field(hash=False)
    world_size: int = 1

    @property
    def metric(self) -> str:
        return self.keys["commonit_metric"]

    @property
    def groups(self) -> list[Any]:
        return GROUPS[self.metric]

    @property
    def mixes(self) -> bool:
        return self.keys.get("commonit_remainder") == "mix"

    @property
    def packed(self) -> bool:
        return "sample_packing" in self.keys

    @property
    def trained(self) -> list[int]:
        drops = self.keys.get("commonit_small_groups") == "drop"
        return [number for number in range(len(ROWS)) if not (drops and self.groups[number] == "c")]

    @property
    def capacity(self) -> int:
        return BATCH_SIZE * ACCUMULATION * self.world_size


MIX = {"commonit_metric": "task", "commonit_remainder": "mix"}
FRACTIONS = {**MIX, "commonit_pure_fraction": [1.0, 0.0], "commonit_heaviest_first": True}
ORDERED = {"commonit_metric": "column", "commonit_column": "difficulty", "commonit_num_groups": 3}
ORDERED |= {"commonit_order": "descending"}
JOINED = {"commonit_metric": "task+length", "commonit_length_edges": [20], "commonit_remainder": "mix"}
JOINED |= {"commonit_order": "pure_first"}
VECTORS = {"commonit_metric": "embedding", "commonit_embedding_column": "vector", "commonit_num_groups": 3}
SMALL = {"commonit_metric": "task", "commonit_min_group_size": 5, "commonit_small_groups": "drop"}
CASES = [
    Case("mix", MIX),
    Case("mix-packed", {**MIX, **PACKED}),
    Case("fractions", FRACTIONS),
    Case("fractions-packed", {**FRACTIONS, **PACKED}),
    Case("ordered", ORDERED),
    Case("ordered-packed", {**ORDERED, **PACKED}),
    Case("joined", JOINED),
    Case("joined-packed", {**JOINED, **PACKED}),
    Case("vectors", VECTORS),
    Case("vectors-packed", {**VECTORS, **PACKED}),
    Case("small", SMALL),
    Case("small-packed", {**SMALL, **PACKED}),
    Case("file", {"commonit_metric": "task", "commonit_task_file": "tasks.parquet"}),
]
TWO_RANKS = [
    Case("fractions-two-ranks", FRACTIONS, world_size=2),
    Case("mix-packed-two-ranks", {**MIX, **PACKED}, world_size=2),
]
ALL = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in TWO_RANKS)]


def name_of(case: Any) -> str:
    return case.name


def train(directory: Path, cases: list[Case]) -> Path:
    """Train `cases`, which have as many ranks, in one launch."""
    path = write_rows(directory / "rows.jsonl", ROWS)
    tests = write_rows(directory / "tests.jsonl", ROWS[:9])
    write_tasks(directory / "tasks.parquet", [row["task"] for row in ROWS])
    runs = []
    for case in cases:
        keys = {"gradient_accumulation_steps": ACCUMULATION, "num_epochs": EPOCHS, "sequence_len": 128, **case.keys}
        keys |= {"micro_batch_size": BATCH_SIZE, "output_dir": str(directory / f"{case.name}-out")}
        if case.name in ("ordered", "vectors"):
            keys |= {"test_datasets": [{"path": str(tests), "type": FORMAT, "split": "train"}], "evals_per_epoch": 1}
        if "commonit_task_file" in keys:
            keys["commonit_task_file"] = str(directory / keys["commonit_task_file"])
            keys["dataset_prepared_path"] = str(directory / "prepared-file")
        made = recipe(directory, [{"path": str(path), "type": FORMAT}], **keys)
        runs.append({"name": case.name, "recipe": str(write_recipe(directory / f"{case.name}.yml", made))})
    launch(runs, directory, cases[0].world_size)
    return directory


def write_tasks(path: Path, tasks: list[str]) -> str:
    order = np.random.default_rng(0).permutation(len(tasks))
    pq.write_table(pa.table({"row": order, "name": [tasks[row] for row in order]}), path)
    return str(path)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("compositions"), CASES)


@pytest.fixture(scope="module")
def two_ranks(one_rank: Path) -> Path:
    return train(one_rank, TWO_RANKS)  # from the rows that one rank prepared


@pytest.fixture
def record(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("one_rank" if case.world_size == 1 else "two_ranks") / case.name


@pytest.fixture
def epochs(case: Case, record: Path) -> list[list[list[list[list[int]]]]]:
    """Epoch -> step -> rank -> micro-batch -> row numbers."""
    return epochs_of(seen(record, case.world_size), EPOCHS)


def is_pure(case: Case, step: list[list[list[int]]]) -> bool:
    return len({case.groups[number] for number in rows_in([step])}) == 1


def full_steps(case: Case) -> int:
    return sum(size // case.capacity for size in Counter(case.groups).values())


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_each_trained_row_is_seen_once_per_epoch(case, epochs):
    for epoch in epochs:
        counts = Counter(rows_in(epoch))
        assert sorted(counts) == case.trained
        for group in set(case.groups):
            rows = [number for number in case.trained if case.groups[number] == group]
            repeats = sum(counts[number] for number in rows) - len(rows)
            assert repeats == 0 if case.mixes else repeats < case.world_size * ACCUMULATION


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_run_has_steps_of_plan(case, epochs, record):
    outcome = result(record)
    steps = sum(map(len, epochs))
    assert outcome["world_size"] == case.world_size
    assert outcome["global_step"] == outcome["max_steps"] == outcome["scheduler_steps"] == steps
    sizes = Counter(case.groups[number] for number in case.trained).values()
    expected = -(-len(case.trained) // case.capacity)
    if not case.mixes:
        expected = sum(-(-size // case.capacity) for size in sizes)
    assert len(epochs[0]) <= expected if case.packed else len(epochs[0]) == expected


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_pure_steps_are_as_many_as_promised(case, epochs):
    for number, epoch in enumerate(epochs):
        pure = [is_pure(case, step) for step in epoch]
        fraction = case.keys.get("commonit_pure_fraction", [1.0] * EPOCHS)[number]
        if not case.mixes:
            assert all(pure)
        elif not case.packed and fraction == 1:
            assert sum(pure) >= full_steps(case) > 0
        elif fraction == 0:
            assert sum(pure) < full_steps(case) or case.packed
            assert not all(pure)


@pytest.mark.parametrize("case", [case for case in CASES if case.packed] + ALL[-1:], ids=lambda case: case.name)
def test_bins_are_pure(case, epochs):
    micro_batches = [batch for epoch in epochs for step in epoch for rank in step for batch in rank]
    assert max(map(len, micro_batches)) > BATCH_SIZE, "nothing was packed"
    for micro_batch in micro_batches:  # of one bin
        assert len({case.groups[number] for number in micro_batch}) == 1


@pytest.mark.parametrize("case", [case for case in CASES if "commonit_order" in case.keys], ids=name_of)
def test_steps_are_in_order(case, epochs):
    for epoch in epochs:
        if case.keys["commonit_order"] == "descending":
            values = [max(case.groups[number] for number in rows_in([step])) for step in epoch]
            assert values == sorted(values, reverse=True)
        elif not case.packed:
            assert all(is_pure(case, step) for step in epoch[: full_steps(case)])
            assert not all(is_pure(case, step) for step in epoch)


@pytest.mark.parametrize("name", ["ordered", "vectors"])
def test_evaluation_has_loss_of_each_group(one_rank, name):
    names = {key for entry in result(one_rank / name)["log"] for key in entry}
    losses = {key for key in names if key.startswith("eval_") and key.endswith("_loss")} - {"eval_loss"}
    (metric,) = (case.metric for case in CASES if case.name == name)
    assert len(losses) == len(set(GROUPS[metric][:9])), losses
    start = {"ordered": "eval_difficulty ", "vectors": "eval_cluster "}[name]
    assert all(key.startswith(start) for key in losses - {"eval_(no value)_loss"})


@pytest.mark.parametrize("name", ["mix-packed", "joined", "ordered"])
def test_inspect_shows_steps_of_training(one_rank, name):
    shown = commonit("inspect", "--axolotl", one_rank / f"{name}.yml", "--json", cwd=one_rank)
    assert shown.returncode == 0, shown.stderr[-3000:]
    (inspection,) = json.loads(shown.stdout)["inspections"]
    assert EPOCHS * inspection["planned"]["steps"] == result(one_rank / name)["global_step"]
    sizes = Counter(next(case for case in CASES if case.name == name).groups)
    assert sorted(group["rows"] for group in inspection["groups"]) == sorted(sizes.values())


# --- carried columns --------------------------------------------------------------------------------------------------


def entries_of_three_kinds(directory: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows that Axolotl tokenises, splits in several, and takes as they are."""
    texts = [{"text": f"#{number}#" * (1 + 120 * (number % 2))} for number in range(10, 16)]
    tokens = [tokenized(f"#{number}#ab", masked=4) for number in range(20, 26)]
    alpaca = [{"instruction": f"#{number}#", "output": "ab"} for number in range(6)]
    paths = []
    for first, rows in ((0, alpaca), (10, texts), (20, tokens)):
        rows = [
            {**row, **{column: values_of(first + number)[column] for column in columns}}
            for number, row in enumerate(rows)
        ]
        paths.append(str(directory / f"from-{first}"))
        Dataset.from_list(rows).save_to_disk(paths[-1])
    return [
        {"path": path, **({"type": kind} if kind else {})}
        for path, kind in zip(paths, ("alpaca", "completion", None), strict=True)
    ]


def values_of(number: int) -> dict[str, Any]:
    level = None if number == 3 else number / 4
    return {"length": level, "vector": [float(number), 1.0, 2.0], "topic": "even" if number % 2 == 0 else "odd"}


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["plain", "packed"])
def test_values_stay_with_their_rows(tmp_path, packing):
    """A column may have the name of one that packing adds, such as `length`."""
    keys = {"commonit_metric": "task+column", "commonit_task_column": "topic", "commonit_column": "length", **packing}
    vectors = {"commonit_metric": "embedding", "commonit_embedding_column": "vector", **packing}
    for number, ours in enumerate((keys, vectors)):
        metric = ours.pop("commonit_metric")
        columns = ["vector"] if metric == "embedding" else ["topic", "length"]
        entries = entries_of_three_kinds(tmp_path / str(number), columns)
        prepared, _ = prepare(tmp_path, entries, metric=metric, sequence_len=256, **ours)
        rows = Rows(with_source_names(prepared))
        numbers = [number_of(row) for row in prepared["input_ids"]]
        assert set(numbers) == {*range(6), *range(10, 16), *range(20, 26)} and len(numbers) > 18
        expected = [values_of(number) for number in numbers]
        if metric == "embedding":
            found = np.concatenate([*rows.vector_chunks("vector")])
            np.testing.assert_array_equal(found, [value["vector"] for value in expected])
            assert carried_columns(prepared) == ["commonit_embedding[vector]"]
        else:
            levels = [np.nan if value["length"] is None else value["length"] for value in expected]
            np.testing.assert_array_equal(rows.numbers("length"), levels)
            assert prepared["commonit_task[topic]"][:] == [value["topic"] for value in expected]
            assert sorted(carried_columns(prepared)) == ["commonit_column[length]", "commonit_task[topic]"]
        assert not {"vector", "topic"} & {*prepared.column_names}


def test_prepared_rows_of_other_columns_are_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "difficulty": 1, "quality": 2} for row in ROWS])
    entry = {"path": str(path), "type": FORMAT}
    prepare(tmp_path, [entry], metric=None)
    with pytest.raises(ValueError, match=r"commonit_column\[difficulty\].* without: make it again") as refusal:
        prepare(tmp_path, [entry], metric="column", commonit_column="difficulty")
    line = str(refusal.value)
    assert line.startswith("commonit_metric='column' ") and str(tmp_path / "prepared") in line and "\n" not in line
    assert line.endswith(f"`axolotl preprocess {tmp_path / 'recipe.yml'}`.")
    keys = {"dataset_prepared_path": str(tmp_path / "others")}
    prepare(tmp_path, [entry], metric="column", commonit_column="difficulty", **keys)
    with pytest.raises(ValueError, match=r"commonit_column\[quality\].* with commonit_column\[difficulty\]: make it"):
        prepare(tmp_path, [entry], metric="column", commonit_column="quality", **keys)
    prepare(tmp_path, [entry], metric="column+task", commonit_column="quality", **keys)  # in a folder of its own
    first, second = (write_tasks(tmp_path / "tasks.parquet", [name] * len(ROWS)) for name in "xy")
    assert first == second
    write_tasks(tmp_path / "tasks.parquet", ["x"] * len(ROWS))
    keys["dataset_prepared_path"] = str(tmp_path / "tasks")
    prepare(tmp_path, [entry], commonit_task_file=first, **keys)
    write_tasks(tmp_path / "tasks.parquet", ["y"] * len(ROWS))
    with pytest.raises(ValueError, match=r"commonit_task\[tasks.parquet .*\]: make it again"):
        prepare(tmp_path, [entry], commonit_task_file=first, **keys)


def test_dropped_rows_of_joined_metric_have_task(tmp_path):
    rows = [{**row, "output": "a" * 300 if number == 4 else "a"} for number, row in enumerate(ROWS)]
    entry = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "type": FORMAT}
    prepared, _ = prepare(tmp_path, [entry], metric="task+length", sequence_len=128)
    assert dict(dropped_rows(prepared).counts) == {("longer than sequence_len=128", ROWS[4]["task"]): 1}


def test_test_set_without_columns_is_prepared(tmp_path, caplog, monkeypatch):
    for name in ("axolotl", "axolotl_plugin"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    entry = {"path": str(write_rows(tmp_path / "rows.jsonl", ROWS)), "type": FORMAT}
    tests = [{"instruction": f"#{number}#", "output": "a"} for number in range(5)]
    test = {"path": str(write_rows(tmp_path / "tests.jsonl", tests)), "type": FORMAT, "split": "train"}
    keys = {"commonit_embedding_column": "vector", "commonit_column": "difficulty", "test_datasets": [test]}
    rows, evaluation = prepare(tmp_path, [entry], metric="embedding+column", **keys)
    assert (len(rows), len(evaluation)) == (len(ROWS), 5)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum(test["path"] in line and "give the test set the columns" in line for line in warned) == 2
    with pytest.raises(ValueError, match="vectors are missing"):
        next(Rows(with_source_names(evaluation)).vector_chunks("vector"))
    assert np.isnan(Rows(with_source_names(evaluation)).numbers("difficulty")).all()


REFUSED = {
    "two entries": (
        {"commonit_task_file": "25"},
        2,
        "commonit_task_file= | one whole entry | set commonit_task_column",
    ),
    "shards": ({"commonit_task_file": "25", "preprocess_shards": 2}, 1, "commonit_task_file= | shards | Join"),
    "too few tasks": ({"commonit_task_file": "9"}, 1, "datasets: path= | commonit_task_file= | of the dataset"),
    "no file": ({"commonit_task_file": "missing"}, 1, "commonit_task_file= | Name a file"),
    "no such column": ({"metric": "column", "commonit_column": "level"}, 1, "commonit_column='level' | difficulty"),
    "text": ({"metric": "column", "commonit_column": "task"}, 1, "commonit_column='task' | a column of numbers"),
    "tokens": ({"metric": "column", "commonit_column": "labels"}, 1, "commonit_column='labels' | Rename"),
    "no vectors": (
        {"metric": "embedding", "commonit_embedding_column": "difficulty"},
        1,
        "commonit_embedding_column='difficulty' | lists of numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_source_is_refused(tmp_path, name):
    keys, count, named = REFUSED[name]
    keys = dict(keys)
    for rows in ("9", "25"):
        write_tasks(tmp_path / rows, ["x"] * int(rows))
    if "commonit_task_file" in keys:
        keys["commonit_task_file"] = str(tmp_path / keys["commonit_task_file"])
    shards = {"preprocess_shards": keys.pop("preprocess_shards", None)}
    entries = [
        {"path": str(write_rows(tmp_path / f"{number}.jsonl", ROWS)), "type": FORMAT, **shards}
        for number in range(count)
    ]
    with pytest.raises(ValueError) as refusal:
        prepare(tmp_path, entries, **keys)
    said = str(refusal.value)
    assert all(part in said for part in named.split(" | ")) and "\n" not in said, said
