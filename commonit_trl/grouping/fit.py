"""`Grouping`: training rows with a fitted grouper, the group of each row, and the rows that training cannot use."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.cache import fit_assign_cached
from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.grouping.registry import build_grouper
from commonit_trl.grouping.tracing import TracedRows
from commonit_trl.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """The training rows in groups."""

    grouper: Grouper
    rows: Rows
    """The rows that were grouped; with packing, before they were packed."""
    group_ids: NDArray[np.int64]
    """(rows,) group id of each."""
    dropped: DroppedRows
    """Rows that are not among `rows`, because training cannot use them."""

    @property
    def names(self) -> list[str]:
        """Group names, by id."""
        return self.grouper.names

    def name_of(self, group: int) -> str:
        """The name of a group; a row that `fit` could not have assigned has group -1."""
        return self.names[group] if group >= 0 else "(unseen task)"

    def assign(self, rows: Rows) -> NDArray[np.int64]:
        """(rows,) group ids of other rows, -1 for a task that the training rows do not have."""
        return self.grouper.assign(rows)


def fit_grouping(options: CommonITArguments, rows: Rows, traced: Sequence[TracedRows]) -> Grouping:
    """Fit the groups of `options.commonit_metric` to `rows` and assign them, or load both from the cache.

    Args:
        traced: the rows that training cannot use.

    Raises:
        ValueError: when the metric needs something that the rows lack, and when the cache cannot be used.
    """
    grouper = build_grouper(options, rows.columns, seed=data_seed(options))
    grouper, group_ids = fit_assign_cached(grouper, rows, options.commonit_cache_dir)
    if PartialState().is_main_process:
        grouper.log_notices()
    dropped = sum((part.count(grouper) for part in traced), start=NONE_DROPPED)
    return Grouping(grouper=grouper, rows=rows, group_ids=group_ids, dropped=dropped)


def data_seed(args: Any) -> int:
    """The seed of the data order: `data_seed`, else `seed`, of training arguments."""
    return args.seed if args.data_seed is None else args.data_seed


def fingerprint(content: Any) -> str:
    """A short hash of bytes or a contiguous array."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
