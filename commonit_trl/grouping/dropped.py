"""Rows that training cannot use, counted by reason and group."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

NO_TRAINED_TOKEN = "no token to train on"
UNKNOWN_GROUP = "(group unknown)"


@dataclass(frozen=True, kw_only=True)
class DroppedRows:
    """How many rows are dropped before training."""

    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(reason, group name) -> rows."""

    @classmethod
    def of(cls, reasons_and_groups: Iterable[tuple[str, str]]) -> Self:
        """Count one (reason, group name) per dropped row."""
        return cls(counts=Counter(reasons_and_groups))

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    @property
    def by_reason(self) -> dict[str, int]:
        return self._sums(0)

    @property
    def by_group(self) -> dict[str, int]:
        return self._sums(1)

    def _sums(self, part: int) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for key, count in self.counts.items():
            sums[key[part]] += count
        return dict(sorted(sums.items()))

    def __add__(self, other: "DroppedRows") -> "DroppedRows":
        return DroppedRows(counts=Counter(self.counts) + Counter(other.counts))

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "by_reason": self.by_reason, "by_group": self.by_group}


NONE_DROPPED = DroppedRows()
