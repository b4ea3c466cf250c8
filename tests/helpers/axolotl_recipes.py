"""Tiny Axolotl recipes with numbered rows, run in one process or several."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from helpers import forked
from helpers.toys import recorded, tiny_model, tiny_tokenizer

WORKER = Path(__file__).with_name("axolotl_worker.py")
PLUGIN = "axolotl_plugin.CommonITPlugin"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "ACCELERATE_USE_CPU": "1",
    "COLUMNS": "200",
}


def make_rows(group_sizes: dict[str, int], seed: int = 0, first: int = 0) -> list[dict[str, Any]]:
    """Make shuffled alpaca rows of different lengths; `instruction` starts with the row number."""
    rng = random.Random(seed)
    tasks = [task for task, size in group_sizes.items() for _ in range(size)]
    rng.shuffle(tasks)
    return [
        {
            "instruction": f"#{number}#" + "q" * rng.randint(1, 20),
            "input": "",
            "output": "a" * rng.randint(1, 40),
            "task": task,
        }
        for number, task in enumerate(tasks, start=first)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(directory: Path, model: str = "llama", dropout: float = 0.0) -> str:
    """Save a tiny model and its tokenizer, and return the path."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_model(model, dropout=dropout).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def recipe(directory: Path, datasets: Any, **keys: Any) -> dict[str, Any]:
    """Make a recipe for the tiny model in `directory`; a key that is None is omitted.

    Args:
        datasets: a path of alpaca rows, or the entries of `datasets:`.
    """
    if isinstance(datasets, str | Path):
        datasets = [{"path": str(datasets), "type": "alpaca"}]
    model = directory / "model"
    keys = {
        "plugins": [PLUGIN, "helpers.axolotl_recorder.RecorderPlugin"],
        "base_model": str(model) if model.exists() else save_model(model),
        "special_tokens": {"pad_token": "<pad>"},
        "datasets": datasets,
        "dataset_prepared_path": str(directory / "prepared"),
        "commonit_cache_dir": str(directory / "groups") if keys.get("commonit_metric") else None,
        "commonit_report": False if keys.get("commonit_metric") else None,
        "sequence_len": 512,
        "pad_to_sequence_len": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "attn_implementation": "sdpa" if keys.get("sample_packing") else "eager",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 7,
        "dataloader_pin_memory": False,
        "output_dir": str(directory / "out"),
        **keys,
    }
    return {key: value for key, value in keys.items() if value is not None}


def write_recipe(path: Path, keys: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def axolotl(
    command: str, path: Path, record: Path | None = None, *flags: str, start: Callable[..., Any] = forked.run
) -> subprocess.CompletedProcess[str]:
    """Run `axolotl <command> <path>` as on a machine without GPUs.

    Args:
        start: runs the program: `forked.run`, or `process` for a new process.
    """
    environment = {**os.environ, **ENVIRONMENT}
    paths = [str(WORKER.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if record is not None:
        environment["COMMONIT_TEST_RECORD"] = str(record)
    launcher = ["--launcher", "python"] if command == "train" else []
    program = str(Path(sys.executable).with_name("axolotl"))
    return start([program, command, str(path), *launcher, *flags], env=environment, cwd=path.parent)


def process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def launch(
    runs: list[dict[str, Any]], directory: Path, world_size: int = 1, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `runs` (see `axolotl_worker.py`) in one launch, which must end with `code` (-9: by SIGKILL)."""
    spec = directory / f"{runs[0]['name']}.runs.json"
    spec.write_text(json.dumps(runs), encoding="utf-8")
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("ACCELERATE_USE_CPU")  # the worker sets it where needed
    done = forked.run([str(WORKER), str(spec)], env=environment, cwd=directory, world_size=world_size, timeout=500)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def seen(path: Path, world_size: int = 1) -> dict[int, list[list[list[int]]]]:
    """Read the recorded row numbers: optimizer step -> rank -> micro-step -> row numbers."""
    return recorded(f"{path}.ids", world_size)


def result(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
