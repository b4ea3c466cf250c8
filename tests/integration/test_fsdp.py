"""I1 to I4 and I8 under real FSDP2 on two CPU ranks.

Each parameter is asserted to be a DTensor with two shards: on CPU accelerate would train plain DDP without a message.
"""

import json
import math

import pytest
from helpers.launch import launch
from helpers.toys import check_pure, check_saved_losses, check_two_epochs, id_rows, recorded, rows_in
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SIZES = [1, 5, 6, 12, 13, 30]  # W*A = 6, S = 12
OPTIONS = {
    "commonit_metric": "task",
    "gradient_accumulation_steps": 3,
    "seed": 7,
    "save_strategy": "steps",
    "save_steps": 10,
}
RUN = {"group_sizes": SIZES, "options": OPTIONS}
STATE_DICTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def read(directory, name):
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


def losses(result):
    """Return the losses and gradient norms that each step logs, with those of its group."""
    names = ("loss", "loss_g", "grad_norm")
    steps = [entry for entry in result["log"] if "loss" in entry]
    return [{name: value for name, value in entry.items() if name.startswith(names)} for entry in steps]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder of the same run under DDP."""
    directory = tmp_path_factory.mktemp("ddp")
    launch([{**RUN, "name": "ddp"}], directory, world_size=2)
    return directory


@pytest.mark.parametrize("state_dict", STATE_DICTS)
def test_fsdp2_trains_the_plan(state_dict, ddp, tmp_path):
    """1. Each rank's sharded model sees the plan's micro-batches; every row once an epoch, steps pure.
    2. Group losses, gradient norms and final weights are those of DDP.
    3. A resume in the middle of the second epoch sees the remaining micro-batches and ends with the same weights.
    4. A replan with another batch size trains the remaining rows of that epoch, in pure steps.
    """
    run = {**RUN, "fsdp": {"version": 2, "state_dict_type": state_dict}}
    checkpoint = str(tmp_path / "fsdp-out" / "checkpoint-10")
    changed = {**OPTIONS, "commonit_resume": "replan", "per_device_train_batch_size": 1, "save_strategy": "no"}
    launch(
        [
            {**run, "name": "fsdp"},
            {**run, "name": "resumed", "resume": checkpoint},
            {**run, "name": "replanned", "resume": checkpoint, "options": changed},
        ],
        tmp_path,
        world_size=2,
    )
    for name in ("fsdp", "resumed", "replanned"):
        result = read(tmp_path, name)
        assert (result["world_size"], result["shards"]) == (2, [2])
        assert "--lm_eval_tasks" in result["refused_by_compare"]  # which needs whole weights

    rows, steps = id_rows(SIZES), recorded(tmp_path / "fsdp.ids", 2)
    per_epoch = check_two_epochs(steps, rows, world_size=2, accumulation_steps=3, seed=7)

    own, expected = losses(read(tmp_path, "fsdp")), losses(read(ddp, "ddp"))
    assert len(own) == len(expected) == 2 * per_epoch
    for step, of_ddp in zip(own, expected):
        assert all(map(math.isfinite, step.values()))
        assert step == pytest.approx(of_ddp, rel=1e-5)
    weights = load_file(tmp_path / "fsdp.safetensors")
    assert_close(weights, load_file(ddp / "ddp.safetensors"))

    assert per_epoch < 10 < 2 * per_epoch
    assert recorded(tmp_path / "resumed.ids", 2) == {step: seen for step, seen in steps.items() if step >= 10}
    for step, expected in zip(losses(read(tmp_path, "resumed")), own, strict=True):  # the first from the checkpoint
        assert step == pytest.approx(expected, rel=1e-5)
    assert_close(load_file(tmp_path / "resumed.safetensors"), weights)

    replanned = recorded(tmp_path / "replanned.ids", 2)
    before = set(rows_in(steps[step] for step in range(per_epoch, 10)))
    after = set(rows_in(replanned.values()))
    assert before | after == set(range(sum(SIZES))) and not before & after
    check_pure(replanned.values(), rows)
    assert all(len(batch) == 1 for step in replanned.values() for rank in step for batch in rank)


def assert_close(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() <= 1e-6, name


def test_i8_group_losses_under_fsdp2_are_those_of_the_rows(tmp_path):
    """I8: the token-weighted loss of each group, although ranks fill their last batches with rows of the first ones;
    one group is not in the training set."""
    sizes = [9, 6, 2]
    options = {"commonit_metric": "task", "eval_strategy": "epoch", "per_device_eval_batch_size": 3}
    run = {"name": "fsdp", "group_sizes": [8, 4], "eval_group_sizes": sizes, "fsdp": {"version": 2}}
    launch([{**run, "options": options}], tmp_path, world_size=2)

    result = check_saved_losses(tmp_path, "fsdp", sizes)
    assert (result["world_size"], result["shards"]) == (2, [2])
