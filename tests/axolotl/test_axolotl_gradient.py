"""I6 with Axolotl: the gradient of a step does not depend on which rank or micro-batch holds a row.

Without CommonIT, Axolotl gives each micro-batch and rank the same weight; see `axolotl_plugin/README.md`.
"""

import pytest
import torch
from helpers.axolotl_recipes import launch, make_rows, recipe, seen, write_recipe, write_rows
from safetensors.torch import load_file

ARRANGEMENTS = ("lengths", "nothing", "noise")
WORLD_SIZES = (1, 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gradient")
    data = write_rows(directory / "rows.jsonl", make_rows({"x": 37}))
    keys = {"commonit_metric": "task", "gradient_accumulation_steps": 3, "num_epochs": 1, "micro_batch_size": 4}
    keys |= {"max_grad_norm": 0.0, "max_steps": 1}
    runs = {size: [] for size in WORLD_SIZES}
    for size in WORLD_SIZES:
        for arrangement in ARRANGEMENTS:
            name = f"{arrangement}-W{size}"
            path = write_recipe(
                directory / f"{name}.yml", recipe(directory, data, **keys, output_dir=str(directory / f"{name}-out"))
            )
            runs[size].append({"name": name, "recipe": str(path), "arrange_by": arrangement})
    for size in WORLD_SIZES:  # the run on one rank prepares the rows for two
        launch(runs[size], directory, size)
    return directory


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS[1:])
def test_balancing_does_not_change_gradient(directory, world_size, arrangement):
    names = [f"lengths-W{world_size}", f"{arrangement}-W{world_size}"]
    ours, other = (seen(directory / name, world_size)[0] for name in names)
    rows, others = (
        sorted(row for rank in step for micro_batch in rank for row in micro_batch) for step in (ours, other)
    )
    assert rows == others and ours != other
    gradients = [load_file(directory / f"{name}.gradient.safetensors") for name in names]
    expected, found = (torch.cat([gradient[name].ravel() for name in gradients[0]]) for gradient in gradients)
    assert torch.norm(found - expected) <= 1e-5 * torch.norm(expected)
