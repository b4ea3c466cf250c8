"""Fitted groups and assignments on disk, so that rows are grouped once.

An entry is a directory named by a fingerprint of everything that determines its content: the values that the metric
reads, its options, and the identity of its model and reference data. It holds the saved grouper, the assignment and a
checksum of each file, and is written to a temporary directory and renamed. A file lock keeps independent processes
from fitting the same groups twice.

The ranks of a run group together: (1) they check that their rows and options agree; (2) rank 0 takes the lock, in
attempts of a few seconds with a collective after each, and looks into its cache directory; (3) where the entry is
missing, each rank encodes a share, rank 0 fits and writes the entry; (4) rank 0 sends the result to all ranks. Only
rank 0's directory is used, so nodes need no shared disk.

Cost: hashing, about 0.5 GB of text per second.
"""

import contextlib
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
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import load_file

from commonit_trl.files import write_arrays
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.ranks import Ranks
from commonit_trl.grouping.registry import load_grouper
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

Grouped = tuple[Grouper, NDArray[np.int64]]
"""A fitted grouper and (rows,) group ids."""

_ASSIGNMENT_FILE = "assignment.safetensors"
_CHECKSUM_FILE = "checksums.json"
_VERSION = 4
_LOCK_SECONDS = 10.0
"""Length of one attempt to take the lock, well under any process-group timeout."""


def default_cache_dir() -> Path:
    """Return `commonit` in the cache directory of the datasets library."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "commonit"


def fit_assign_cached(grouper: Grouper, rows: Rows, cache_dir: str | Path | None = None) -> Grouped:
    """Fit `grouper` to `rows` and assign them, or load the result of an earlier call.

    In a run with several ranks, all ranks call this together and get the same result.

    Args:
        grouper: unfitted; the same metric and options on all ranks.
        rows: the same on all ranks.
        cache_dir: of rank 0; `default_cache_dir()` by default.

    Returns:
        The fitted grouper, whose `notices` the caller may log, and (rows,) group ids.

    Raises:
        ValueError: on all ranks, when the cache directory is not usable or rows or options differ between ranks.
    """
    ranks = Ranks.of_run()
    cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()

    values = ranks.run(lambda: grouper.read(rows))
    content = ranks.run(lambda: _hash_values(grouper.hashed(values)))
    _check_agreement(grouper, content, ranks)
    entry = cache_dir / ranks.broadcast(lambda: fingerprint(grouper, content))
    lock = FileLock(f"{entry}.lock")

    def acquire() -> bool:
        with _named_errors(cache_dir), contextlib.suppress(Timeout):
            cache_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_LOCK_SECONDS)
        return lock.is_locked

    def load() -> Grouped | None:
        with _named_errors(cache_dir):
            return _load_entry(entry, len(rows))

    def store() -> Grouped:
        with _named_errors(cache_dir):
            _write_entry(entry, grouper, group_ids)
        return grouper, group_ids

    try:
        while not ranks.broadcast(acquire):
            logger.info("Waiting for the process that holds %s.lock.", entry)
        grouped = ranks.broadcast(load)
        if grouped is None:
            group_ids = grouper.fit_assign(values, ranks)
            grouped = ranks.broadcast(store)
        return grouped
    finally:
        lock.release()


def fingerprint(grouper: Grouper, content: str) -> str:
    """Return a hash of everything that determines the groups; `content` is the hash of the rows' values."""
    text = json.dumps([_VERSION, grouper.identity(), content], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _hash_values(hashed: Any) -> str:
    content = hashlib.blake2b(digest_size=16)
    for part in hashed if isinstance(hashed, tuple) else (hashed,):
        if isinstance(part, np.ndarray):
            content.update(part.tobytes())
        else:
            for text in part:
                content.update(b"%d:" % len(text.encode()))
                content.update(text.encode())
    return content.hexdigest()


def _check_agreement(grouper: Grouper, content: str, ranks: Ranks) -> None:
    by_rank = ranks.gather(lambda: (grouper.metric, grouper.options, content))
    differing = [str(rank) for rank, inputs in enumerate(by_rank) if inputs != by_rank[0]]
    if differing:
        raise ValueError(
            f"commonit_metric={by_rank[0][0]!r}: rows or grouping options of rank {', '.join(differing)} differ from "
            "those of rank 0. Give every rank the same data, options and seed."
        )


@contextlib.contextmanager
def _named_errors(cache_dir: Path) -> Iterator[None]:
    """Turn errors of the file system into one that names the option."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: not a path, such as one with a NUL
        raise ValueError(
            f"commonit_cache_dir={str(cache_dir)!r}: not usable ({type(error).__name__}: {error}). Set it to a "
            "directory that this user may write."
        ) from error


def _load_entry(entry: Path, num_rows: int) -> Grouped | None:
    if not entry.exists():
        return None
    try:
        checksums = json.loads((entry / _CHECKSUM_FILE).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if _checksum(entry / name) != checksum:
                raise ValueError(f"{name}: wrong checksum")
        grouper = load_grouper(entry)
        group_ids = load_file(entry / _ASSIGNMENT_FILE)["group_ids"]
        if len(group_ids) != num_rows:
            raise ValueError(f"{len(group_ids)} assignments for {num_rows} rows")
    except Exception as error:  # parsers raise many types on damaged files
        logger.warning("%s is damaged (%s: %s). The groups are fitted again.", entry, type(error).__name__, error)
        shutil.rmtree(entry)
        return None
    logger.info("Loaded groups from %s.", entry)
    return grouper, group_ids


def _write_entry(entry: Path, grouper: Grouper, group_ids: NDArray[np.int64]) -> None:
    temporary = entry.with_name(f"{entry.name}.{secrets.token_hex(8)}")
    temporary.mkdir()  # mkdtemp would make it unreadable to other users
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
