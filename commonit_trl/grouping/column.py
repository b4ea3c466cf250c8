"""Metric `column`: rows with near values of a numeric column form a group; `length` is a case of it.

The groups are quantile bins, or lie between explicit edges. Rows without a value (null or NaN) form the group
`(no value)`. Any number that a row has will do: difficulty, quality, perplexity; curricula by such numbers are
arXiv 2507.14783's. Cost: one sort of the values, about a second for 10^7 rows.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.base import Grouper
from commonit_trl.rows import Rows

NO_VALUE = "(no value)"


class ColumnGrouper(Grouper):
    """Groups by the value of a column, in quantile bins.

    Args:
        column: name of a column of numbers.
        num_groups: number of bins; fewer where many rows have the same value.
        min_size: bins with fewer rows merge with their smaller neighbour.
    """

    metric = "column"
    edges: NDArray[Any] = np.empty(0, dtype=np.int64)
    """(bins - 1,) values at which the next bin starts."""
    lowest = 0.0
    has_missing = False

    def __init__(self, *, column: str, num_groups: int = DEFAULT_NUM_GROUPS["column"], min_size: int = 1) -> None:
        super().__init__(column=column, num_groups=num_groups, min_size=min_size)

    def read(self, rows: Rows) -> NDArray[Any]:
        return rows.numbers(self.options["column"])

    def fit_values(self, values: NDArray[Any]) -> None:
        asked, known = self.options["num_groups"], values[~np.isnan(values)]
        edges = self._explicit_edges()
        if edges is None:
            edges = _quantile_edges(known, asked)
            if len(edges) + 1 < asked:
                self.notices.append(
                    f"commonit_num_groups={asked}: many rows have the same {self.quantity}, so there are only "
                    f"{len(edges) + 1} groups. {self.fewer_groups}"
                )
        self.edges = _merge_small_bins(known, edges, self.options["min_size"])
        lows = np.append(self.edges[:1], known)
        self.lowest = lows.min() if len(lows) else 0.0
        self.has_missing = len(known) < len(values)
        self.names = self._bin_names(bool(np.all(known == np.floor(known)))) + [NO_VALUE] * self.has_missing

    def assign_values(self, values: NDArray[Any]) -> NDArray[np.int64]:
        bins = np.searchsorted(self.edges, values, side="right").astype(np.int64)
        bins[np.isnan(values)] = len(self.edges) + 1 if self.has_missing else -1
        return bins

    def coordinates(self) -> NDArray[np.float64]:
        last = [self.edges[-1] + 1 if len(self.edges) else self.lowest + 1] * self.has_missing
        return np.array([[self.lowest, *self.edges, *last]], dtype=np.float64).T

    def fitted_numbers(self) -> dict[str, Any]:
        return {"edges": self.edges.tolist(), "lowest": float(self.lowest), "has_missing": self.has_missing}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.edges = np.asarray(numbers["edges"])
        self.lowest, self.has_missing = float(numbers["lowest"]), bool(numbers["has_missing"])
        if len(self.edges) + 1 + self.has_missing != len(self.names):
            raise ValueError(f"{len(self.edges)} edges do not make {len(self.names)} groups")
        if not np.isfinite([self.lowest, *self.edges]).all():
            raise ValueError("the edges are not finite")

    # --- what `length` has of its own -------------------------------------------------------------------------------

    quantity = "value"
    fewer_groups = "Set a lower number."

    def _explicit_edges(self) -> NDArray[Any] | None:
        return None

    @property
    def _prefix(self) -> str:
        return self.options["column"]

    def _bin_names(self, whole: bool) -> list[str]:
        """Name the bins; `whole` values have their last number in the name, others the next bin's first."""
        name = self._prefix
        if not len(self.edges):
            return [f"{name} of any {self.quantity}"]
        if whole:
            edges = [int(edge) for edge in self.edges]
            between = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
            texts = [str(edge) for edge in edges]
        else:
            digits = next(
                digits
                for digits in range(3, 18)
                if len({f"{edge:.{digits}g}" for edge in self.edges}) == len(self.edges)
            )
            texts = [f"{edge:.{digits}g}" for edge in self.edges]
            between = [f"{low} to {high}" for low, high in pairwise(texts)]
        return [f"{name} under {texts[0]}", *(f"{name} {bin}" for bin in between), f"{name} {texts[-1]} and more"]


def _quantile_edges(values: NDArray[Any], bins: int) -> NDArray[Any]:
    """Return the values whose share of lower rows is nearest to 1/bins, 2/bins, ..."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < 2:
        return np.empty(0, dtype=values.dtype)
    below = np.cumsum(counts)[:-1]  # rows under distinct[1:], the possible edges
    bins = min(bins, len(values))
    targets = len(values) * np.arange(1, bins) / bins
    nearest = np.rint(np.interp(targets, below, np.arange(len(below)))).astype(np.int64)
    return distinct[1:][np.unique(nearest)]


def _merge_small_bins(values: NDArray[Any], edges: NDArray[Any], min_size: int) -> NDArray[Any]:
    """Remove edges until each bin has no rows or at least `min_size`, or one bin remains."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()
    kept = edges.tolist()
    while kept and min(filter(None, counts), default=min_size) < min_size:
        small = min((bin for bin in range(len(counts)) if counts[bin]), key=counts.__getitem__)
        neighbours = [bin for bin in (small - 1, small + 1) if 0 <= bin < len(counts)]
        other = min(neighbours, key=counts.__getitem__)
        low = min(small, other)
        counts[low : low + 2] = [counts[small] + counts[other]]
        del kept[low]
    return np.asarray(kept, dtype=edges.dtype)
