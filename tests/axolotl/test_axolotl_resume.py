"""Resuming under Axolotl.

1. Exact: a run killed in its second epoch resumes at the exact next micro-batch and ends with the weights of an
   uninterrupted run. One rank, unpacked, `auto_resume_from_checkpoints`; two ranks, packed, `resume_from_checkpoint`.
2. Refused: a CommonIT checkpoint does not resume with `commonit_metric: none`, because the order of rows differs.
"""

import itertools

import pytest
from helpers.axolotl_recipes import (
    axolotl,
    launch,
    make_rows,
    recipe,
    result,
    save_model,
    seen,
    write_recipe,
    write_rows,
)
from safetensors.torch import load_file

KILLED_IN_SECOND_EPOCH = 2
CASES = {
    1: {"auto_resume_from_checkpoints": True},
    2: {"sample_packing": True, "sequence_len": 512, "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module", params=CASES, ids=lambda world_size: f"W{world_size}")
def runs(request, tmp_path_factory):
    """Directory, world size and steps per epoch of the runs `whole`, `killed` and `resumed`."""
    world_size, directory = request.param, tmp_path_factory.mktemp("resume")
    save_model(directory / "model", dropout=0.1)
    data = write_rows(directory / "rows.jsonl", make_rows({"x": 23, "y": 15, "z": 4}))
    keys = {"commonit_metric": "task", "save_strategy": "steps", "save_steps": 1, **CASES[world_size]}

    def run(name, folder, **more):
        path = write_recipe(
            directory / f"{name}.yml", recipe(directory, data, output_dir=str(directory / folder), **keys, **more)
        )
        return {"name": name, "recipe": str(path)}

    whole, killed, resumed = run("whole", "whole-out"), run("killed", "killed-out"), run("resumed", "killed-out")
    if world_size > 1:  # Axolotl hangs when several CPU ranks prepare rows
        prepared = axolotl("preprocess", directory / "whole.yml")
        assert prepared.returncode == 0, prepared.stderr[-3000:]
    launch([whole], directory, world_size)
    per_epoch = result(directory / "whole")["global_step"] // 2
    killed["kill_at"] = per_epoch + KILLED_IN_SECOND_EPOCH
    launch([killed], directory, world_size, code=-9)
    if "auto_resume_from_checkpoints" not in keys:
        last = directory / "killed-out" / f"checkpoint-{per_epoch + KILLED_IN_SECOND_EPOCH}"
        resumed = run("resumed", "killed-out", resume_from_checkpoint=str(last))
    else:  # the latest checkpoint is incomplete and must be skipped
        torn = directory / "killed-out" / "checkpoint-99"
        torn.mkdir()
        (torn / "trainer_state.json").write_text('{"global_step": 9')
    launch([resumed], directory, world_size)
    return directory, world_size, per_epoch


def test_resumed_run_trains_remaining_micro_batches(runs):
    directory, world_size, per_epoch = runs
    whole, killed, resumed = (seen(directory / name, world_size) for name in ("whole", "killed", "resumed"))
    first = per_epoch + KILLED_IN_SECOND_EPOCH
    assert sorted(resumed) == list(range(first, 2 * per_epoch))
    assert resumed == {step: whole[step] for step in resumed}
    assert {step: killed[step] for step in range(first)} == {step: whole[step] for step in range(first)}


def test_resumed_run_has_same_final_weights(runs):
    directory, world_size, _ = runs
    whole = load_file(directory / "whole-out" / "model.safetensors")
    resumed = load_file(directory / "killed-out" / "model.safetensors")
    for name, weights in whole.items():
        difference = (weights - resumed[name]).abs().max().item()
        assert difference == 0 if world_size == 1 else difference <= 1e-6, name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder and a function `train(metric, output folder, **keys)`."""
    directory = tmp_path_factory.mktemp("off")
    data = write_rows(directory / "rows.jsonl", make_rows({"x": 6, "y": 6}))
    names = (f"run{number}" for number in itertools.count())

    def train(metric, folder, **keys):
        keys |= {"commonit_metric": metric, "output_dir": str(directory / folder), "num_epochs": 1}
        keys |= {"save_strategy": "steps", "save_steps": 2}
        name = next(names)
        path = write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys))
        done = axolotl("train", path, directory / name)
        trained = (directory / f"{name}.ids.rank0").exists()
        return done, trained

    for metric, folder in (("task", "ours"), ("none", "baseline")):
        done, trained = train(metric, folder, max_steps=2)
        assert done.returncode == 0 and trained, done.stderr[-3000:]
    return directory, train


@pytest.mark.parametrize("auto", [False, True])
def test_none_refuses_commonit_checkpoint(workspace, auto):
    directory, train = workspace
    checkpoint = str(directory / "ours" / "checkpoint-2")
    keys = {"auto_resume_from_checkpoints": True} if auto else {"resume_from_checkpoint": checkpoint}
    done, trained = train("none", "ours", **keys)
    assert done.returncode != 0 and not trained
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: resume_from_checkpoint={checkpoint!r}")
    assert "commonit_metric" in last and "start a new run" in last


def test_none_resumes_baseline_checkpoint(workspace):
    directory, train = workspace
    done, trained = train("none", "baseline", resume_from_checkpoint=str(directory / "baseline" / "checkpoint-2"))
    assert done.returncode == 0 and trained, done.stderr[-3000:]
