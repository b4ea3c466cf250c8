"""The rows that `commonit sft` trains and evaluates on: what TRL's dataset options name, or local files.

`dataset_name`, and the `path` of a mixture's entry, may be a hub name, a directory, or a JSON Lines, JSON,
Parquet or CSV file. In a mixture (TRL's `datasets:`) the entries are the tasks, when `commonit_metric` is
`task` and no `commonit_task_column` is named: a column `dataset`, which replaces one that rows may have, tells
them apart, and a column such as `task` that only some entries have does not matter. Unlike in TRL, a mixture's
train-test split follows `seed`, so that all ranks, and a resumed run, make the same one.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets

from commonit_trl.loading import FILE_FORMATS, load_rows

ENTRY_COLUMN = "dataset"

logger = logging.getLogger(__name__)


def load_splits(script_args: Any, mixture: Any, training_args: Any) -> tuple[Any, Any]:
    """The training rows, and the evaluation rows where `eval_strategy` asks for them, else None.

    Sets `training_args.commonit_task_column` where the entries of a mixture are the tasks.

    Args:
        script_args: TRL's `ScriptArguments`.
        mixture: TRL's `DatasetMixtureConfig`.
        training_args: a `CommonITSFTConfig`.

    Raises:
        ValueError: on data that is missing or unreadable, naming the option.
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
        entries_are_tasks = metric == "task" and training_args.commonit_task_column is None
        if entries_are_tasks:
            training_args.commonit_task_column = [ENTRY_COLUMN]
        splits = load_mixture(mixture, ENTRY_COLUMN if entries_are_tasks else None, training_args.seed)
        train_split, test_split, test_option = "train", "test", "test_split_size"
    else:
        splits = load_rows("dataset_name", name, name=script_args.dataset_config, streaming=streaming)
        train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
        test_option = "dataset_test_split"
    train = _split(splits, train_split, "Training", "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    evaluation = f"eval_strategy={training_args.eval_strategy.value!r}"
    return train, _split(splits, test_split, evaluation, f"{test_option}, or eval_strategy='no'")


def _split(splits: Any, name: str, reader: str, way_out: str) -> Any:
    if name not in splits:
        raise ValueError(f"{reader} needs the split {name!r}, and the data has: {', '.join(splits)}. Set {way_out}.")
    return splits[name]


def load_mixture(mixture: Any, entry_column: str | None, seed: int) -> DatasetDict | IterableDatasetDict:
    """The entries of a TRL `DatasetMixtureConfig`, joined as TRL's `get_dataset` joins them.

    Args:
        mixture: the `DatasetMixtureConfig`.
        entry_column: a column to add, with the name of each row's entry; None to add none.
        seed: of the train-test split.
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
            part = part.select_columns(entry.columns)
        if entry_column is not None:
            if entry_column in part.column_names:
                part = part.remove_columns(entry_column)
            part = part.add_column(entry_column, [label] * len(part))
        parts.append(part)
    if any(entry.fraction is not None for entry in entries):
        parts = _take_fractions(parts, [entry.fraction for entry in entries], streaming)
    joined = concatenate_datasets(parts)
    if test_size is not None:
        return joined.train_test_split(test_size=test_size, seed=seed)
    return (IterableDatasetDict if streaming else DatasetDict)({"train": joined})


def _take_fractions(parts: list[Dataset], fractions: list[float | None], streaming: bool) -> list[Dataset]:
    """The first rows of each part, in these proportions and as many as there are without repeating any."""
    given = [fraction for fraction in fractions if fraction is not None and fraction >= 0]
    if len(given) < len(parts) or not any(given) or streaming:
        raise ValueError(
            f"datasets: the fractions {fractions} must be numbers >= 0, for every entry or for none, and "
            "without streaming."
        )
    shares = [fraction / sum(given) for fraction in given]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
    return [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]


def entry_labels(entries: Sequence[Any]) -> list[str]:
    """A name for each entry of a mixture: a short one; where two share it, the path; then a number."""
    short = [_short_label(entry) for entry in entries]
    labels = [_source(entry) if short.count(label) > 1 else label for entry, label in zip(entries, short, strict=True)]
    seen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        seen[label] += 1
        if seen[label] > 1:
            labels[place] = f"{label} ({seen[label]})"
    return labels


def _short_label(entry: Any) -> str:
    source = Path(_source(entry))
    if source.suffix in FILE_FORMATS:
        return entry.name or source.stem
    return f"{source.name}/{entry.name}" if entry.name else source.name


def _source(entry: Any) -> str:
    """The first file of an entry that names files, else its path."""
    if isinstance(entry.data_files, list):
        return entry.data_files[0]
    return entry.data_files if isinstance(entry.data_files, str) else entry.path
