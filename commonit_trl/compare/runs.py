"""The runs of a comparison as processes: start the missing ones, follow their progress, read their results.

Each run is `commonit compare` with the user's own arguments and `--only RUN`, so it has its own memory and launcher
(`--num_processes`), and a crash ends that run only. A finished run is not started again. A failed run keeps its log,
and the other runs continue.
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
_POLL_INTERVAL = 0.3  # seconds
_LOG_TAIL = 4_000  # bytes at the end of a log that may hold the reason of a failure


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The results of a finished run; see `one_run`."""

    run: Run
    written: dict[str, Any]
    """The content of `result.json`."""
    loss: NDArray[np.float64]
    """(held-out rows,) sum of the losses of each row's tokens."""
    correct: NDArray[np.int64]
    """(held-out rows,) tokens that the model ranks first."""
    tokens: NDArray[np.int64]
    """(held-out rows,) trained tokens of each row."""
    group_ids: NDArray[np.int64]
    """(held-out rows,) index into `written["groups"]`; -1 for unassigned rows."""
    exact: NDArray[np.int64] | None
    """(held-out rows,) 1 if greedy decoding gives the expected answer; None if no answers were generated."""


def directory_of(output_dir: Path, run: Run) -> Path:
    """Return the directory of a run."""
    return output_dir / RUNS_DIR / run.name.replace(":", ",")  # some file systems do not allow colons


def read_result(output_dir: Path, run: Run, asked: dict[str, Any]) -> RunResult | None:
    """Read the results of `run`.

    Args:
        output_dir: of the comparison.
        run: the run.
        asked: the settings that the run should have.

    Returns:
        The results; None if the run has not finished.

    Raises:
        ValueError: if its files are damaged, or if it had other settings than `asked`, naming those.
    """
    directory = directory_of(output_dir, run)
    try:
        written = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        arrays = load_file(directory / ROWS_FILE)
        previous = written["asked"]
        different = [name for name in {**asked, **previous} if previous.get(name) != asked.get(name)]
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
            f"{directory / RESULT_FILE}: damaged ({type(error).__name__}). Remove {directory} to do the run again."
        ) from error
    if different:
        settings = "; ".join(f"{name} ({previous.get(name)!r} before, {asked.get(name)!r} now)" for name in different)
        raise ValueError(
            f"{output_dir}: the finished run {run.name} has other settings: {settings}. Name another output_dir, or "
            f"remove {directory}."
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
        runs: the runs to do.
        argv: the arguments of `commonit compare`.
        jobs: runs at a time.
        follow: called with a run, its current step and its number of steps.
        ended: called with a run and the reason of its failure, None if it finished.
    """
    waiting = list(runs)
    running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if jobs > 1:  # runs would otherwise compete with as many threads each as there are cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    before = signal.signal(signal.SIGTERM, _end)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run.name] = run, _start(directory_of(output_dir, run), run, argv, environment)
            time.sleep(_POLL_INTERVAL)
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
    """End the process through its `finally` blocks, which stop the runs."""
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
            start_new_session=True,  # a group of its own: stopped with its ranks, and not by Ctrl-C in the terminal
        )


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Lock the directory of a run for this process, and remove the files of an earlier attempt.

    Raises:
        ValueError: if another process does the run, such as that of a killed `commonit compare`.
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
        raise ValueError(f"{directory}: another process is doing this run. Wait for it, or stop it.") from None


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
    """Return the last line of the run's log, or the signal that ended the run."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name} ({directory / LOG_FILE})"
    log = (directory / LOG_FILE).read_bytes()[-_LOG_TAIL:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it printed nothing'} ({directory / LOG_FILE})"
