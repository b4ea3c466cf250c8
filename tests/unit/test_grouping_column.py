"""Metric `column`: bins of a numeric column, of which `length` is a case; rows without a value are a group."""

import numpy as np
import pytest
from datasets import Dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import LengthGrouper, build_grouper
from commonit_trl.grouping.column import NO_VALUE, ColumnGrouper
from commonit_trl.rows import Rows


def rows_of(values: list, **columns: list) -> Rows:
    return Rows(Dataset.from_dict({"score": values, **columns}))


def test_bins_have_equal_numbers_of_rows_in_the_order_of_their_values() -> None:
    values = np.random.default_rng(0).random(800)
    grouper = ColumnGrouper(column="score", num_groups=4).fit(rows_of(values.tolist()))
    ids = grouper.assign(rows_of(values.tolist()))
    assert np.bincount(ids).tolist() == [200] * 4
    assert (np.diff(ids[np.argsort(values)]) >= 0).all()
    positions = grouper.positions()
    assert positions is not None and (np.diff(positions) > 0).all() and positions[0] == values.min()


def test_rows_without_a_value_are_a_group_of_their_own() -> None:
    grouper = ColumnGrouper(column="score", num_groups=2).fit(rows_of([1.5, None, 2.5, float("nan"), 3.5, 4.5]))
    assert grouper.assign(rows_of([None, 9.0, -9.0])).tolist() == [2, 1, 0] and grouper.names[-1] == NO_VALUE
    positions = grouper.positions()
    assert positions is not None and positions[-1] == positions.max()
    whole = ColumnGrouper(column="score", num_groups=2).fit(rows_of([1.5, 2.5]))
    assert whole.assign(rows_of([None, 2.5])).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 2, 3, 3, 5, 5], ["score under 2", "score 2", "score 3-4", "score 5 and more"]),
        ([0.5, 1.25, 2.5, 3.5], ["score under 1.25", "score 1.25 to 2.5", "score 2.5 to 3.5", "score 3.5 and more"]),
        (
            [0.10001, 0.10002, 0.10003],
            ["score under 0.10002", "score 0.10002 to 0.10003", "score 0.10003 and more"],
        ),
        ([7, 7, 7], ["score of any value"]),
    ],
)
def test_names_tell_the_bins_apart(values: list, names: list[str]) -> None:
    assert ColumnGrouper(column="score", num_groups=8).fit(rows_of(values)).names == names


def test_a_single_bin_stands_at_its_lowest_value() -> None:
    positions = ColumnGrouper(column="score").fit(rows_of([7, 7, 7])).positions()
    assert positions is not None and positions.tolist() == [7]


def test_length_is_a_case_of_it() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 500)
    rows = rows_of(lengths.tolist(), input_ids=[[1] * length for length in lengths.tolist()])
    column = ColumnGrouper(column="score", num_groups=5, min_size=60).fit(rows)
    length = LengthGrouper(of="total", num_groups=5, min_size=60).fit(rows)
    assert (column.assign(rows) == length.assign(rows)).all()
    assert [name.replace("score", "total") for name in column.names] == length.names
    assert np.bincount(column.assign(rows)).min() >= 60


@pytest.mark.parametrize(
    ("values", "says"), [(["a", "b"], "column of numbers"), ([1.0, float("inf")], "infinite"), ([[1], [2]], "numbers")]
)
def test_values_that_are_no_finite_numbers_are_named(values: list, says: str) -> None:
    with pytest.raises(ValueError, match=f"commonit_column='score'.*{says}"):
        ColumnGrouper(column="score").fit(rows_of(values))


def test_a_column_that_is_not_there_is_named() -> None:
    options = CommonITArguments(commonit_metric="column", commonit_column="scores")
    with pytest.raises(ValueError, match=r"commonit_column='scores'.*score"):
        build_grouper(options, ["score", "text"])
