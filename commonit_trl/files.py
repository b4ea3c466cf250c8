"""Write files atomically: a temporary file in the same directory, then os.replace.

A new file gets the permissions of the umask, a replaced file keeps its own. There is no fsync, because everything that
is written here can be computed again.
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
    """Yield a temporary file, which replaces `path` if the block succeeds and is removed otherwise.

    A link, a device or a pipe at `path` is yielded itself and written through.

    Raises:
        OSError: if the directory cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path  # to replace /dev/stdout would break it for all
        return
    temporary = path.with_name(f".commonit-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(path.stat().st_mode if path.exists() else mode))  # safetensors sets others
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8; an OSError leaves an existing file unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: str | Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write `arrays` to the safetensors file `path`; errors are those of `write_text`."""
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary)
    except SafetensorError as error:  # for example of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
