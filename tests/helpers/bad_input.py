"""Check error lines in the tests of wrong input, and record them.

With COMMONIT_BAD_INPUT_RECORD the tests append each error to that file as a line of JSON; `COMMANDS` shows how this
module makes a table of them.
"""

import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

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


def timed(directory: Path, call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `call` and its seconds; check that it leaves no file in `directory`."""
    before = files_in(directory)
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    left = files_in(directory) - before
    assert not left, left
    return result, seconds


def record(front_end: str, name: str, ends_as: str, line: str, before: str, seconds: float) -> None:
    """Record an error for the table; `before` names the thing that was not loaded yet."""
    path = os.environ.get("COMMONIT_BAD_INPUT_RECORD")
    if path:
        entry = {"front end": front_end, "case": name, "ends as": ends_as, "before": before, "seconds": seconds}
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({**entry, "line": line}) + "\n")


RECORD = "COMMONIT_BAD_INPUT_RECORD=bad.jsonl"
COMMANDS = (
    f"{RECORD} .venv/bin/python -m pytest tests/integration/test_bad_input.py tests/integration/test_refusals.py",
    f"{RECORD} .venv-lowest/bin/python -m pytest tests/axolotl/test_axolotl_bad_input.py",
    "PYTHONPATH=.:tests .venv/bin/python -m helpers.bad_input bad.jsonl",
)
TEMPORARY = re.compile(r"/[^ '\"]*/pytest-\d+/[^/]*/")
SAYS = """\
Each user error prints one line with the option, its value and the fix, and leaves no file behind. The time is that of
the call, in a process that has its imports. *seen before*: the thing that was not loaded yet; it does not exist in the
test. Lines are cut to 300 characters."""


def table(path: str) -> str:
    """Return the errors that `record` wrote to `path` as Markdown tables."""
    from benchmarks.common import machine, markdown_table

    entries = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    of_front_end: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        of_front_end.setdefault(entry["front end"], []).append(entry)
    counts = [["all", len(entries), sum(bool(entry["before"]) for entry in entries), "", ""]]
    sections = []
    for name, found in of_front_end.items():
        times = sorted(1000 * entry["seconds"] for entry in found)
        early = sum(bool(entry["before"]) for entry in found)
        counts.append([name, len(found), early, f"{times[len(times) // 2]:.0f}", f"{times[-1]:.0f}"])
        rows = [
            (entry["case"], entry["ends as"], entry["before"] or "training", f"{1000 * entry['seconds']:.0f}", said)
            for entry in found
            for said in [f"`` {TEMPORARY.sub('', entry['line'])[:300].replace('|', '/')} ``"]
        ]
        sections += [f"## {name}", markdown_table(["case", "ends as", "seen before", "ms", "line"], rows)]
    heads = ["front end", "cases", "seen before a model is loaded", "median, ms", "most, ms"]
    title, commands = (
        f"# Bad input: each error line, {date.today()}",
        "\n".join(("```bash", *COMMANDS, "```")),
    )
    return "\n\n".join([title, commands, machine(), SAYS, markdown_table(heads, counts), *sections]) + "\n"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="")
