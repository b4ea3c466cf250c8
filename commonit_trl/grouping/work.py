"""Work that processes share through a directory, such as the ranks of one training run.

`SharedWork.map` is called with the same items by every process. Each item is worked on by the first process that gets
its file lock; the result is a file, which the others read. A process that dies leaves its locks to the others and its
finished items to the next run. So nothing has to be known about who takes part, and nobody waits in a collective: where
nodes have directories of their own, the processes of each node share the work.

Cost: two small files an item, and the results written and read once.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets.utils import tqdm
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import safe_open

from commonit_trl.files import write_arrays

logger = logging.getLogger(__name__)


class WorkIsDone(Exception):
    """What the work was for is there: another process finished it."""


class Work:
    """Work that one process does alone, its results in memory."""

    def map(
        self, name: str, function: Callable[[Any], NDArray[Any]], items: Sequence[Any], progress: str | None = None
    ) -> list[NDArray[Any]]:
        """The results of `function` for each of `items`, an array each, in their order.

        Args:
            name: of this piece of work, the same in all processes.
            progress: what a progress bar says; none is shown by default.
        """
        return [function(item) for item in _bar(items, progress)]


ALONE = Work()


class SharedWork(Work):
    """Work that several processes share.

    Args:
        directory: for the locks and results; made where needed, removed by `remove`.
        done: whether what the work is for is there.
        named_errors: a context that says of an error of the file system what it is about.
    """

    def __init__(
        self, directory: Path, done: Callable[[], bool], named_errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.directory = directory
        self.done = done
        self.named_errors = named_errors

    def map(
        self, name: str, function: Callable[[Any], NDArray[Any]], items: Sequence[Any], progress: str | None = None
    ) -> list[NDArray[Any]]:
        """As `Work.map`; each item is worked on by one of the processes.

        Raises:
            WorkIsDone: when what the work is for is there.
        """
        left = list(range(len(items)))
        with _bar(items, progress) as bar:
            # First what is free; then, in order, what other processes have begun: they finish it, or die.
            for blocking in (False, True):
                for number in left.copy():
                    if self._finish(f"{name}-{number}", function, items[number], blocking):
                        left.remove(number)
                        bar.update()
        return [self._result(f"{name}-{number}", function, item) for number, item in enumerate(items)]

    def remove(self) -> None:
        """Remove the directory. Call it when `done` says so."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _finish(self, name: str, function: Callable[[Any], NDArray[Any]], item: Any, blocking: bool) -> bool:
        """Have the result of one item in its file; False where another process is at it and we do not wait."""
        result = self.directory / f"{name}.safetensors"
        if result.exists():
            return True
        lock = FileLock(self.directory / f"{name}.lock", blocking=blocking)
        with self._directory_in_use():
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                held = lock.acquire()
            except Timeout:
                return False
        with held:
            if not result.exists():
                if self.done():  # then the results are gone because nobody needs them
                    raise WorkIsDone
                array = np.ascontiguousarray(function(item))
                with self._directory_in_use():
                    write_arrays(result, {"result": array}, {"checksum": _checksum(array)})
        return True

    @contextlib.contextmanager
    def _directory_in_use(self) -> Iterator[None]:
        """Errors of the file system get a name, and do not count when the directory goes because the work is done."""
        with self.named_errors():
            try:
                yield
            except OSError:
                if self.done():
                    raise WorkIsDone from None
                raise

    def _result(self, name: str, function: Callable[[Any], NDArray[Any]], item: Any) -> NDArray[Any]:
        path = self.directory / f"{name}.safetensors"
        try:
            return _read(path)
        except Exception as error:  # a damaged file fails in the parser's own way; any failure means: do it again
            if self.done():
                raise WorkIsDone from None
            logger.warning("%s is damaged (%s: %s) and is computed again.", path, type(error).__name__, error)
            path.unlink(missing_ok=True)
            self._finish(name, function, item, blocking=True)
            return _read(path)


def _read(path: Path) -> NDArray[Any]:
    with safe_open(path, "numpy") as file:
        result, checksum = file.get_tensor("result"), file.metadata()["checksum"]
    if _checksum(result) != checksum:
        raise ValueError("it is not what was written")
    return result


def _checksum(array: NDArray[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(f"{array.dtype} {array.shape} ".encode() + array.tobytes())


def _bar(items: Sequence[Any], progress: str | None) -> tqdm:
    """A progress bar, of one process of each machine."""
    return tqdm(items, desc=progress, disable=progress is None or os.environ.get("LOCAL_RANK", "0") != "0")
