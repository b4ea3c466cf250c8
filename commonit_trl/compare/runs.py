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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from safetensors import SafetensorError
from safetensors.numpy import load_file

from commonit_trl.compare.strategies import Run
from commonit_trl.sanitize import sanitize

RUNS_DIR = "runs"
RESULT_FILE, ROWS_FILE, PROGRESS_FILE, LOG_FILE = "result.json", "rows.safetensors", "progress.json", "log.txt"
LOCK_FILE = "lock"
SCORE = "score "  # starts the names of the arrays of scores
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
    scores: dict[str, NDArray[np.float64]]
    """Score of lm-evaluation-harness -> (examples,) its values; the same scores in all runs."""


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
            scores={name.removeprefix(SCORE): arrays[name] for name in sorted(arrays) if name.startswith(SCORE)},
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
    output_dir: Path, runs: Sequence[Run], total: int, argv: Sequence[str], jobs: int, stderr: TextIO
) -> dict[str, str]:
    """Do `runs`, `jobs` of them at a time, under progress bars.

    Args:
        output_dir: of the comparison.
        runs: the runs to do.
        total: number of runs of the comparison.
        argv: the arguments of `commonit compare`.
        jobs: runs at a time.
        stderr: where to print.

    Returns:
        Failed run -> reason.
    """
    waiting, failed = list(runs), {}
    running: dict[str, tuple[Path, subprocess.Popen[bytes], TaskID]] = {}
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if jobs > 1:  # runs would otherwise compete with as many threads each as there are cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    console = Console(file=stderr, highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
            overall = progress.add_task("runs", total=total, completed=total - len(runs))
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    directory = directory_of(output_dir, run)
                    bar = progress.add_task(run.name, visible=False)
                    running[run.name] = directory, _start(directory, run, argv, environment), bar
                time.sleep(_POLL_INTERVAL)
                for name, (directory, process, bar) in list(running.items()):
                    with contextlib.suppress(OSError):
                        step, steps = json.loads((directory / PROGRESS_FILE).read_text(encoding="utf-8"))
                        progress.update(bar, completed=step, total=steps, visible=True)
                    if process.poll() is None:
                        continue
                    del running[name]
                    progress.remove_task(bar)
                    progress.advance(overall)
                    ended = "done"
                    if process.returncode != 0 or not (directory / RESULT_FILE).exists():
                        failed[name] = _reason(directory, process.returncode)
                        ended = f"failed: {failed[name]}"
                    console.print(Text(sanitize(f"{name}: {ended}")), soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command resumes with the runs that have not finished.")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        for _, process, _ in running.values():
            _stop(process)
        signal.signal(signal.SIGTERM, before)
    return failed


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
