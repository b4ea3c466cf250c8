"""Fitted groups and assignments on disk, so that a second run does not compute them again.

An entry is a directory named by a fingerprint of what decides its content: the values that the metric reads
from the rows, the metric's options, and the identity of its model and reference data. It holds the saved
grouper, the assignment and a checksum of each file. Entries are written to a temporary directory and renamed,
under a file lock, so no reader sees half of one. Processes that want the same entry share the work (work.py)
in a directory beside it, and go on from what an interrupted run has left there; whoever is ready first writes
the entry. Nobody waits in a collective, so a long encoding cannot run into the process group's timeout.

Cost: hashing, about 0.5 GB of text a second.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import config as datasets_config
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import load_file

from commonit_trl.files import write_arrays
from commonit_trl.grouping.base import Grouper, load_grouper
from commonit_trl.grouping.work import SharedWork, WorkIsDone
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

_ASSIGNMENT_FILE = "assignment.safetensors"
_CHECKSUM_FILE = "checksums.json"
_VERSION = 2


def default_cache_dir() -> Path:
    """`commonit` in the datasets library's cache."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "commonit"


def fit_assign_cached(
    grouper: Grouper, rows: Rows, cache_dir: str | Path | None = None
) -> tuple[Grouper, NDArray[np.int64]]:
    """Fit `grouper` to `rows` and assign them, or load what an earlier call with the same inputs computed.

    Returns:
        The fitted grouper, whose `notices` the caller may log, and (rows,) group ids.

    Raises:
        ValueError: when the cache directory cannot be written or read.
    """
    cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    values = grouper.read(rows)
    entry = cache_dir / fingerprint(grouper, values)
    named_errors = functools.partial(_named_errors, cache_dir)
    with named_errors():
        cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{entry}.lock")
    work = SharedWork(entry.with_name(f"{entry.name}.work"), entry.exists, named_errors)
    while True:
        with named_errors(), lock:
            cached = _load_entry(entry, len(rows))
        if cached is not None:
            return cached
        try:
            group_ids = grouper.fit_assign(values, work)
        except WorkIsDone:  # by another process: load it
            continue
        else:
            with named_errors(), lock:
                if not entry.exists():
                    _write_entry(entry, grouper, group_ids)
            return grouper, group_ids
        finally:
            if entry.exists():
                work.remove()


@contextlib.contextmanager
def _named_errors(cache_dir: Path) -> Iterator[None]:
    """Say of an error of the file system which option it comes from."""
    try:
        yield
    except (OSError, ValueError) as error:  # the second: no path at all, such as one with a NUL
        raise ValueError(
            f"commonit_cache_dir={str(cache_dir)!r} cannot be used ({type(error).__name__}: {error}): name a "
            "directory that this user may write."
        ) from error


def fingerprint(grouper: Grouper, values: Any) -> str:
    """A hash of everything that decides the groups of rows whose `Grouper.read` gave `values`."""
    content = hashlib.blake2b(digest_size=16)
    content.update(json.dumps([_VERSION, grouper.identity()], sort_keys=True).encode())
    hashed = grouper.hashed(values)
    for part in hashed if isinstance(hashed, tuple) else (hashed,):
        if isinstance(part, np.ndarray):
            content.update(part.tobytes())
        else:
            for text in part:
                content.update(b"%d:" % len(text.encode()))
                content.update(text.encode())
    return content.hexdigest()


def _load_entry(entry: Path, num_rows: int) -> tuple[Grouper, NDArray[np.int64]] | None:
    if not entry.exists():
        return None
    try:
        checksums = json.loads((entry / _CHECKSUM_FILE).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if _checksum(entry / name) != checksum:
                raise ValueError(f"{name} is not what was written")
        grouper = load_grouper(entry)
        group_ids = load_file(entry / _ASSIGNMENT_FILE)["group_ids"]
        if len(group_ids) != num_rows:
            raise ValueError(f"{len(group_ids)} assignments for {num_rows} rows")
    except Exception as error:  # a damaged file fails in the parser's own way; any failure means: build it again
        logger.warning(
            "The cached groups in %s are damaged (%s: %s) and are computed again.",
            entry,
            type(error).__name__,
            error,
        )
        shutil.rmtree(entry)
        return None
    logger.info("Loaded groups from %s.", entry)
    return grouper, group_ids


def _write_entry(entry: Path, grouper: Grouper, group_ids: NDArray[np.int64]) -> None:
    temporary = entry.with_name(f"{entry.name}.{secrets.token_hex(8)}")
    temporary.mkdir()  # not mkdtemp, whose directories nobody else may read
    try:
        grouper.save(temporary)
        write_arrays(temporary / _ASSIGNMENT_FILE, {"group_ids": group_ids})
        checksums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        (temporary / _CHECKSUM_FILE).write_text(json.dumps(checksums), encoding="utf-8")
        os.replace(temporary, entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
