"""`TaskGrouper`: rows with the same label form a group, whatever the type of the label.

1. Two rows share a group if and only if their labels are equal; rows without a label share one, with a warning.
2. Tasks under the minimum size merge into `other`, and so do unseen tasks then.
"""

import logging
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import TaskGrouper, build_grouper, resolve_task_columns
from commonit_trl.grouping.task import TASK_FILE_COLUMN, with_task_file
from commonit_trl.rows import Rows


def fit(labels: list[Any], feature: Any = None, **options: Any) -> tuple[TaskGrouper, list[str]]:
    """The grouper fitted to one column of labels, and the name of each row's group."""
    features = None if feature is None else Features({"task": feature})
    rows = Rows(Dataset.from_dict({"task": labels}, features=features))
    grouper = TaskGrouper(columns=["task"], **options).fit(rows)
    return grouper, [grouper.names[group] for group in grouper.assign(rows)]


@pytest.mark.parametrize(
    "labels, feature, names",
    [
        (["b", "a", "b"], None, ["b", "a", "b"]),
        (["b", "a", "b"], Value("large_string"), ["b", "a", "b"]),
        ([2, 10, 2], None, ["2", "10", "2"]),
        ([0.5, 1.0, -1e-9], None, ["0.5", "1.0", "-1e-09"]),
        ([True, False, True], None, ["True", "False", "True"]),
        ([1, 0, 1], ClassLabel(names=["neg", "pos"]), ["pos", "neg", "pos"]),
        (["ü", "日本", " padded "], None, ["ü", "日本", "padded"]),
        (["other", "x", "other"], None, ["other", "x", "other"]),
    ],
)
def test_the_group_name_is_the_label_as_text(labels: list[Any], feature: Any, names: list[str]) -> None:
    grouper, found = fit(labels, feature)
    assert found == names
    assert grouper.names == sorted(set(names))


@pytest.mark.parametrize(
    "labels, feature",
    [
        (["a", None, "b", ""], None),
        (["a", "  ", "b", "\n"], None),
        ([1, None, 2, None], None),
        ([0.5, float("nan"), 1.5, None], None),
        ([0, -1, 1, None], ClassLabel(names=["a", "b"])),
        (["a", None, "b", "(no label)"], None),
    ],
)
def test_missing_labels_form_a_group_with_a_warning(labels: Any, feature: Any, caplog: Any) -> None:
    _, found = fit(labels, feature)
    assert found[1] == found[3] == "(no label)"
    assert len({found[0], found[1], found[2]}) == 3
    (record,) = caplog.records
    missing = 1 if "(no label)" in labels else 2
    assert record.levelno == logging.WARNING
    assert f"commonit_task_column=task: {missing} of 4 rows have no label" in record.getMessage()
    assert "'(no label)'" in record.getMessage()


def test_a_column_without_labels_is_one_group() -> None:
    assert fit([None, None])[1] == ["(no label)"] * 2
    assert fit(["", " "])[1] == ["(no label)"] * 2


def test_complete_labels_log_nothing(caplog: Any) -> None:
    grouper, _ = fit(["a", "b"])
    assert not caplog.records and not grouper.notices


def test_labels_of_several_columns_are_joined() -> None:
    rows = Rows(Dataset.from_dict({"set": ["x", "x", "y", None], "kind": [1, 2, 1, 1], "text": ["t"] * 4}))
    grouper = TaskGrouper(columns=["set", "kind"]).fit(rows)
    assert [grouper.names[group] for group in grouper.assign(rows)] == [
        "x / 1",
        "x / 2",
        "y / 1",
        "(no label)",
    ]
    assert grouper.notices[0].startswith("commonit_task_column=set+kind: 1 of 4 ")


@pytest.mark.parametrize(
    "feature, value",
    [
        (List(Value("string")), ["a"]),
        (LargeList(Value("int64")), [1]),
        ({"name": Value("string")}, {"name": "a"}),
    ],
)
def test_lists_and_mappings_are_errors(feature: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"commonit_task_column='task' holds .*: name a column of text"):
        fit([value], feature)


def test_a_missing_column_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"commonit_task_column='task' is not a column .* has: kind, text\."):
        TaskGrouper(columns=["task"]).fit(Rows(Dataset.from_dict({"kind": ["a"], "text": ["t"]})))


@settings(deadline=None)
@given(
    labels=st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c", "other", "(no label)", " "])), min_size=1),
    min_size=st.integers(1, 6),
)
def test_groups_match_a_count_by_hand(labels: list[str | None], min_size: int) -> None:
    grouper, found = fit(labels, Value("string"), min_size=min_size)
    clean = ["(no label)" if label is None or not label.strip() else label for label in labels]
    expected = [label if clean.count(label) >= min_size else "other" for label in clean]
    assert found == expected
    assert sorted(grouper.names) == sorted(set(expected))


def test_small_and_unseen_tasks_merge_into_other(caplog: Any) -> None:
    grouper, found = fit(["a", "a", "b", "c", None], min_size=2)
    assert found == ["a", "a", "other", "other", "other"]
    assert "1 of 5 rows have no label and form the group 'other'" in caplog.text
    rows = Rows(Dataset.from_dict({"task": ["a", "b", "unseen", None]}))
    other = grouper.names.index("other")
    assert grouper.assign(rows).tolist() == [grouper.names.index("a"), other, other, other]


def test_unseen_tasks_are_unassigned_without_merging() -> None:
    rows = Rows(Dataset.from_dict({"task": ["a", "unseen", None]}))
    assert fit(["a", "b"])[0].assign(rows).tolist() == [0, -1, -1]
    assert fit(["a", "other"])[0].assign(rows).tolist() == [0, -1, -1]
    assert fit(["a", "a", "b", "b"], min_size=2)[0].assign(rows).tolist() == [0, -1, -1]


def test_very_many_tasks_of_a_shuffled_dataset() -> None:
    labels = [f"task {row}" for row in range(50_000)]
    rows = Rows(Dataset.from_dict({"task": labels}).shuffle(seed=1))
    grouper = TaskGrouper(columns=["task"]).fit(rows)
    assert grouper.names == sorted(labels)
    assert [grouper.names[group] for group in grouper.assign(rows)] == rows.dataset["task"]


# --- which column -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, found",
    [
        (["text", "dataset", "task"], ["task"]),
        (["source", "category"], ["category"]),
        (["dataset"], ["dataset"]),
    ],
)
def test_the_default_label_columns(columns: list[str], found: list[str]) -> None:
    assert resolve_task_columns(CommonITArguments(commonit_metric="task"), columns) == found


@pytest.mark.parametrize(
    "column, says",
    [
        (None, r"^commonit_metric='task': .*task.*has: text, kind\. Set commonit_task_column[^\n]*$"),
        (["text", "knd"], r"^commonit_task_column='knd': .*has: text, kind\. Name one[^\n]*$"),
    ],
)
def test_an_unknown_label_column_is_an_error_with_a_fix(column: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_task_columns(CommonITArguments(commonit_metric="task", commonit_task_column=column), ["text", "kind"])


def test_build_grouper_passes_the_options() -> None:
    options = CommonITArguments(commonit_metric="task", commonit_task_column=["a", "b"], commonit_min_group_size=3)
    grouper = build_grouper(options, ["a", "b", "c"])
    assert grouper.identity() == {"metric": "task", "columns": ["a", "b"], "min_size": 3}


def test_no_label_column_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^columns=\[\]: "):
        TaskGrouper(columns=[])


def test_a_task_file_names_rows_by_number_or_in_their_order(tmp_path):
    dataset, path = Dataset.from_dict({"text": ["a", "b", "c"]}), tmp_path / "tasks.parquet"
    for rows in ({"name": ["z", "x", "y"], "row": [2, 0, 1]}, {"name": ["x", "y", "z"]}):
        pq.write_table(pa.table(rows), path)
        assert with_task_file(dataset, path)[TASK_FILE_COLUMN] == ["x", "y", "z"]


@pytest.mark.parametrize("numbers", [[0, 1, 1], [0, 1, 3], [0, 1, None], [0, None, 1], [0, 1], [0, 1, 2, 3]], ids=str)
def test_a_task_file_must_name_each_row_once(numbers, tmp_path):
    path = tmp_path / "tasks.parquet"
    pq.write_table(pa.table({"name": ["x"] * len(numbers), "row": numbers}), path)
    with pytest.raises(ValueError, match=f"its {len(numbers)} rows do not number the 3 rows"):
        with_task_file(Dataset.from_dict({"text": ["a", "b", "c"]}), path)


def test_the_column_of_the_task_file_may_not_exist(tmp_path):
    path = tmp_path / "tasks.parquet"
    pq.write_table(pa.table({"name": ["x"]}), path)
    with pytest.raises(ValueError, match=f"{TASK_FILE_COLUMN!r} already: rename or remove it"):
        with_task_file(Dataset.from_dict({TASK_FILE_COLUMN: ["a"]}), path)
