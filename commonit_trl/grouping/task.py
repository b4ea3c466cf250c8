"""Metric `task`: rows with the same label form a group (CommonIT, section 3.1, "Task").

Rows without a label form the group `(no label)`; with a minimum group size, smaller tasks merge into `other`. Rows that
carry these names as labels join the same groups. Cost: one pass over the labels, well under a second for 10^6 rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import NDArray

from commonit_trl.grouping.base import Grouper
from commonit_trl.rows import Rows

NO_LABEL = "(no label)"
OTHER = "other"
TASK_FILE_COLUMN = "commonit_task"


def with_task_file(dataset: Dataset, file: str | Path) -> Dataset:
    """Add the tasks of a Parquet file to a dataset, as the column `commonit_task`.

    Args:
        file: has the task of each row in `name`, and its number in `row`, as `commonit group` writes it; without
            `row`, its rows are in the order of the dataset.

    Raises:
        ValueError: on a file that cannot be read or does not name each row of the dataset once.
    """
    option = f"commonit_task_file={str(file)!r}"
    try:
        table = pq.read_table(file)
        names = table["name"].cast(pa.large_string()).combine_chunks()  # may exceed 2 GiB
        numbers = np.arange(len(table))
        if "row" in table.column_names:
            numbers = table["row"].cast(pa.int64()).fill_null(-1).to_numpy()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{option}: no Parquet file with the task of each row in 'name' and its number in 'row' "
            f"({' '.join(str(error).split())}). Write it with `commonit group`."
        ) from error
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], np.arange(len(dataset))):
        raise ValueError(
            f"{option}: its {len(table)} rows do not number the {len(dataset)} rows of the dataset from 0, each once. "
            "Write it again from this dataset."
        )
    names = names.take(pa.array(order))
    if TASK_FILE_COLUMN in dataset.column_names:
        raise ValueError(f"{option}: the dataset has a column {TASK_FILE_COLUMN!r} already: rename or remove it.")
    return dataset.add_column(TASK_FILE_COLUMN, names)


class TaskGrouper(Grouper):
    """Groups by one or more label columns.

    Args:
        columns: label columns; the labels of several are joined.
        min_size: tasks with fewer rows merge into one group `other`.

    Raises:
        ValueError: when `columns` is empty.
    """

    metric = "task"

    def __init__(self, *, columns: list[str], min_size: int = 1) -> None:
        if not columns:
            raise ValueError("columns=[]: no label column. Name one or more.")
        super().__init__(columns=list(columns), min_size=min_size)

    def read(self, rows: Rows) -> tuple[NDArray[np.int64], list[str]]:
        return rows.label_codes(self.options["columns"])

    def fit_values(self, values: tuple[NDArray[np.int64], list[str]]) -> None:
        codes, labels = values
        missing = int(np.count_nonzero(codes < 0))
        counts = dict(zip(labels, np.bincount(codes[codes >= 0], minlength=len(labels)).tolist(), strict=True))
        if missing:
            counts[NO_LABEL] = counts.get(NO_LABEL, 0) + missing
        self.names = sorted(label for label, count in counts.items() if count >= self.options["min_size"])
        if len(self.names) < len(counts) and OTHER not in self.names:
            self.names.append(OTHER)
        if missing:
            group = NO_LABEL if NO_LABEL in self.names else OTHER
            self.notices.append(
                f"commonit_task_column={'+'.join(self.options['columns'])}: {missing} of {len(codes)} "
                f"rows have no label and form the group {group!r}. Label or remove them."
            )

    def assign_values(self, values: tuple[NDArray[np.int64], list[str]]) -> NDArray[np.int64]:
        codes, labels = values
        ids = {name: number for number, name in enumerate(self.names)}
        # `other` holds the small tasks, so unseen tasks join it too.
        elsewhere = ids.get(OTHER, -1) if self.options["min_size"] > 1 else -1
        return np.array([ids.get(label, elsewhere) for label in [*labels, NO_LABEL]], dtype=np.int64)[codes]

    def subset(
        self, values: tuple[NDArray[np.int64], list[str]], numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[str]]:
        codes, labels = values[0][numbers], values[1]
        used, renumbered = np.unique(codes, return_inverse=True)
        missing = int(len(used) > 0 and used[0] < 0)
        return renumbered - missing, [labels[code] for code in used[missing:].tolist()]

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        pass  # the names are the whole state
