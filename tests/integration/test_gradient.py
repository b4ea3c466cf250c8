"""I6: which rank or micro-batch of a step holds a sample does not change the step's gradient."""

import pytest
import torch
from helpers.launch import launch
from helpers.toys import recorded
from safetensors.torch import load_file


@pytest.mark.parametrize("world_size", [1, 2])
def test_i6_same_gradient_for_three_arrangements(world_size, tmp_path):
    """The gradient of one step, in float32 and to 1e-5 of its norm, for micro-batches of equal counts, of equal cost,
    and arranged by noise: the same samples in micro-batches of other sizes, on other ranks."""
    options = {
        "commonit_metric": "task",
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "data_seed": 43,  # draws rows of many lengths into the first step
        "max_grad_norm": 0.0,
    }
    arrangements = {"cost": None, "counts": "nothing", "noise": "noise"}
    launch(
        [
            {"name": name, "group_sizes": [70, 3], "arrange_by": by, "options": options}
            for name, by in arrangements.items()
        ],
        tmp_path,
        world_size=world_size,
    )
    steps = {name: recorded(tmp_path / f"{name}.ids", world_size)[0] for name in arrangements}
    samples = {name: sorted(row for rank in step for batch in rank for row in batch) for name, step in steps.items()}
    assert samples["cost"] == samples["counts"] == samples["noise"]
    sizes = {name: [len(batch) for rank in step for batch in rank] for name, step in steps.items()}
    assert len(set(sizes["counts"])) < len(set(sizes["cost"])) and sizes["cost"] != sizes["noise"]

    gradients = {name: load_file(tmp_path / f"{name}.gradient.safetensors") for name in arrangements}
    norm = torch.cat([value.flatten() for value in gradients["counts"].values()]).norm()
    assert norm > 1e-3
    for name in ("cost", "noise"):
        for weight, value in gradients["counts"].items():
            assert (gradients[name][weight] - value).norm() <= 1e-5 * norm, (name, weight)
