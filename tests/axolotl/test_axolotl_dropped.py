"""Rows that data preparation drops are counted.

1. Complete: prepared rows plus dropped rows are the raw rows, for every reason and metric.
2. Named: each dropped row counts under its task label, or its entry of `datasets:` without labels.
3. Kept: rows from Axolotl's cache have the counts of their preparation; rows prepared without CommonIT have none.
4. Unchanged: counting changes neither the prepared rows nor their order.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.axolotl_recipes import recipe, write_recipe, write_rows
from test_axolotl_labels import prepare, tokens

from axolotl_plugin.dropped import DUPLICATE, NOT_TOKENIZED, dropped_rows
from axolotl_plugin.recipe import read_recipe
from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN, UNKNOWN_GROUP

LONG, SHORT = "longer than sequence_len=128", "shorter than min_sample_len=50"
FORMAT = "{instruction}"


def alpaca(number: int, task: str, prompt: int = 40, answer: int = 30) -> dict[str, Any]:
    """Make a row with one token per character."""
    return {"instruction": f"#{number}#".ljust(prompt, "q"), "output": "a" * answer, "task": task}


def entry(path: str) -> dict[str, Any]:
    type_ = {"field_instruction": "instruction", "field_output": "output", "format": FORMAT}
    return {"path": path, "type": {**type_, "no_input_format": FORMAT}}


LONG_AND_SHORT = [
    alpaca(number, "long", 128) if number % 3 == 0 else alpaca(number, "short", 40) for number in range(12)
]
"""Prompts of the long rows fill 128 tokens."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dropped")


@pytest.fixture(scope="module")
def entries(directory: Path) -> list[dict[str, Any]]:
    """Two files with 19 rows: 3 too long, 2 too short and 3 duplicates."""
    first = [
        *(alpaca(number, "maths") for number in range(6)),
        *(alpaca(number, "maths", answer=200) for number in (6, 7)),  # too long
        alpaca(8, "code", prompt=4, answer=2),  # too short
        *(alpaca(9, task) for task in ("code", "chat")),  # a duplicate of another task
    ]
    second = [
        *(alpaca(number, "chat") for number in range(10, 14)),
        alpaca(14, "chat", prompt=4, answer=2),  # too short
        alpaca(15, "code", answer=200),  # too long
        alpaca(10, "chat"),
        alpaca(3, "maths"),  # duplicates
    ]
    return [
        entry(str(write_rows(directory / f"{name}.jsonl", rows))) for name, rows in {"a": first, "b": second}.items()
    ]


KEYS = {"sequence_len": 128, "min_sample_len": 50, "dataset_exact_deduplication": True}
METRICS: dict[str, tuple[dict[str, Any], dict[tuple[str, str], int]]] = {
    "task": (
        {"commonit_task_column": "task"},
        {(LONG, "maths"): 2, (LONG, "code"): 1, (SHORT, "code"): 1, (SHORT, "chat"): 1},
    ),
    "length": ({}, {(LONG, "a"): 2, (LONG, "b"): 1, (SHORT, "a"): 1, (SHORT, "b"): 1}),
}


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("metric", METRICS)
def test_dropped_rows_have_reason_and_group(
    directory: Path, entries: list[dict[str, Any]], metric: str, packing: bool
) -> None:
    options, expected = METRICS[metric]
    keys = {**KEYS, "sample_packing": packing or None, "sample_packing_eff_est": 0.9 if packing else None}
    place = str(directory / f"prepared-{metric}-{packing}")
    fresh, _ = prepare(directory, entries, metric=metric, dataset_prepared_path=place, **keys, **options)
    dropped = dropped_rows(fresh)
    assert dropped is not None
    found = dict(dropped.counts)
    duplicates = Counter({group: found.pop((reason, group)) for reason, group in list(found) if reason == DUPLICATE})
    assert found == expected
    assert duplicates.total() == 3
    assert metric == "task" or duplicates == {UNKNOWN_GROUP: 3}
    assert dropped.rows + len(fresh) == 19
    cached, _ = prepare(directory, entries, metric=metric, dataset_prepared_path=place, **keys, **options)
    assert dropped_rows(cached) == dropped
    plain, _ = prepare(directory, entries, metric=None, dataset_prepared_path=f"{place}-plain", **keys)
    assert tokens(plain) == tokens(fresh)
    assert dropped_rows(plain) is None


def test_packing_drops_rows_without_trained_tokens(directory: Path) -> None:
    path = str(write_rows(directory / "untrained.jsonl", LONG_AND_SHORT))
    keys = {"sequence_len": 128, "excess_length_strategy": "truncate", "sample_packing": True}
    keys |= {"sample_packing_eff_est": 0.9, "commonit_task_column": "task"}
    place = str(directory / "prepared-untrained")
    prepared, _ = prepare(directory, [entry(path)], dataset_prepared_path=place, **keys)
    dropped = dropped_rows(prepared)
    assert dropped is not None
    assert dict(dropped.counts) == {(NO_TRAINED_TOKEN, "long"): 4} and len(prepared) == 8


def test_rows_without_tokens_are_counted(directory: Path) -> None:
    rows = [{"text": "" if number % 4 == 0 else "t" * 60, "task": f"{number % 2}"} for number in range(12)]
    completion = {"path": str(write_rows(directory / "empty.jsonl", rows)), "type": "completion"}
    for metric, options, group in (("task", {"commonit_task_column": "task"}, "0"), ("length", {}, "empty")):
        place = str(directory / f"prepared-empty-{metric}")
        prepared, _ = prepare(directory, [completion], metric=metric, dataset_prepared_path=place, **options)
        dropped = dropped_rows(prepared)
        assert dropped is not None
        assert dict(dropped.counts) == {(NOT_TOKENIZED, group): 3} and len(prepared) == 9


def test_splits_keep_counts(directory: Path, entries: list[dict[str, Any]]) -> None:
    place = str(directory / "prepared-split")
    whole, _ = prepare(directory, entries, metric="length", dataset_prepared_path=place, **KEYS)
    part, evaluation = prepare(directory, entries, metric="length", dataset_prepared_path=place, val_set_size=4, **KEYS)
    assert len(part) + len(evaluation) == len(whole)
    assert dropped_rows(part) == dropped_rows(whole) is not None


# --- rows without a trained token, which Axolotl keeps unless it packs ------------------------------------------------


def test_inspect_drops_rows_without_trained_tokens(directory: Path) -> None:
    path = str(write_rows(directory / "truncated.jsonl", LONG_AND_SHORT))
    for metric, group in (("task", "long"), ("length", UNKNOWN_GROUP)):
        keys = {"sequence_len": 128, "excess_length_strategy": "truncate", "commonit_metric": metric}
        keys |= {"dataset_prepared_path": str(directory / f"prepared-truncated-{metric}")}
        read = read_recipe(str(write_recipe(directory / "truncated.yml", recipe(directory, [entry(path)], **keys))))
        assert len(read.rows) == len(read.lengths) == 8
        assert (read.rows.trained_counts(shifted=False) > 0).all()
        assert dict(read.dropped.counts) == {(NO_TRAINED_TOKEN, group): 4}
    every = [alpaca(number, "long", 128) for number in range(4)]
    keys["dataset_prepared_path"] = str(directory / "prepared-nothing")
    nothing = recipe(directory, [entry(str(write_rows(directory / "nothing.jsonl", every)))], **keys)
    with pytest.raises(ValueError, match=r"sequence_len=128: .*Raise sequence_len"):
        read_recipe(str(write_recipe(directory / "nothing.yml", nothing)))
