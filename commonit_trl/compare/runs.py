"""The runs of a comparison as processes: which are done, start the others, follow them, read what they wrote.

Each run is `commonit compare` with the user's own arguments and `--only RUN`, so that its memory, its crash and its
launcher (`--num_processes`) are its own. A run that has finished is not started again; one that fails leaves its log,
and the rest go on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from commonit_trl.compare.strategies import Run

RUNS_DIR = "runs"
RESULT_FILE, ROWS_FILE, PROGRESS_FILE, LOG_FILE = "result.json", "rows.safetensors", "progress.json", "log.txt"
LOCK_FILE = "lock"
_LOOK_EVERY = 0.3  # seconds
_LAST_WORDS = 4_000  # bytes of a log in which the reason of a failure is looked for


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run wrote down; see `one_run`."""

    run: Run
    written: dict[str, Any]
    """Of `result.json`."""
    loss: NDArray[np.float64]
    """(held-out rows,) sum of the losses of a row's tokens."""
    correct: NDArray[np.int64]
    """(held-out rows,) tokens that were the likeliest."""
    tokens: NDArray[np.int64]
    """(held-out rows,) tokens that the two count."""
    group_ids: NDArray[np.int64]
    """(held-out rows,) groups, of `written["groups"]`; -1 for none."""
    exact: NDArray[np.int64] | None
    """(held-out rows,) 1 where greedy decoding gave the expected answer."""


def directory_of(output_dir: Path, run: Run) -> Path:
    return output_dir / RUNS_DIR / run.name.replace(":", ",")  # which some file systems do not take


def read_result(output_dir: Path, run: Run, asked: dict[str, Any]) -> RunResult | None:
    """What `run` wrote; None where it has not finished.

    Raises:
        ValueError: where it was another run than is `asked` for, naming what differs, or its files are damaged.
    """
    directory = directory_of(output_dir, run)
    try:
        written = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        arrays = load_file(directory / ROWS_FILE)
        then = written["asked"]
        differ = [name for name in {**asked, **then} if then.get(name) != asked.get(name)]
        result = RunResult(
            run=run,
            written=written,
            **{name: arrays[name] for name in ("loss", "correct", "tokens", "group_ids")},
            exact=arrays.get("exact"),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"{directory / RESULT_FILE} is damaged ({type(error).__name__}): remove {directory} to do the run again."
        ) from error
    if differ:
        said = "; ".join(f"{name} ({then.get(name)!r} there, {asked.get(name)!r} now)" for name in differ)
        raise ValueError(
            f"{output_dir} has a run {run.name} with other settings: {said}. Name another output_dir, "
            f"or remove {directory}."
        )
    return result


def execute(
    output_dir: Path,
    runs: Sequence[Run],
    argv: Sequence[str],
    jobs: int,
    follow: Callable[[Run, int, int], None],
    ended: Callable[[Run, str | None], None],
) -> None:
    """Do `runs`, `jobs` of them at a time.

    Args:
        output_dir: of the comparison.
        runs: those to do.
        argv: the arguments of `commonit compare`.
        jobs: processes (or groups of ranks) at a time.
        follow: is told, now and then, the step of a run, and how many it has.
        ended: is told that a run has finished, or in one line why it failed.
    """
    waiting = list(runs)
    running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if jobs > 1:  # else they wait for each other's threads
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    before = signal.signal(signal.SIGTERM, _end)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run.name] = run, _start(directory_of(output_dir, run), run, argv, environment)
            time.sleep(_LOOK_EVERY)
            for name, (run, process) in list(running.items()):
                directory = directory_of(output_dir, run)
                with contextlib.suppress(OSError):
                    follow(run, *json.loads((directory / PROGRESS_FILE).read_text(encoding="utf-8")))
                if process.poll() is None:
                    continue
                del running[name]
                done = process.returncode == 0 and (directory / RESULT_FILE).exists()
                ended(run, None if done else _reason(directory, process.returncode))
    finally:
        for _, process in running.values():
            _stop(process)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> NoReturn:
    """Ends the process by way of its `finally`, which ends the runs."""
    raise SystemExit(128 + number)


def _start(directory: Path, run: Run, argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "commonit_trl", "compare", *argv, "--only", run.name]
    with (directory / LOG_FILE).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that it ends with its ranks, and Ctrl-C is for us to pass on
        )


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """In here this process alone does the run of `directory`, in which nothing of an earlier try is left.

    Raises:
        ValueError: where another process does it: one whose `commonit compare` was killed, or another job of an array.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(directory / LOCK_FILE, blocking=False)
        with lock:
            for name in (RESULT_FILE, ROWS_FILE, PROGRESS_FILE):
                (directory / name).unlink(missing_ok=True)
            yield
    except Timeout:
        raise ValueError(
            f"{directory} is being written by another process, which does this run: wait for it, or end it."
        ) from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(directory: Path, code: int) -> str:
    """The last line of the run's log that says something."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; {directory / LOG_FILE} has what it said"
    log = (directory / LOG_FILE).read_bytes()[-_LAST_WORDS:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} ({directory / LOG_FILE})"
