"""Starts `train_worker.py`, on one process or with torchrun on several."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("train_worker.py")


def launch(
    runs: list[dict[str, Any]], directory: Path, world_size: int = 1, killed: bool = False, fails: bool = False
) -> str:
    """Do the `runs` (see `train_worker.py`) in one launch; with `killed` it must die by SIGKILL, with `fails` by an
    error. Returns what the workers said."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = directory / f"{runs[0]['name']}.runs.json"
    spec.write_text(json.dumps([{"dir": str(directory), **run} for run in runs]), encoding="utf-8")
    command = [sys.executable]
    if world_size > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world_size), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(WORKER), str(spec)], env=environment, capture_output=True, text=True, timeout=300
    )
    said = done.stderr.partition("torch.distributed.elastic")[0][-4000:]  # the workers' words, not the launcher's
    if killed:
        assert done.returncode == -9 or "SIGKILL" in done.stderr, said
    else:
        assert (done.returncode != 0) == fails, said
    return said
