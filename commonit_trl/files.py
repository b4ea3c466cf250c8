"""The one way in which this package writes a file: beside its place, then into it, so that no reader, and no crash,
meets half of one.

A file that is new gets the permissions that the umask leaves; one that is replaced keeps those it had. Nothing waits
for the disk (fsync): what is written here can be computed again, and a machine that loses power loses more than that.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file in the directory of `path`, to be written; it becomes `path` when the block ends without an
    error, and is removed otherwise.

    A link, a device or a pipe at `path` is given as it is and written through.

    Raises:
        OSError: where the directory cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path  # to replace /dev/stdout would break it for all
        return
    temporary = path.with_name(f".commonit-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # of which the umask takes some
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(path.stat().st_mode if path.exists() else mode))  # safetensors has its own idea
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Make `text`, in UTF-8, the content of the file `path`.

    Raises:
        OSError: where it cannot be written; a file that was there before is then as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: str | Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> None:
    """Make `arrays` and `metadata` the content of the safetensors file `path`.

    Raises:
        OSError: as `write_text`.
    """
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
