"""Metric `length`: rows with a similar number of tokens in the response (or prompt, or both) form a group.

The paper groups by response length ("Statistics", section 3.1) without bin counts; quantile bins, 8 by default, are
this project's choice. Cost: one sort of the lengths, well under a second for 10^6 rows.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.base import Grouper
from commonit_trl.rows import Rows


class LengthGrouper(Grouper):
    """Groups by token count, in quantile bins or between explicit edges.

    Args:
        of: `response`, `prompt` or `total`.
        num_groups: number of quantile bins; fewer where many rows have the same length.
        edges: ascending token counts to use instead of quantiles; bin i holds edges[i - 1] <= tokens < edges[i].
        min_size: bins with fewer rows merge with their smaller neighbour.
    """

    metric = "length"

    def __init__(
        self,
        *,
        of: str = "response",
        num_groups: int = DEFAULT_NUM_GROUPS["length"],
        edges: list[int] | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__(of=of, num_groups=num_groups, edges=edges, min_size=min_size)
        self.edges: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def read(self, rows: Rows) -> NDArray[np.int64]:
        return rows.token_counts(self.options["of"])

    def fit_values(self, values: NDArray[np.int64]) -> None:
        asked = self.options["num_groups"]
        if self.options["edges"] is not None:
            edges = np.asarray(self.options["edges"], dtype=np.int64)
        else:
            edges = _quantile_edges(values, asked)
            if len(edges) + 1 < asked:
                self.notices.append(
                    f"commonit_num_groups={asked}: many rows have the same length, so there are only {len(edges) + 1} "
                    "groups. Set a lower number, or commonit_length_edges."
                )
        self.edges = _merge_small_bins(values, edges, self.options["min_size"])
        self.names = _bin_names(self.edges, self.options["of"])

    def assign_values(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.edges, values, side="right").astype(np.int64)

    def fitted_numbers(self) -> dict[str, Any]:
        return {"edges": self.edges.tolist()}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.edges = np.asarray(numbers["edges"], dtype=np.int64)
        if len(self.edges) + 1 != len(self.names):
            raise ValueError(f"{len(self.edges)} edges do not make {len(self.names)} groups")


def _quantile_edges(lengths: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Return the lengths whose share of shorter rows is nearest to 1/bins, 2/bins, ..."""
    values, counts = np.unique(lengths, return_counts=True)
    if len(values) < 2:
        return np.empty(0, dtype=np.int64)
    below = np.cumsum(counts)[:-1]  # rows under values[1:], the possible edges
    bins = min(bins, len(lengths))
    targets = len(lengths) * np.arange(1, bins) / bins
    nearest = np.rint(np.interp(targets, below, np.arange(len(below)))).astype(np.int64)
    return values[1:][np.unique(nearest)]


def _merge_small_bins(lengths: NDArray[np.int64], edges: NDArray[np.int64], min_size: int) -> NDArray[np.int64]:
    """Remove edges until each bin has no rows or at least `min_size`, or one bin remains."""
    counts = np.bincount(np.searchsorted(edges, lengths, side="right"), minlength=len(edges) + 1).tolist()
    kept = edges.tolist()
    while kept and min(filter(None, counts), default=min_size) < min_size:
        small = min((bin for bin in range(len(counts)) if counts[bin]), key=counts.__getitem__)
        neighbours = [bin for bin in (small - 1, small + 1) if 0 <= bin < len(counts)]
        other = min(neighbours, key=counts.__getitem__)
        low = min(small, other)
        counts[low : low + 2] = [counts[small] + counts[other]]
        del kept[low]
    return np.asarray(kept, dtype=np.int64)


def _bin_names(edges: NDArray[np.int64], of: str) -> list[str]:
    if not len(edges):
        return [f"{of} of any length"]
    between = [f"{of} {low}" if high == low + 1 else f"{of} {low}-{high - 1}" for low, high in pairwise(edges)]
    return [f"{of} under {edges[0]}", *between, f"{of} {edges[-1]} and more"]
