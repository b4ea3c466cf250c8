"""The registry of metrics: build a grouper from options, load one from its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter
from safetensors.numpy import load_file

from commonit_trl.config import DEFAULT_TASK_COLUMNS, CommonITArguments, num_groups_by_metric, parts_of
from commonit_trl.grouping.base import ARRAYS_FILE, FORMAT, GROUPS_FILE, Grouper
from commonit_trl.grouping.column import ColumnGrouper
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.joined import JoinedGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.task import TASK_FILE_COLUMN, TaskGrouper

GROUPERS: dict[str, type[Grouper]] = {
    grouper.metric: grouper for grouper in (TaskGrouper, LengthGrouper, EmbeddingGrouper, ColumnGrouper)
}


def build_grouper(options: CommonITArguments, columns: Sequence[str], seed: int = 0) -> Grouper:
    """Return the unfitted grouper for `options.commonit_metric`.

    Args:
        options: checked options.
        columns: the columns of the dataset.
        seed: of the embedding sample and k-means.

    Raises:
        ValueError: when the dataset has no task column to group by.
    """
    parts = [_build_part(metric, options, columns, seed) for metric in parts_of(options.commonit_metric)]
    return parts[0] if len(parts) == 1 else JoinedGrouper(*parts)


def _build_part(metric: str, options: CommonITArguments, columns: Sequence[str], seed: int) -> Grouper:
    shared: dict[str, Any] = {}
    shared["min_size"] = options.commonit_min_group_size if options.commonit_small_groups == "merge" else 1
    if metric == "task":
        return TaskGrouper(columns=resolve_task_columns(options, columns), **shared)
    if metric in (counted := num_groups_by_metric(options)):
        shared["num_groups"] = counted[metric]
    if metric == "length":
        return LengthGrouper(of=options.commonit_length_of, edges=options.commonit_length_edges, **shared)
    if metric == "column":
        column = existing_column("commonit_column", options.commonit_column, columns)
        return ColumnGrouper(column=column, **shared)
    if options.commonit_embedding_column is not None:
        existing_column("commonit_embedding_column", options.commonit_embedding_column, columns)
    return EmbeddingGrouper(
        model=options.commonit_embedding_model,
        column=options.commonit_embedding_column,
        text=options.commonit_embedding_text,
        reference=options.commonit_reference_dataset,
        reference_task_column=options.commonit_reference_task_column,
        dtype=options.commonit_embedding_dtype,
        seed=seed,
        **shared,
    )


def existing_column(option: str, column: str | None, columns: Sequence[str]) -> str:
    """Return `column`, the value of `option`.

    Raises:
        ValueError: when it is not one of `columns`.
    """
    if column is None or column not in columns:
        raise ValueError(
            f"{option}={column!r}: not a column of the dataset, which has: {', '.join(columns)}. Name one."
        )
    return column


def resolve_task_columns(options: CommonITArguments, columns: Sequence[str]) -> list[str]:
    """Return the label columns of a dataset for the metric `task`.

    Args:
        options: checked options; `commonit_task_column` overrides the default columns.
        columns: the columns of the dataset.

    Raises:
        ValueError: when the dataset lacks the columns.
    """
    given = options.commonit_task_column
    if options.commonit_task_file is not None:
        return [TASK_FILE_COLUMN]
    if given is None:
        found = [column for column in DEFAULT_TASK_COLUMNS if column in columns]
        if not found:
            raise ValueError(
                f"commonit_metric='task': the dataset has none of the columns {', '.join(DEFAULT_TASK_COLUMNS)}. It "
                f"has: {', '.join(columns)}. Set commonit_task_column to one of them."
            )
        return found[:1]
    return [existing_column("commonit_task_column", column, columns) for column in given]


def _from_options(metric: str, options: dict[str, Any]) -> Grouper:
    if "parts" in options:
        return JoinedGrouper(*(_from_options(part.pop("metric"), part) for part in options["parts"]))
    kind = GROUPERS[metric]
    types = get_type_hints(kind.__init__)
    return kind(**{name: TypeAdapter(types[name]).validate_python(value) for name, value in options.items()})


def load_grouper(directory: str | Path) -> Grouper:
    """Load the grouper that `Grouper.save` wrote into `directory`.

    Raises:
        ValueError: when a file is missing, damaged or of another format.
    """
    path = Path(directory) / GROUPS_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        texts = TypeAdapter(list[str])
        grouper = _from_options(saved["metric"], saved["options"])
        grouper.names, grouper.notices = (texts.validate_python(saved[name]) for name in ("names", "notices"))
        arrays = {}
        if saved["arrays"]:
            path = path.with_name(ARRAYS_FILE)
            arrays = load_file(path)
        grouper.restore(saved["fitted"], arrays)
    except Exception as error:  # parsers raise many types on damaged files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: not a readable set of groups ({reason}). Fit and save the groups again.") from error
    return grouper
