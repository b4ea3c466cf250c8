"""Check the error lines of wrong input."""

import contextlib
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commonit_trl.cli import main as cli

CACHES = ("cache", "prepared")  # of libraries, and of groups
PICKLE = b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'ran'\ntRtR."
"""Creates the file `ran` when it is unpickled."""
ACTS = ("Cc", "Cs", "Zl", "Zp")
TURNS_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def acting(text: str, but: str = "") -> set[str]:
    """Return the characters of `text` that a terminal would act on."""
    marks = (mark for mark in set(text) if unicodedata.category(mark) in ACTS or mark in TURNS_DIRECTION)
    return {mark for mark in marks if mark not in but}


def files_in(directory: Path) -> set[Path]:
    """Return all files below `directory` except caches."""
    found = (path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
    return {path for path in found if not {*CACHES} & {*path.relative_to(directory).parts}}


def check_refusal(line: str, parts: Iterable[str]) -> None:
    """Check that an error is one line that cannot act on the terminal and contains `parts`, in any case."""
    assert line and not acting(line), repr(line)
    for part in parts:
        assert part.lower() in line.lower(), f"no {part!r} in: {line}"


def error_of(capfd: pytest.CaptureFixture[str], argv: Iterable[Any]) -> str:
    """Run `commonit` on wrong input; return its error line, besides which only messages on stderr are allowed."""
    capfd.readouterr()
    code = cli.main([*map(str, argv)])
    out, err = capfd.readouterr()
    lines = [line for line in err.split("\n") if line.startswith("commonit: error: ")]
    assert (code, len(lines), out) == (2, 1, "") and "Traceback" not in err, err
    return lines[0]


@contextlib.contextmanager
def no_new_file(directory: Path) -> Iterator[None]:
    """Check that the block leaves no file in `directory`."""
    before = files_in(directory)
    yield
    assert not files_in(directory) - before
