"""Row numbers survive the preparation, and dropped rows are counted by their group.

1. Each kept row has its number in the raw dataset, in any order.
2. Tracing changes neither columns nor values of the prepared rows.
3. Every dropped row is counted in one group.
"""

import numpy as np
import pytest
from datasets import Dataset

from commonit_trl.grouping import LengthGrouper, TaskGrouper
from commonit_trl.grouping.dropped import NONE_DROPPED, UNKNOWN_GROUP
from commonit_trl.grouping.tracing import (
    ROW_COLUMN,
    TracedRows,
    split_row_numbers,
    truncation_reason,
    with_row_numbers,
)
from commonit_trl.rows import Rows

TEXTS = [f"text {number}" for number in range(20)]


def prepare(dataset):
    """Tokenise, drop every third row and shuffle, as TRL does."""
    mapped = dataset.map(lambda row: {"input_ids": [len(row["text"])]})
    return mapped.filter(lambda row: int(row["text"].split()[1]) % 3).shuffle(seed=1)


@pytest.mark.parametrize(
    "raw",
    [
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).shuffle(seed=3),
        Dataset.from_dict({"text": TEXTS}).with_format("numpy"),
        Dataset.from_dict({"text": TEXTS, "more": TEXTS}).with_format("numpy", columns=["text"]),
    ],
    ids=["plain", "shuffled", "formatted", "formatted column"],
)
def test_row_numbers_survive_preparation(raw):
    prepared, numbers = split_row_numbers(prepare(with_row_numbers(raw)))
    kept = raw.with_format(None)[:]["text"]
    assert [kept[number] for number in numbers] == prepared.with_format(None)[:]["text"]
    assert len(set(numbers.tolist())) == len(numbers) == 13
    assert prepared.with_format(None)[:] == prepare(raw).with_format(None)[:]


def test_dropping_every_row_leaves_no_number():
    raw = Dataset.from_dict({"text": TEXTS})
    prepared, numbers = split_row_numbers(with_row_numbers(raw).filter(lambda row: False))
    assert len(prepared) == len(numbers) == 0


def test_existing_row_number_column_is_an_error():
    with pytest.raises(ValueError, match=ROW_COLUMN):
        with_row_numbers(with_row_numbers(Dataset.from_dict({"text": TEXTS})))


def traced(reason, **columns):
    rows = Rows(Dataset.from_dict(columns))
    return TracedRows(reason=reason, numbers=np.arange(len(rows)), rows=rows)


def test_dropped_rows_count_for_fitted_and_unseen_tasks():
    grouper = TaskGrouper(columns=["task"]).fit(Rows(Dataset.from_dict({"task": ["a", "b"]})))
    parts = [traced("one", task=["a", "gone", None, "gone"]), traced("two", task=["b"]), traced("three", task=[])]
    dropped = sum((part.count(grouper) for part in parts), start=NONE_DROPPED)
    assert dropped.by_group == {"(no label)": 1, "a": 1, "b": 1, "gone": 2}
    assert dropped.by_reason == {"one": 4, "two": 1}


def test_dropped_rows_count_for_length_bins_if_tokens_are_known():
    grouper = LengthGrouper(edges=[3]).fit(Rows(Dataset.from_dict({"input_ids": [[1], [1] * 5]})))
    known = traced(truncation_reason(700), input_ids=[[1, 1], [1] * 9, [1] * 9])
    assert known.count(grouper).by_group == {"response 3 and more": 2, "response under 3": 1}
    assert "max_length=700" in next(iter(known.count(grouper).by_reason))
    assert traced("one", text=["a", "b"]).count(grouper).by_group == {UNKNOWN_GROUP: 2}
