"""Run `train_worker.py` on one rank or several."""

import json
import os
from pathlib import Path
from typing import Any

from helpers import forked

WORKER = Path(__file__).with_name("train_worker.py")


def launch(
    runs: list[dict[str, Any]], directory: Path, world_size: int = 1, killed: bool = False, fails: bool = False
) -> str:
    """Run `runs` (see `train_worker.py`) in one launch and return the workers' stderr.

    The launch must end by SIGKILL with `killed`, and by an error with `fails`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    spec = directory / f"{runs[0]['name']}.runs.json"
    spec.write_text(json.dumps([{"dir": str(directory), **run} for run in runs]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = forked.run([str(WORKER), str(spec)], env=environment, cwd=directory, world_size=world_size)
    output = done.stderr[-4000:]
    if killed:
        assert done.returncode == -9, output
    else:
        assert (done.returncode != 0) == fails, output
    return output
