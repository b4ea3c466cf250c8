"""I1 to I4 and I8 through a real DeepSpeed engine, ZeRO-2 and ZeRO-3, on two CPU ranks started by torchrun.

The stage is asserted on the engine itself: with `use_cpu=True` transformers would silently train plain DDP.
"""

import json

import pytest
from helpers.launch import launch, zero_config
from helpers.toys import check_saved_losses, check_two_epochs, id_rows, recorded

SIZES = [1, 5, 6, 12, 13, 30]  # W*A = 6, S = 12


def last_loss(result):
    return [entry["loss"] for entry in result["log"] if "loss" in entry][-1]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_the_plan(stage, tmp_path):
    """A real engine of the stage sees, on each rank, the plan's micro-batches; every row once an epoch, steps pure, and
    a resume in the middle of the second epoch sees the remaining micro-batches."""
    options = {
        "commonit_metric": "task",
        "gradient_accumulation_steps": 3,
        "seed": 7,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    run = {"name": "zero", "group_sizes": SIZES, "deepspeed": zero_config(stage), "options": options}
    checkpoint = str(tmp_path / "zero-out" / "checkpoint-10")
    launch([run, {**run, "name": "resumed", "resume": checkpoint}], tmp_path, world_size=2)

    result = json.loads((tmp_path / "zero.json").read_text())
    assert (result["engine"], result["stage"], result["world_size"]) == ("DeepSpeedEngine", stage, 2)
    assert ("--lm_eval_tasks" in (result["refused_by_compare"] or "")) == (stage == 3)  # which shards the weights
    steps = recorded(tmp_path / "zero.ids", 2)
    per_epoch = check_two_epochs(steps, id_rows(SIZES), world_size=2, accumulation_steps=3, seed=7)

    resumed = recorded(tmp_path / "resumed.ids", 2)
    assert per_epoch < 10 < 2 * per_epoch
    assert resumed == {step: seen for step, seen in steps.items() if step >= 10}
    assert last_loss(json.loads((tmp_path / "resumed.json").read_text())) == pytest.approx(last_loss(result))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_i8_group_losses_under_zero_are_those_of_the_rows(stage, tmp_path):
    """I8: evaluation by a real engine of the stage gives the token-weighted loss of each group, although ranks fill
    their last batches with rows of the first ones; one group is not in the training set."""
    sizes = [9, 6, 2]
    options = {"commonit_metric": "task", "eval_strategy": "epoch", "per_device_eval_batch_size": 3}
    run = {"name": "zero", "group_sizes": [8, 4], "eval_group_sizes": sizes, "deepspeed": zero_config(stage)}
    launch([{**run, "options": options}], tmp_path, world_size=2)

    result = check_saved_losses(tmp_path, "zero", sizes)
    assert (result["engine"], result["stage"], result["world_size"]) == ("DeepSpeedEngine", stage, 2)
