"""Keep the messages of libraries off the terminal of `commonit inspect`, `group`, `compare` and `demo`.

While such a command runs, the file descriptors 1 and 2 point to a log file, and the command prints to duplicates of
the real ones. Loggers, `warnings` and `print` could be redirected in Python, but torch (C++), tokenizers (Rust) and the
compilers that DeepSpeed probes write to the descriptors. Progress bars of libraries show on a terminal, one at a time.
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from commonit_trl.files import replacing
from commonit_trl.sanitize import sanitize

LOG_FILE = "libraries.log"


@dataclass
class Screen:
    """The terminal, or the pipes, of a quiet command."""

    stdout: TextIO
    stderr: TextIO
    log_dir: Path | None = None
    """The output directory, which gets the log once the command ends; None leaves the log in the temp directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that shows the messages of libraries."""
    parser.add_argument("--verbose", action="store_true", help="print the messages of libraries too, to stderr")


@contextlib.contextmanager
def quiet_libraries(*, verbose: bool = False) -> Iterator[Screen]:
    """Log what libraries print; at the end, name the log on stderr if it is not empty.

    Args:
        verbose: print the messages of libraries to stderr instead; stdout holds the command's own output either way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        screen = Screen(stdout=_duplicate(sys.stdout, stack), stderr=_duplicate(sys.stderr, stack))
        stdout, stderr = os.dup(1), os.dup(2)
        if verbose:
            path = None
            os.dup2(2, 1)
        else:
            descriptor, name = tempfile.mkstemp(prefix="commonit-", suffix=".log")
            path = Path(name)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)
            stack.enter_context(_one_bar(screen.stderr))
        try:
            yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for real, number in ((stdout, 1), (stderr, 2)):
                os.dup2(real, number)
                os.close(real)
            if path is not None and (kept := _keep(path, screen.log_dir)) is not None:
                print(f"Library messages: {sanitize(str(kept))}", file=sys.stderr)


def hide_unused_deepspeed() -> None:
    """Drop the notices of an installed DeepSpeed in runs that do not use it."""
    logging.getLogger("DeepSpeed").addFilter(_is_deepspeed_message)


def _is_deepspeed_message(record: logging.LogRecord) -> bool:
    # transformers and accelerate set this variable as soon as a run is configured for DeepSpeed.
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or record.levelno >= logging.ERROR


def _duplicate(stream: TextIO, stack: contextlib.ExitStack) -> TextIO:
    """Return a stream to where `stream` writes now; `stream` itself if it has no descriptor, as in a notebook."""
    try:
        descriptor = os.dup(stream.fileno())
    except io.UnsupportedOperation:
        return stream
    return stack.enter_context(
        open(descriptor, "w", encoding=stream.encoding, errors=stream.errors, buffering=1, newline="\n")
    )


@contextlib.contextmanager
def _one_bar(stderr: TextIO) -> Iterator[None]:
    """Show the outermost tqdm bar alone, on `stderr` if it is a terminal; bars that other bars contain stay hidden."""
    from tqdm import tqdm

    make = tqdm.__init__
    show = stderr.isatty() and os.environ.get("RANK", "0") == "0"
    bars: weakref.WeakSet[Any] = weakref.WeakSet()

    def make_one(bar: Any, *args: Any, **options: Any) -> None:
        hidden = not show or bool(options.get("disable")) or any(not other.disable for other in bars)
        make(bar, *args, **options | {"file": stderr, "leave": False, "disable": hidden})
        bars.add(bar)

    tqdm.__init__ = make_one  # libraries have no option for the stream of a bar
    try:
        yield
    finally:
        tqdm.__init__ = make


def _keep(log: Path, directory: Path | None) -> Path | None:
    """Move a log that is not empty to `directory`, if that exists; return its path."""
    if not log.stat().st_size:
        log.unlink()
        return None
    if directory is not None:
        with contextlib.suppress(OSError), replacing(directory / LOG_FILE) as temporary:
            shutil.copyfile(log, temporary)
            log.unlink()
            return directory / LOG_FILE
    return log
