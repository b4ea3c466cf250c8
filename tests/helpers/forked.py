"""Runs Python programs as forks of a process that has imported torch, transformers, datasets and TRL already.

To start Python and import those takes five to nine seconds of CPU, a fork of what has them a tenth of one, and the
tests start over a hundred programs. A program, which is a script or the installed script of a command, finds its
arguments, environment, folder and output as if it had been started itself, and its rank as if by a launcher. It
imports the packages under test, Axolotl and DeepSpeed itself. The tests of launchers and of commands as users type
them start real processes.
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
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama"])
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_")


def run(
    command: list[str], *, env: Mapping[str, str], cwd: str | Path, world_size: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a script with its output captured as text; on several ranks, that of all of them.

    When a rank fails, the others are killed, as launchers do it. The return code is that of the first to fail.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, longer on a busy machine; the ranks are killed.
    """
    for name in {*env, *os.environ}:
        assert not name.startswith(READ_AT_IMPORT) or env.get(name) == os.environ.get(name), f"{name} comes too late"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        ranks = [FORKS.Process(target=_become, args=(command, {**env, **p}, cwd, outputs)) for p in _places(world_size)]
        for rank in ranks:
            rank.start()
        try:
            code = _wait(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def _places(world_size: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    if world_size == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def _wait(ranks: list[multiprocessing.process.BaseProcess], timeout: float) -> int | None:
    """Return the first exit code that is not 0, else 0; None for a hang.

    On a busy machine a run may take as many times `timeout` as processes share a processor.
    """
    left, started = {rank.sentinel: rank for rank in ranks}, time.monotonic()
    while left:
        ended = multiprocessing.connection.wait(list(left), 10)
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        if not ended and time.monotonic() - started > timeout * busy:
            return None
        for rank in map(left.pop, ended):
            rank.join()
            if rank.exitcode:
                return rank.exitcode
    return 0


def _become(command: list[str], env: dict[str, str], cwd: str | Path, outputs: list[Path]) -> None:
    """In the fork: be the program `command`."""
    gc.freeze()  # what the imports made is not walked again
    multiprocessing.set_start_method(None, force=True)  # processes of its own start as they do elsewhere
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = command
    sys.path[:0] = [str(Path(command[0]).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(command[0], run_name="__main__")
