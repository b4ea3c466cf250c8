"""I1, I2 and I4 on two Ray workers, checked on the rows that each worker's model sees.

1. TRL: `examples/ray_train.py` trains the plans of both epochs. One worker dies in the second epoch; Ray restarts the
   run, which resumes at the next micro-batch after the checkpoint.
2. Axolotl with `use_ray: true`: all steps are pure, and each epoch sees every row.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ray_worker
from helpers.axolotl_recipes import ENVIRONMENT, PLUGIN, make_rows, recipe, seen, write_recipe, write_rows
from helpers.toys import check_two_epochs, epochs_of, id_rows, plan_of, recorded, rows_in, tiny_model, tiny_tokenizer

TESTS = Path(__file__).parents[1]
SIZES = [5, 6, 13, 1]
EPOCHS = 2
SAVED_EVERY = 2
TASKS = {"sum": 13, "poem": 6, "capital": 5, "rare": 1}


def train(front_end, *arguments, directory):
    """Run `ray_worker.py` in a new process."""
    environment = os.environ | ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ray_worker.__file__, front_end, *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def trl_steps(tmp_path_factory):
    """Steps of the first attempt, which a worker's death ends, and of the second."""
    directory = tmp_path_factory.mktemp("trl")
    tiny_model().save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    id_rows(SIZES).to_json(directory / "rows.jsonl")
    config = {
        "model_name_or_path": str(directory / "model"),
        "dataset_name": str(directory / "rows.jsonl"),
        "output_dir": str(directory / "out"),
        "commonit_metric": "task",
        "commonit_cache_dir": str(directory / "groups"),
        "use_cpu": True,
        "bf16": False,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": SAVED_EVERY,
        "seed": 7,
    }
    own = ["--workers", 2, "--max-failures", 1, "--storage", directory / "ray"]
    path = write_recipe(directory / "config.yaml", config)
    train("trl", directory / "seen", *own, "--config", path, directory=directory)
    run = json.loads((directory / "out" / "commonit" / "run.json").read_text(encoding="utf-8"))
    assert run["world size"] == 2
    return [recorded(directory / f"seen{attempt}", world_size=2) for attempt in range(2)]


def test_trl_trains_the_plans_through_a_death(trl_steps):
    before, after = trl_steps
    rows = id_rows(SIZES)
    geometry = {"world_size": 2, "accumulation_steps": 2, "seed": 7}
    per_epoch = plan_of(rows, **geometry).num_steps
    resumed_at = ray_worker.KILL_AT // SAVED_EVERY * SAVED_EVERY
    assert per_epoch < resumed_at < ray_worker.KILL_AT < EPOCHS * per_epoch  # inside the second epoch
    assert sorted(after) == list(range(resumed_at, EPOCHS * per_epoch))
    steps = {number: before[number] for number in range(resumed_at)} | after
    check_two_epochs(steps, rows, **geometry)


@pytest.fixture(scope="module")
def axolotl_steps(tmp_path_factory):
    """Optimizer step -> rank -> micro-step -> row numbers, and the rows."""
    directory = tmp_path_factory.mktemp("axolotl")
    rows = make_rows(TASKS)
    keys = recipe(
        directory,
        write_rows(directory / "rows.jsonl", rows),
        plugins=[PLUGIN, "helpers.axolotl_recorder.OnCpuPlugin", "helpers.axolotl_recorder.RecorderPlugin"],
        commonit_metric="task",
        commonit_task_column="task",
        gradient_accumulation_steps=2,
        num_epochs=EPOCHS,
        use_ray=True,
        ray_num_workers=2,
        resources_per_worker={"CPU": 1},
        dataset_num_proc=1,
    )
    path = write_recipe(directory / "ray.yml", keys)
    train("axolotl", directory / "seen", path, directory=directory)
    return seen(directory / "seen", world_size=2), rows


def test_axolotl_trains_every_row_in_pure_steps(axolotl_steps):
    steps, rows = axolotl_steps
    assert len(steps) == EPOCHS * sum(-(-size // 8) for size in TASKS.values())
    for step in steps.values():
        assert [len(rank) for rank in step] == [2, 2]
        assert len({rows[row]["task"] for row in rows_in([step])}) == 1
    for trained in epochs_of(steps, EPOCHS):
        times = Counter(rows_in(trained))
        assert set(times) == set(range(len(rows)))
        assert {rows[row]["task"] for row, count in times.items() if count > 1} <= {"rare"}  # fewer than micro-batches
