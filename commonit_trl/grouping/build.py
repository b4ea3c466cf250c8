"""From options to the grouper that they ask for."""

from collections.abc import Sequence

from commonit_trl.config import DEFAULT_NUM_GROUPS, DEFAULT_TASK_COLUMNS, CommonITArguments, nearest
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.task import TaskGrouper

GROUPERS: dict[str, type[Grouper]] = {
    grouper.metric: grouper for grouper in (TaskGrouper, LengthGrouper, EmbeddingGrouper)
}


def build_grouper(options: CommonITArguments, columns: Sequence[str], seed: int = 0) -> Grouper:
    """The unfitted grouper of `options.commonit_metric`, for a dataset with `columns`.

    Raises:
        ValueError: when the dataset has no task column to group by.
    """
    min_size = options.commonit_min_group_size
    if options.commonit_metric == "task":
        return TaskGrouper(columns=resolve_task_columns(options, columns), min_size=min_size)
    num_groups = options.commonit_num_groups or DEFAULT_NUM_GROUPS[str(options.commonit_metric)]
    if options.commonit_metric == "length":
        return LengthGrouper(
            of=options.commonit_length_of,
            num_groups=num_groups,
            edges=options.commonit_length_edges,
            min_size=min_size,
        )
    return EmbeddingGrouper(
        model=options.commonit_embedding_model,
        text=options.commonit_embedding_text,
        num_groups=num_groups,
        reference=options.commonit_reference_dataset,
        reference_task_column=options.commonit_reference_task_column,
        dtype=options.commonit_embedding_dtype,
        seed=seed,
        min_size=min_size,
    )


def resolve_task_columns(options: CommonITArguments, columns: Sequence[str]) -> list[str]:
    """The label columns that the metric `task` uses on a dataset with `columns`.

    Raises:
        ValueError: naming the dataset's columns, when none fits.
    """
    asked = options.commonit_task_column
    if asked is None:
        found = [column for column in DEFAULT_TASK_COLUMNS if column in columns]
        if not found:
            raise ValueError(
                f"commonit_metric='task' found none of the columns {', '.join(DEFAULT_TASK_COLUMNS)}; the "
                f"dataset has: {', '.join(columns)}. Name one with commonit_task_column."
            )
        return found[:1]
    for column in asked:
        if column not in columns:
            raise ValueError(
                f"commonit_task_column={column!r} is not a column of the dataset, which has: "
                f"{', '.join(columns)}; did you mean {nearest(column, columns)!r}?"
            )
    return list(asked)
