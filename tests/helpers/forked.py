"""Run Python programs as forks of a process that has imported torch, transformers, datasets and TRL.

Starting Python with these imports takes five to nine seconds of CPU, a fork a tenth of a second, and the tests start
over a hundred programs. A program is a script or an installed command. Its arguments, environment, folder and output
are those of a new process, and its rank is set as by a launcher. It imports the packages under test, Axolotl and
DeepSpeed itself. Tests of launchers and of the command line start real processes.
"""

import gc
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama"])
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_")


@dataclass
class Ended:
    """A program that has ended: exit codes in the order in which ranks ended, and the output of all as text."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0, or the exit code of the first rank that failed; a negative code is a signal."""
        return next(filter(None, self.codes), 0)


def run(
    command: list[str],
    *,
    env: Mapping[str, str],
    cwd: str | Path,
    world_size: int = 1,
    timeout: float = 300,
    together: bool = True,
) -> Ended:
    """Run a script like `subprocess.run`, with the output of all ranks captured.

    Args:
        together: kill the other ranks when one fails, as a launcher does; else each rank must end alone.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, longer on a busy machine; the ranks are killed.
    """
    for name in {*env, *os.environ}:
        assert not name.startswith(READ_AT_IMPORT) or env.get(name) == os.environ.get(name), f"{name} comes too late"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        ranks = [
            FORKS.Process(target=_become, args=(command, {**env, **p}, cwd, outputs))
            for p in _rank_environments(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            codes = _wait(ranks, timeout, together)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    if codes is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return Ended(codes, stdout, stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_environments(world_size: int) -> list[dict[str, str]]:
    """Return the environment variables that a launcher sets for each rank."""
    if world_size == 1:
        return [{}]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, **address}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def _wait(ranks: list[multiprocessing.process.BaseProcess], timeout: float, together: bool) -> list[int] | None:
    """Return the exit codes up to the first failure with `together`, else all; None for a hang.

    The timeout is multiplied by the load per processor, for busy machines.
    """
    running, codes, started = {rank.sentinel: rank for rank in ranks}, [], time.monotonic()
    while running and not (together and any(codes)):
        ended = multiprocessing.connection.wait(list(running), 10)
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        if not ended and time.monotonic() - started > timeout * busy:
            return None
        for rank in map(running.pop, ended):
            rank.join()
            codes.append(rank.exitcode)
    return codes


def _become(command: list[str], env: dict[str, str], cwd: str | Path, outputs: list[Path]) -> None:
    """Run the program `command` in this fork."""
    gc.freeze()  # garbage collection skips the objects of the imports
    multiprocessing.set_start_method(None, force=True)  # its own processes use the default start method
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = command
    sys.path[:0] = [str(Path(command[0]).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(command[0], run_name="__main__")
