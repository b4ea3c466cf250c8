"""The launch lines of the example configurations train the plan, on two CPU ranks.

Each rank's model records the rows that it sees. The DeepSpeed lines make a real engine of their stage, the FSDP line a
sharded model; `cli_worker.py` runs them on CPU ranks.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import free_port
from helpers.toys import check_pure, id_rows, plan_of, recorded, rows_in, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "example_configs"
SIZES = [5, 6, 13]
FLAGS = {
    "commonit_metric": "task",
    "bf16": False,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 7,
}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ON_TWO_RANKS = {
    "torchrun": "--nproc_per_node 2 --master_port",
    "accelerate launch": "--num_processes 2 --main_process_port",
    "deepspeed": "--num_gpus 2 --master_port",
}


def launch_line(example, launcher):
    """Return the launch command in the first lines of `example`."""
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    lines = [json.loads(text)["launch"]] if example.endswith(".json") else text.splitlines()
    return next(line.strip("# ") for line in lines if line.strip("# ").startswith(launcher))


def options(flags):
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def make_inputs(directory):
    """Save a model and rows, and return the flags that name them."""
    tiny_model().save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    id_rows(SIZES).to_json(directory / "rows.jsonl")
    paths = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "out"}
    return {**{flag: directory / name for flag, name in paths.items()}, **FLAGS}


def launch(line, launcher, flags, environment):
    """Run `line` from the repository's root, with a recorder around `commonit_trl` and `flags` at the end."""
    assert " commonit_trl sft " in line
    line = line.replace("--nproc_per_node 4 ", "").replace(" commonit_trl ", " helpers.cli_worker ")
    line = line.replace(launcher, f"{launcher} {ON_TWO_RANKS[launcher]} {free_port()}", 1)
    program, *arguments = shlex.split(line)
    launched = subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *arguments, *options(flags)],
        cwd=EXAMPLES.parent,
        env=os.environ | QUIET | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = launched.communicate(timeout=240)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)  # the ranks too
    assert launched.returncode == 0, output[-4000:]


@pytest.mark.parametrize(
    ("example", "launcher", "engine", "stage"),
    [
        ("trl/task.yaml", "torchrun", "DistributedDataParallel", None),
        ("accelerate/ddp.yaml", "accelerate launch", "DistributedDataParallel", None),
        ("accelerate/fsdp2.yaml", "accelerate launch", "FSDPLlamaForCausalLM", None),
        ("accelerate/zero2.yaml", "accelerate launch", "DeepSpeedEngine", 2),
        ("deepspeed/zero2.json", "deepspeed", "DeepSpeedEngine", 2),
        ("deepspeed/zero3.json", "deepspeed", "DeepSpeedEngine", 3),
    ],
)
def test_two_ranks_train_the_plan(example, launcher, engine, stage, tmp_path):
    flags = make_inputs(tmp_path)
    environment = {
        "COMMONIT_RECORD": str(tmp_path / "seen"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    if engine == "DistributedDataParallel":
        flags["use_cpu"] = True
    else:
        flags["accelerator_config"] = '{"use_configured_state": true}'
    if engine == "DeepSpeedEngine":
        environment["DS_ACCELERATOR"] = "cpu"
    line = launch_line(example, launcher).replace("trl/length.yaml", "trl/task.yaml")
    launch(line, launcher, flags | {"commonit_task_column": "task", "commonit_min_group_size": 1}, environment)

    assert json.loads((tmp_path / "seen.json").read_text(encoding="utf-8")) == {"name": engine, "stage": stage}
    run = json.loads((tmp_path / "out" / "commonit" / "run.json").read_text(encoding="utf-8"))
    assert run["world size"] == 2

    rows = id_rows(SIZES)
    plan = plan_of(rows, world_size=2, accumulation_steps=2, seed=7)
    steps = recorded(tmp_path / "seen", world_size=2)
    assert len(steps) == plan.num_steps == 4
    for rank in range(2):
        assert [batch for step in range(4) for batch in steps[step][rank]] == list(plan.batches(rank))
    assert sorted(rows_in(steps.values())) == list(range(sum(SIZES)))
    check_pure(steps.values(), rows)


def test_commonit_sft_starts_its_own_ranks(tmp_path):
    """With accelerate's launch options, `commonit sft` needs no launcher.

    The exit code is not asserted: a CPU rank may abort as its interpreter ends, after saving (see `cli_worker.py`).
    """
    flags = {
        **make_inputs(tmp_path),
        "accelerate_config": EXAMPLES / "accelerate" / "ddp.yaml",
        "num_processes": 2,
        "main_process_port": free_port(),
        "commonit_cache_dir": tmp_path / "cache",
        "use_cpu": True,
    }
    command = [sys.executable, "-m", "commonit_trl", "sft", *options(flags)]
    environment = os.environ | QUIET
    done = subprocess.run(command, cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True, timeout=240)
    saved = tmp_path / "out" / "commonit" / "run.json"
    assert saved.exists(), done.stderr[-4000:]
    assert json.loads(saved.read_text(encoding="utf-8"))["world size"] == 2
