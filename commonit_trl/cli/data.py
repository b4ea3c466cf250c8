"""Load the rows that `commonit sft` trains and evaluates on.

`dataset_name`, and the `path` of a mixture's entry, name a hub dataset, a directory, a folder of `save_to_disk`, or
JSON Lines, JSON, Parquet or CSV files. In a mixture (TRL's `datasets:`) the entries are the tasks when
`commonit_metric` is `task` and `commonit_task_column` is not set: a column `dataset`, which replaces one that rows may
have, names the entry of each row. Columns such as `task` that only some entries have do not matter. Unlike TRL, a
mixture's train-test split follows `seed`, so that all ranks, and a resumed run, make the same split.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets

from commonit_trl.config import parts_of
from commonit_trl.loading import file_stem, load_rows

ENTRY_COLUMN = "dataset"
_KINDS = {
    **dict.fromkeys(("input_ids", "labels"), ("token ids",)),
    **dict.fromkeys(("messages", "conversations"), ("messages",)),
    **dict.fromkeys(("prompt", "completion"), ("text", "messages")),
}
# What TRL reads of a row, by the column that it looks for first; without any of these, plain text.
_FORMS = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",))

logger = logging.getLogger(__name__)


def load_splits(script_args: Any, mixture: Any, training_args: Any) -> tuple[Any, Any]:
    """Load the training rows, and the evaluation rows that `eval_strategy` needs.

    Sets `training_args.commonit_task_column` where the entries of a mixture are the tasks.

    Args:
        script_args: TRL's `ScriptArguments`.
        mixture: TRL's `DatasetMixtureConfig`.
        training_args: a `CommonITSFTConfig`.

    Returns:
        The training rows, and the evaluation rows or None.

    Raises:
        ValueError: on data that is missing or unreadable, naming the option.
    """
    splits, train_split, test_split, test_option = load_all_splits(script_args, mixture, training_args)
    train = split_of(splits, train_split, "Training", "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    evaluation = f"eval_strategy={training_args.eval_strategy.value!r}"
    return train, split_of(splits, test_split, evaluation, f"{test_option}, or eval_strategy='no'")


def load_all_splits(script_args: Any, mixture: Any, training_args: Any) -> tuple[Any, str, str, str]:
    """Load all splits; arguments and errors are those of `load_splits`.

    Returns:
        The splits by name, the names of the training and the evaluation split, and the option that sets the second.
    """
    name, metric = script_args.dataset_name, training_args.commonit_metric
    if bool(mixture.datasets) == bool(name):
        raise ValueError(
            f"dataset_name={name!r} and {len(mixture.datasets)} entries in datasets: give one of the two, a "
            "name or file, or the entries of a mixture."
        )
    streaming = mixture.streaming or script_args.dataset_streaming
    if streaming and training_args.commonit_on:
        raise ValueError(
            f"{'streaming' if mixture.streaming else 'dataset_streaming'}=True does not go with "
            f"commonit_metric={metric!r}, which needs every row beforehand: set it to False, or "
            "commonit_metric to 'none'."
        )
    if mixture.datasets:
        labelled = training_args.commonit_task_column is not None or training_args.commonit_task_file is not None
        entries_are_tasks = "task" in parts_of(metric) and not labelled
        if entries_are_tasks:
            training_args.commonit_task_column = [ENTRY_COLUMN]
        splits = load_mixture(mixture, ENTRY_COLUMN if entries_are_tasks else None, training_args.seed)
        return splits, "train", "test", "test_split_size"
    splits = load_rows("dataset_name", name, name=script_args.dataset_config, streaming=streaming)
    return splits, script_args.dataset_train_split, script_args.dataset_test_split, "dataset_test_split"


def named_data(script_args: Any, mixture: Any) -> str:
    """Describe the data by the option that names it, and its value."""
    if mixture.datasets:
        return f"datasets: {', '.join(map(repr, entry_labels(mixture.datasets)))}"
    return f"dataset_name={script_args.dataset_name!r}"


def split_of(splits: Any, name: str, reader: str, way_out: str) -> Any:
    """Return the split `name`.

    Raises:
        ValueError: where it is missing, naming `reader`, which needs it, and `way_out`, the options to set.
    """
    if name not in splits:
        raise ValueError(f"{reader} needs the split {name!r}, and the data has: {', '.join(splits)}. Set {way_out}.")
    return splits[name]


def check_rows(rows: Any, option: str, text_field: str) -> None:
    """Refuse rows that TRL's preparation cannot read.

    Checks columns, types, missing values and encoding, in one pass over the columns that TRL reads. Streams are not
    checked.

    Args:
        rows: the rows of a split.
        option: that names the data, and its value.
        text_field: `dataset_text_field`, for rows of plain text.

    Raises:
        ValueError: naming the column and the row.
    """
    if not isinstance(rows, Dataset):
        return
    read = next((form for form in _FORMS if form[0] in rows.column_names), (text_field,))
    missing = [column for column in read if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{option}: there is no column {missing[0]!r} among {', '.join(map(repr, rows.column_names))}: give prompt "
            "and completion, messages, or text in the column that dataset_text_field names."
        )
    for column in rows.column_names:
        values = rows.data.column(column)
        if column in (*read, "labels"):
            _check_values(values, column, option)
        if column in read or _kind_of(values.type) == "text":
            try:
                values.validate(full=True)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{option}: the column {column!r} is damaged ({error}): save it as UTF-8.") from error
    if {"input_ids", "labels"} <= {*rows.column_names}:
        tokens, labels = (pc.list_value_length(rows.data.column(column)) for column in ("input_ids", "labels"))
        row = pc.index(pc.equal(tokens, labels), False).as_py()
        if row >= 0:
            raise ValueError(f"{option}: in row {row}, input_ids and labels differ in length: give each token a label.")


def _check_values(values: pa.ChunkedArray, column: str, option: str) -> None:
    found, wanted = _kind_of(values.type), _KINDS.get(column, ("text",))
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise ValueError(
            f"{option}: the column {column!r} has no value in {values.null_count} of {len(values)} rows, first in row "
            f"{row}: fill or remove them."
        )
    if found not in (*wanted, "JSON"):
        raise ValueError(f"{option}: the column {column!r} holds {found}: make that {' or '.join(wanted)}.")
    if found == "messages" and len(values[0]) == 0:  # TRL looks at the first row
        raise ValueError(f"{option}: the column {column!r} has no message in row 0: remove it.")
    if column == "input_ids" and pc.any(pc.less(pc.list_flatten(values), 0)).as_py():
        raise ValueError(f"{option}: the column 'input_ids' has numbers below 0: make them token ids.")


def _kind_of(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_struct(kind.value_type) or isinstance(kind.value_type, pa.BaseExtensionType):
            return "messages"  # JSON, where the messages of a column differ in keys
        if pa.types.is_integer(kind.value_type):
            return "token ids"
    # The datasets library stores values of several types as JSON.
    return "JSON" if isinstance(kind, pa.BaseExtensionType) else f"values of type {kind}"


def load_mixture(mixture: Any, entry_column: str | None, seed: int) -> DatasetDict | IterableDatasetDict:
    """Load the entries of a TRL `DatasetMixtureConfig` and join them as TRL's `get_dataset` does.

    Args:
        mixture: the `DatasetMixtureConfig`.
        entry_column: a column to add, with the name of each row's entry; None to add none.
        seed: of the train-test split.

    Returns:
        The splits: `train`, and `test` where `test_split_size` is set.

    Raises:
        ValueError: naming the option, where entries cannot be loaded or joined.
    """
    entries, streaming, test_size = mixture.datasets, mixture.streaming, mixture.test_split_size
    if streaming and test_size is not None:
        raise ValueError(f"test_split_size={test_size} does not go with streaming=True: remove one.")
    labels = entry_labels(entries)
    if entry_column is not None:
        logger.info("commonit_metric='task': the tasks are the entries of datasets: %s.", ", ".join(labels))
    parts = []
    for entry, label in zip(entries, labels, strict=True):
        part = load_rows(
            "datasets: path",
            entry.path,
            name=entry.name,
            data_dir=entry.data_dir,
            data_files=entry.data_files,
            split=entry.split or "train",
            streaming=streaming,
        )
        if entry.columns is not None:
            unknown = [column for column in entry.columns if column not in part.column_names]
            if unknown or len({*entry.columns}) < len(entry.columns):
                raise ValueError(
                    f"datasets: columns={entry.columns!r} of {entry.path!r} must be some of "
                    f"{', '.join(part.column_names)}, each once."
                )
            part = part.select_columns(entry.columns)
        if entry_column is not None:
            if entry_column in part.column_names:
                part = part.remove_columns(entry_column)
            part = part.add_column(entry_column, [label] * len(part))
        parts.append(part)
    if any(entry.fraction is not None for entry in entries):
        parts = _take_fractions(parts, [entry.fraction for entry in entries], streaming)
    try:
        joined = concatenate_datasets(parts)
    except ValueError as error:  # the entries' columns have other types
        raise ValueError(f"datasets: the entries do not go together: {error}. Name shared columns: in each.") from error
    if test_size is not None:
        return joined.train_test_split(test_size=test_size, seed=seed)
    return (IterableDatasetDict if streaming else DatasetDict)({"train": joined})


def _take_fractions(parts: list[Dataset], fractions: list[float | None], streaming: bool) -> list[Dataset]:
    """The first rows of each part, in these proportions and as many as there are without repeating any."""
    given = [fraction for fraction in fractions if fraction is not None and 0 <= fraction < math.inf]
    if len(given) < len(parts) or not any(given) or streaming:
        raise ValueError(
            f"datasets: the fractions {fractions} must be numbers >= 0, not all 0, for every entry or for none, "
            "and without streaming."
        )
    shares = [fraction / sum(given) for fraction in given]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
    return [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]


def entry_labels(entries: Sequence[Any]) -> list[str]:
    """Name each entry of a mixture: a short name; where two share it, the path; then a number."""
    short = [_short_label(entry) for entry in entries]
    labels = [_source(entry) if short.count(label) > 1 else label for entry, label in zip(entries, short, strict=True)]
    seen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        seen[label] += 1
        if seen[label] > 1:
            labels[place] = f"{label} ({seen[label]})"
    return labels


def _short_label(entry: Any) -> str:
    source = _source(entry)
    stem = file_stem(source)
    if stem is not None:
        return entry.name or (source if "*" in stem else stem)
    name = Path(source).name
    return f"{name}/{entry.name}" if entry.name else name


def _source(entry: Any) -> str:
    """The first file of an entry that names files, else its path."""
    if isinstance(entry.data_files, list):
        return entry.data_files[0]
    return entry.data_files if isinstance(entry.data_files, str) else entry.path
