"""Run `train_worker.py` on one rank or several."""

import json
import os
from pathlib import Path
from typing import Any

from helpers import forked

WORKER = Path(__file__).with_name("train_worker.py")


def zero_config(stage: int) -> dict[str, Any]:
    """Return a DeepSpeed config that trains on CPU."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def start(script: Path, spec: Any, directory: Path, world_size: int = 1, **options: Any) -> forked.Ended:
    """Run a script of this folder with a JSON file as its argument; `options` are those of `forked.run`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "runs.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return forked.run([str(script), str(path)], env=environment, cwd=directory, world_size=world_size, **options)


def launch(runs: list[dict[str, Any]], directory: Path, world_size: int = 1, **options: Any) -> None:
    """Train `runs` (see `train_worker.py`) in one launch to their end."""
    ended = start(WORKER, [{"dir": str(directory), **run} for run in runs], directory, world_size, **options)
    assert ended.returncode == 0, ended.stderr[-4000:]
