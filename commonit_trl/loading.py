"""Load rows by name: hub names, directories, files, patterns of files, and folders that `save_to_disk` wrote."""

import glob
import os
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SAVED = ("state.json", "dataset_dict.json")  # save_to_disk writes one of these into the folder


def load_rows(option: str, path: str, **options: Any) -> Any:
    """Load a dataset, or all its splits, as `load_dataset(path, **options)` does.

    Args:
        option: name of the option that gave `path`, for errors.
        path: hub name, directory, folder of `save_to_disk`, or a JSON Lines, JSON, Parquet or CSV file, which may be
            compressed; or a pattern of such files (`data/*.jsonl`).
        options: of `load_dataset`.

    Raises:
        ValueError: in one line that names `option`, whatever fails.
    """
    try:
        if any((Path(path) / name).is_file() for name in _SAVED):
            return _load_saved(path, **options)
        if file_stem(path) is None:
            return load_dataset(path, **options)
        return _load_files(path, **options)
    except Exception as error:  # datasets, the hub and the parsers raise errors of many kinds
        reason = error.__cause__ or error
        said = ": ".join(filter(None, (type(reason).__name__, " ".join(str(reason).split())[:300])))
        raise ValueError(
            f"{option}={path!r} cannot be loaded ({said}): give a hub name, a directory or a "
            f"file ({', '.join(FILE_FORMATS)}, also compressed or as a pattern) that has rows."
        ) from error


def file_stem(path: str) -> str | None:
    """Name a file or pattern without its endings; None where `path` names neither, but a directory or a dataset."""
    file = _without_compression(path)
    return file.stem if file.suffix in FILE_FORMATS else None


def _without_compression(path: str) -> Path:
    return Path(path).with_suffix("") if Path(path).suffix in _COMPRESSED else Path(path)


def _load_files(path: str, **options: Any) -> Any:
    files = [path] if Path(path).is_file() else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        raise FileNotFoundError("no such file")
    if not any(Path(file).stat().st_size for file in files):
        raise ValueError("it is empty")
    # As a list of escaped names: datasets skips matches of a pattern in some folders.
    names = [glob.escape(file) for file in files]
    return load_dataset(FILE_FORMATS[_without_compression(path).suffix], **options | {"data_files": names})


def _load_saved(path: str, split: str | None = None, streaming: bool = False, **options: Any) -> Any:
    unread = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if unread:
        raise ValueError(f"{', '.join(unread)} does not apply to a folder that save_to_disk wrote")
    loaded = load_from_disk(path)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if split is not None:
        rows = _of_split(splits, split)
        return rows.to_iterable_dataset() if streaming else rows
    if streaming:
        return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
    return splits


def _of_split(splits: DatasetDict, split: str) -> Dataset:
    """The rows that a split of `load_dataset` names, such as `train` or `train[:10%]`."""
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])
