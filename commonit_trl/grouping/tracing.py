"""Trace rows through a preparation that drops or reorders them, and count the dropped rows by group.

1. `with_row_numbers` adds a column with the row number to the raw rows;
2. the caller prepares the rows, which keeps the column;
3. `split_row_numbers` takes the column out again; raw rows whose number is missing did not survive;
4. `TracedRows.count`, once groups are fitted, names the group that each of them would have.

Cost for 10^6 rows: adding and reading the column takes well under a second; assigning groups costs what assigning that
many other rows costs.
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN, UNKNOWN_GROUP, DroppedRows
from commonit_trl.grouping.task import NO_LABEL, TaskGrouper
from commonit_trl.rows import Rows

ROW_COLUMN = "commonit_row"


@dataclass(frozen=True, kw_only=True)
class TracedRows:
    """Rows that are dropped before training for one reason."""

    reason: str
    numbers: NDArray[np.int64]
    """(dropped,) row numbers in the raw dataset."""
    rows: Rows
    """The dropped rows, as the groupers read them; before truncation where possible."""

    def count(self, grouper: Grouper) -> DroppedRows:
        """Count the rows by the group that `grouper`, which is fitted, would assign them to."""
        return DroppedRows.of((self.reason, name) for name in group_names(grouper, self.rows))


def with_row_numbers(dataset: Dataset) -> Dataset:
    """Add the column `commonit_row`, which numbers the rows from 0.

    Raises:
        ValueError: when the dataset has such a column.
    """
    if ROW_COLUMN in dataset.column_names:
        raise ValueError(f"train_dataset has a column {ROW_COLUMN!r}, which CommonIT adds itself: rename or remove it.")
    return dataset.add_column(ROW_COLUMN, np.arange(len(dataset)))


def split_row_numbers(prepared: Dataset) -> tuple[Dataset, NDArray[np.int64]]:
    """Return the rows without the column `commonit_row`, and its (rows,) values."""
    numbers = prepared.select_columns([ROW_COLUMN]).with_format("numpy")[:][ROW_COLUMN]
    return prepared.remove_columns(ROW_COLUMN), np.asarray(numbers, dtype=np.int64)


def truncation_reason(max_length: int | None) -> str:
    """Name the only reason why TRL's preparation drops a row: truncation leaves it no trained token."""
    return f"dropped by TRL's preparation: {NO_TRAINED_TOKEN} after truncation to max_length={max_length}"


def group_names(grouper: Grouper, rows: Rows) -> list[str]:
    """Name the group of each row that training will not see.

    A row of a task that was not fitted, since all its rows are dropped, has its label. A row that the metric cannot
    read, such as one without tokens for `length`, has the group `UNKNOWN_GROUP`.
    """
    if not len(rows):
        return []
    try:
        ids = grouper.assign(rows).tolist()
    except ValueError:
        return [UNKNOWN_GROUP] * len(rows)
    names = [grouper.names[number] if number >= 0 else None for number in ids]
    if isinstance(grouper, TaskGrouper) and None in names:
        labels = rows.labels(grouper.options["columns"])
        return [name or label or NO_LABEL for name, label in zip(names, labels, strict=True)]
    return [name or UNKNOWN_GROUP for name in names]
