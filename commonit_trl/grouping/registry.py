"""The registry of metrics: build a grouper from options, load one from its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from pydantic import TypeAdapter
from safetensors.numpy import load_file

from commonit_trl.config import DEFAULT_NUM_GROUPS, DEFAULT_TASK_COLUMNS, CommonITArguments
from commonit_trl.grouping.base import ARRAYS_FILE, FORMAT, GROUPS_FILE, Grouper
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.task import TaskGrouper

GROUPERS: dict[str, type[Grouper]] = {
    grouper.metric: grouper for grouper in (TaskGrouper, LengthGrouper, EmbeddingGrouper)
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
    """Return the label columns of a dataset for the metric `task`.

    Args:
        options: checked options; `commonit_task_column` overrides the default columns.
        columns: the columns of the dataset.

    Raises:
        ValueError: when the dataset lacks the columns.
    """
    given = options.commonit_task_column
    if given is None:
        found = [column for column in DEFAULT_TASK_COLUMNS if column in columns]
        if not found:
            raise ValueError(
                f"commonit_metric='task': the dataset has none of the columns {', '.join(DEFAULT_TASK_COLUMNS)}. It "
                f"has: {', '.join(columns)}. Set commonit_task_column to one of them."
            )
        return found[:1]
    for column in given:
        if column not in columns:
            raise ValueError(
                f"commonit_task_column={column!r}: not a column of the dataset, which has: {', '.join(columns)}. Name "
                "one of them."
            )
    return list(given)


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
        kind, texts = GROUPERS[saved["metric"]], TypeAdapter(list[str])
        types = get_type_hints(kind.__init__)
        options = {name: TypeAdapter(types[name]).validate_python(value) for name, value in saved["options"].items()}
        grouper = kind(**options)
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
