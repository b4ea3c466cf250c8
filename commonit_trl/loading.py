"""Rows by name: `datasets.load_dataset` for hub names and directories, and for single local files."""

import glob
from pathlib import Path
from typing import Any

from datasets import load_dataset

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(option: str, path: str, **options: Any) -> Any:
    """What `load_dataset(path, **options)` gives; `path` may also be a JSON Lines, JSON, Parquet or CSV file.

    Raises:
        ValueError: in one line that names `option`, the one that `path` was given by, whatever went wrong.
    """
    file_format = FILE_FORMATS.get(Path(path).suffix)
    try:
        if file_format is None:
            return load_dataset(path, **options)
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        if not Path(path).stat().st_size:
            raise ValueError("it is empty")
        return load_dataset(file_format, **options | {"data_files": glob.escape(path)})
    except Exception as error:  # whatever datasets, the hub or a parser raises: the user needs the option
        reason = error.__cause__ or error
        said = ": ".join(filter(None, (type(reason).__name__, " ".join(str(reason).split())[:300])))
        raise ValueError(
            f"{option}={path!r} cannot be loaded ({said}): give a hub name, a directory or a "
            f"file ({', '.join(FILE_FORMATS)}) that has rows."
        ) from error
