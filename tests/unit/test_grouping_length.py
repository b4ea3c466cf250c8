"""`LengthGrouper`: bins of token counts.

1. Bins are ascending ranges of lengths, and each row joins the bin that contains its length.
2. Quantile bins are as even as integer lengths allow: no edge could be nearer to its quantile.
3. With a minimum size, the smallest bin joins its smaller neighbour until all bins are large enough.
"""

import logging
from itertools import chain
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import LengthGrouper, build_grouper
from commonit_trl.rows import Rows

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=60)


def rows_of(response_lengths: Any, prompt_length: int = 2) -> Rows:
    ids = [[1] * (prompt_length + length) for length in response_lengths]
    labels = [[-100] * prompt_length + [1] * length for length in response_lengths]
    return Rows(Dataset.from_dict({"input_ids": ids, "labels": labels}))


def bins_of(grouper: LengthGrouper, lengths: Any) -> list[list[int]]:
    """The sorted lengths in each bin."""
    group_ids = grouper.assign_values(np.asarray(lengths))
    return [sorted(np.asarray(lengths)[group_ids == group].tolist()) for group in range(len(grouper.names))]


def fitted(lengths: Any, **options: Any) -> LengthGrouper:
    grouper = LengthGrouper(**options)
    grouper.fit_values(np.asarray(lengths, dtype=np.int64))
    return grouper


# --- which length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of, measured", [("response", [0, 3, 9]), ("prompt", [2, 2, 2]), ("total", [2, 5, 11])])
def test_option_of_selects_the_length(of: str, measured: list[int]) -> None:
    assert LengthGrouper(of=of).read(rows_of([0, 3, 9])).tolist() == measured
    assert LengthGrouper(of=of).fit(rows_of([5])).names == [f"{of} of any length"]


def test_names() -> None:
    grouper = LengthGrouper(edges=[4, 5, 7]).fit(rows_of([4, 5, 7]))
    assert grouper.names == ["response under 4", "response 4", "response 5-6", "response 7 and more"]


# --- bins ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(lengths=LENGTHS, edges=st.lists(st.integers(1, 30), min_size=1, unique=True).map(sorted))
def test_a_row_joins_the_bin_of_its_length(lengths: list[int], edges: list[int]) -> None:
    grouper = fitted(lengths, edges=edges)
    assert grouper.assign_values(np.asarray(lengths)).tolist() == [
        sum(length >= edge for edge in edges) for length in lengths
    ]
    assert len(grouper.names) == len(set(grouper.names)) == len(edges) + 1


@settings(deadline=None)
@given(lengths=LENGTHS, asked=st.integers(1, 12))
def test_no_edge_could_be_nearer_to_its_quantile(lengths: list[int], asked: int) -> None:
    bins = bins_of(fitted(lengths, num_groups=asked), lengths)
    assert [*chain(*bins)] == sorted(lengths) and all(bins)
    values = sorted(set(lengths))
    possible = [sum(length < value for length in lengths) for value in values[1:]]  # rows below each possible edge
    chosen = set(np.cumsum([len(members) for members in bins])[:-1].tolist())
    assert chosen <= set(possible)
    if possible:
        targets = [len(lengths) * number / asked for number in range(1, asked)]
        distances = [min(abs(below - target) for below in possible) for target in targets]
        for target, distance in zip(targets, distances, strict=True):
            assert min(abs(below - target) for below in chosen) == pytest.approx(distance)
        for below in chosen:
            assert any(
                abs(below - target) == pytest.approx(near) for target, near in zip(targets, distances, strict=True)
            )


def test_fewer_bins_than_requested_is_a_warning(caplog: Any) -> None:
    for number in (8, 3):
        caplog.clear()
        LengthGrouper(num_groups=number).fit(rows_of([3] * 51 + [4] * 49))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"commonit_num_groups={number}" in record.getMessage() and "only 2 groups" in record.getMessage()
    caplog.clear()
    grouper = LengthGrouper(num_groups=2).fit(rows_of([3] * 51 + [4] * 49))
    assert grouper.names == ["response under 4", "response 4 and more"] and not caplog.records


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    edges=st.lists(st.integers(1, 30), min_size=1, unique=True).map(sorted),
    least=st.integers(1, 40),
)
def test_small_bins_join_their_smaller_neighbour(lengths: list[int], edges: list[int], least: int) -> None:
    bins: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    for length in lengths:
        bins[sum(length >= edge for edge in edges)].append(length)
    while len(bins) > 1 and any(0 < len(members) < least for members in bins):
        small = min((number for number, members in enumerate(bins) if members), key=lambda number: len(bins[number]))
        left, right = bins[small - 1 : small], bins[small + 1 : small + 2]
        if left and (not right or len(left[0]) <= len(right[0])):
            bins[small - 1 : small + 1] = [left[0] + bins[small]]
        else:
            bins[small : small + 2] = [bins[small] + right[0]]
    found = bins_of(fitted(lengths, edges=edges, min_size=least), lengths)
    assert found == [sorted(members) for members in bins]
    assert len(found) == 1 or all(len(members) >= least for members in found if members)


def test_the_smallest_bin_is_merged_first_with_its_smaller_neighbour() -> None:
    """Random lengths rarely exercise the order."""
    lengths = [1] * 3 + [2] * 4 + [3] * 2 + [4] * 9
    assert fitted(lengths, edges=[2, 3, 4], min_size=3).edges.tolist() == [2, 4]
    lengths = [1] * 9 + [2] * 3 + [3] * 5 + [4] * 2 + [5] * 6
    assert fitted(lengths, edges=[2, 3, 4, 5], min_size=4).edges.tolist() == [2, 5]


def test_rows_without_tokens_have_length_0() -> None:
    rows = Rows(Dataset.from_dict({"input_ids": [[], None, [1] * 9], "labels": [[], None, [1] * 9]}))
    assert LengthGrouper(num_groups=2).fit(rows).assign(rows).tolist() == [0, 0, 1]
    nothing = rows_of([])
    assert LengthGrouper(edges=[4], min_size=2).fit(nothing).assign(nothing).tolist() == []


def test_build_grouper_passes_the_options() -> None:
    def built(**options: Any) -> dict[str, Any]:
        given = {f"commonit_{name}": value for name, value in options.items()}
        return build_grouper(CommonITArguments(commonit_metric="length", **given), ["input_ids"]).identity()

    default = {"metric": "length", "of": "response", "num_groups": 8, "edges": None, "min_size": 1}
    assert built() == default
    assert built(num_groups=5) == default | {"num_groups": 5}
    expected = default | {"of": "total", "edges": [64], "min_size": 2}
    assert built(length_edges=[64], length_of="total", min_group_size=2) == expected
