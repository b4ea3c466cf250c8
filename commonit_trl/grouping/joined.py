"""Two metrics joined, such as `task+length`: the second is fitted inside each group of the first.

A group is named after both: `gsm8k | response 85-119`. Groups become many and small, so this goes with
`commonit_remainder: mix`. Cost: that of both metrics.
"""

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.ranks import ALONE, Ranks
from commonit_trl.rows import Rows


class JoinedGrouper(Grouper):
    """Groups by two metrics.

    Args:
        first, second: unfitted groupers. One copy of `second` is fitted per group of `first`.
    """

    def __init__(self, first: Grouper, second: Grouper) -> None:
        super().__init__(parts=[{"metric": part.metric, **part.options} for part in (first, second)])
        self.metric = f"{first.metric}+{second.metric}"
        self.first, self.second = first, second
        self.inner: list[Grouper | None] = []
        """(groups of `first`,) the copy of `second` that is fitted to its rows; None if it has no rows."""

    @property
    def parts(self) -> tuple[Grouper, Grouper]:
        return self.first, self.second

    def read(self, rows: Rows) -> tuple[Any, Any]:
        return self.first.read(rows), self.second.read(rows)

    def hashed(self, values: tuple[Any, Any]) -> tuple[Any, ...]:
        hashed = (part.hashed(value) for part, value in zip(self.parts, values, strict=True))
        return tuple(item for value in hashed for item in (value if isinstance(value, tuple) else (value,)))

    def fit_values(self, values: tuple[Any, Any]) -> None:
        self.fit_assign(values)

    def fit_assign(self, values: tuple[Any, Any], ranks: Ranks = ALONE) -> NDArray[np.int64]:
        first_ids = self.first.fit_assign(values[0], ranks)
        group_ids = np.empty_like(first_ids)
        self.names, self.inner = [], []
        with self.second.resources():
            for group, name in enumerate(self.first.names):
                members = np.flatnonzero(first_ids == group)
                if not len(members):
                    self.inner.append(None)
                    continue
                inner = _unfitted(self.second)
                inner_ids = inner.fit_assign(inner.subset(values[1], members), ranks)
                group_ids[members] = np.where(inner_ids < 0, -1, inner_ids + len(self.names))
                self.names += [f"{name} | {inner_name}" for inner_name in inner.names]
                self.inner.append(inner)
        noted = [(name, inner) for name, inner in zip(self.first.names, self.inner, strict=True) if inner]
        noted = [(name, inner) for name, inner in noted if inner.notices]
        self.notices += self.first.notices
        if noted:
            more = f" ({len(noted) - 1} more groups have such a notice.)" if len(noted) > 1 else ""
            self.notices.append(f"In group {noted[0][0]!r}: {noted[0][1].notices[0]}{more}")
        return group_ids

    def assign_values(self, values: tuple[Any, Any]) -> NDArray[np.int64]:
        first_ids = self.first.assign_values(values[0])
        group_ids = np.full_like(first_ids, -1)
        start = 0
        with self.second.resources():
            for group, inner in enumerate(self.inner):
                members = np.flatnonzero(first_ids == group)
                if inner is None:
                    continue
                if len(members):
                    inner_ids = inner.assign_values(inner.subset(values[1], members))
                    group_ids[members] = np.where(inner_ids < 0, -1, inner_ids + start)
                start += len(inner.names)
        return group_ids

    def coordinates(self) -> NDArray[np.float64] | None:
        """Those of the metric with an order, else of the second: rows near by it share mixed steps."""
        fitted = [inner for inner in self.inner if inner is not None]
        seconds = [inner.coordinates() for inner in fitted]
        second = (
            None
            if any(each is None for each in seconds)
            else np.concatenate([each for each in seconds if each is not None])
        )
        first = self.first.coordinates()
        if first is not None:
            first = np.repeat(first, [0 if inner is None else len(inner.names) for inner in self.inner], axis=0)
        if second is None or (first is not None and first.shape[1] == 1 < second.shape[1]):
            return first
        return second

    def identity(self) -> dict[str, Any]:
        return {"metric": self.metric, "parts": [part.identity() for part in self.parts]}

    def fitted_numbers(self) -> dict[str, Any]:
        return {
            "first": _saved(self.first),
            "inner": [None if inner is None else _saved(inner) for inner in self.inner],
        }

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        return {f"{key}.{name}": array for key, part in self._fitted() for name, array in part.fitted_arrays().items()}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.inner = [None if saved is None else _unfitted(self.second) for saved in numbers["inner"]]
        saved_parts = [numbers["first"], *filter(None, numbers["inner"])]
        for (key, part), saved in zip(self._fitted(), saved_parts, strict=True):
            part.names = [str(name) for name in saved["names"]]
            own = {name.removeprefix(f"{key}."): array for name, array in arrays.items() if name.startswith(f"{key}.")}
            part.restore(saved["fitted"], own)
        if sum(len(inner.names) for inner in self.inner if inner) != len(self.names):
            raise ValueError(f"the joined groups are not {len(self.names)}")

    def _fitted(self) -> list[tuple[str, Grouper]]:
        inner = [(str(number), part) for number, part in enumerate(self.inner) if part is not None]
        return [("first", self.first), *inner]


def _saved(part: Grouper) -> dict[str, Any]:
    return {"names": part.names, "fitted": part.fitted_numbers()}


def _unfitted(grouper: Grouper) -> Grouper:
    """Return a copy of an unfitted grouper; copies share an encoder that is loaded."""
    twin = copy.copy(grouper)
    twin.names, twin.notices = [], []
    return twin
