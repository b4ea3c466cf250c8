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

from commonit_trl.cli.options import Options
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


def load_splits(given: Options) -> tuple[Any, Any]:
    """Load the training rows, and the evaluation rows if `eval_strategy` needs them, else None.

    Sets `commonit_task_column` if the entries of a mixture are the tasks.

    Raises:
        ValueError: on data that is missing or unreadable, naming the option.
    """
    splits, train_split, test_split, test_option = load_all_splits(given)
    train = split_of(splits, train_split, "Training", "dataset_train_split")
    strategy = given.training.eval_strategy
    if strategy == "no":
        return train, None
    return train, split_of(
        splits, test_split, f"eval_strategy={strategy.value!r}", f"{test_option}, or eval_strategy='no'"
    )


def load_all_splits(given: Options) -> tuple[Any, str, str, str]:
    """Load all splits, as `load_splits` does.

    Returns:
        The splits by name, the names of the training and the evaluation split, and the option that sets the second.
    """
    script, args, _, mixture = given
    name, metric = script.dataset_name, args.commonit_metric
    if bool(mixture.datasets) == bool(name):
        raise ValueError(
            f"dataset_name={name!r} and {len(mixture.datasets)} entries in datasets: give one of the two, a "
            "name or file, or the entries of a mixture."
        )
    streaming = mixture.streaming or script.dataset_streaming
    if streaming and args.commonit_on:
        raise ValueError(
            f"{'streaming' if mixture.streaming else 'dataset_streaming'}=True does not go with "
            f"commonit_metric={metric!r}, which needs every row beforehand: set it to False, or "
            "commonit_metric to 'none'."
        )
    if not mixture.datasets:
        splits = load_rows("dataset_name", name, name=script.dataset_config, streaming=streaming)
        return splits, script.dataset_train_split, script.dataset_test_split, "dataset_test_split"
    labelled = args.commonit_task_column is not None or args.commonit_task_file is not None
    entries_are_tasks = "task" in parts_of(metric) and not labelled
    if entries_are_tasks:
        args.commonit_task_column = [ENTRY_COLUMN]
    return _load_mixture(mixture, entries_are_tasks, args.seed), "train", "test", "test_split_size"


def named_data(given: Options) -> str:
    """Describe the data by the option that names it, and its value."""
    if given.mixture.datasets:
        return f"datasets: {', '.join(map(repr, entry_labels(given.mixture.datasets)))}"
    return f"dataset_name={given.script.dataset_name!r}"


def split_of(splits: Any, name: str, reader: str, way_out: str) -> Any:
    """Return the split `name`, or raise an error that names its reader and the options to set."""
    if name not in splits:
        raise ValueError(f"{reader} needs the split {name!r}, and the data has: {', '.join(splits)}. Set {way_out}.")
    return splits[name]


def check_rows(rows: Any, given: Options) -> None:
    """Refuse rows of a split that TRL's preparation cannot read; streams are not checked.

    Checks columns, types, missing values and encoding, in one pass over the columns that TRL reads.

    Raises:
        ValueError: naming the column and the row.
    """
    if not isinstance(rows, Dataset):
        return
    try:
        _check_columns(rows, given.training.dataset_text_field)
    except ValueError as error:
        raise ValueError(f"{named_data(given)}: {error}") from error


def _check_columns(rows: Dataset, text_field: str) -> None:
    columns = {name: rows.data.column(name) for name in rows.column_names}
    read = next((form for form in _FORMS if form[0] in columns), (text_field,))
    missing = [name for name in read if name not in columns]
    if missing:
        raise ValueError(
            f"there is no column {missing[0]!r} among {', '.join(map(repr, columns))}: give prompt and completion, "
            "messages, or text in the column that dataset_text_field names."
        )
    for name, values in columns.items():
        if name in (*read, "labels"):
            _check_values(values, name)
        if name in read or _kind_of(values.type) == "text":
            try:
                values.validate(full=True)
            except pa.ArrowInvalid as error:
                raise ValueError(f"the column {name!r} is damaged ({error}): save it as UTF-8.") from error
    if {"input_ids", "labels"} <= {*columns}:
        tokens, labels = (pc.list_value_length(columns[name]) for name in ("input_ids", "labels"))
        row = pc.index(pc.equal(tokens, labels), False).as_py()
        if row >= 0:
            raise ValueError(f"in row {row}, input_ids and labels differ in length: give each token a label.")


def _check_values(values: pa.ChunkedArray, name: str) -> None:
    found, expected = _kind_of(values.type), _KINDS.get(name, ("text",))
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise ValueError(
            f"the column {name!r} has no value in {values.null_count} of {len(values)} rows, first in row {row}: fill "
            "or remove them."
        )
    if found not in (*expected, "JSON"):
        raise ValueError(f"the column {name!r} holds {found}: make that {' or '.join(expected)}.")
    if found == "messages" and len(values[0]) == 0:  # TRL looks at the first row
        raise ValueError(f"the column {name!r} has no message in row 0: remove it.")
    if name == "input_ids" and pc.any(pc.less(pc.list_flatten(values), 0)).as_py():
        raise ValueError("the column 'input_ids' has numbers below 0: make them token ids.")


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


def _load_mixture(mixture: Any, entries_are_tasks: bool, seed: int) -> DatasetDict | IterableDatasetDict:
    """Load the entries and join them as TRL's `get_dataset` does, with a column `ENTRY_COLUMN` if they are tasks."""
    entries, streaming, test_size = mixture.datasets, mixture.streaming, mixture.test_split_size
    if streaming and test_size is not None:
        raise ValueError(f"test_split_size={test_size} does not go with streaming=True: remove one.")
    labels = entry_labels(entries)
    parts = [_load_entry(entry, streaming) for entry in entries]
    if entries_are_tasks:
        logger.info("commonit_metric='task': the tasks are the entries of datasets: %s.", ", ".join(labels))
        for place, label in enumerate(labels):
            part = parts[place].select_columns([name for name in parts[place].column_names if name != ENTRY_COLUMN])
            parts[place] = part.add_column(ENTRY_COLUMN, [label] * len(part))
    if any(entry.fraction is not None for entry in entries):
        parts = _take_fractions(parts, [entry.fraction for entry in entries], streaming)
    try:
        joined = concatenate_datasets(parts)
    except ValueError as error:  # the entries' columns have other types
        raise ValueError(f"datasets: the entries do not go together: {error}. Name shared columns: in each.") from error
    if test_size is not None:
        return joined.train_test_split(test_size=test_size, seed=seed)
    return (IterableDatasetDict if streaming else DatasetDict)({"train": joined})


def _load_entry(entry: Any, streaming: bool) -> Any:
    options = {name: getattr(entry, name) for name in ("name", "data_dir", "data_files")}
    part = load_rows("datasets: path", entry.path, split=entry.split or "train", streaming=streaming, **options)
    if entry.columns is None:
        return part
    if not {*entry.columns} <= {*part.column_names} or len({*entry.columns}) < len(entry.columns):
        raise ValueError(
            f"datasets: columns={entry.columns!r} of {entry.path!r} must be some of {', '.join(part.column_names)}, "
            "each once."
        )
    return part.select_columns(entry.columns)


def _take_fractions(parts: list[Dataset], fractions: list[float | None], streaming: bool) -> list[Dataset]:
    """Return the first rows of each part, in these proportions, as many as possible without repeating any."""
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
