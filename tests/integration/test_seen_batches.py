"""I1 to I5 on the rows that a model sees in training, recorded by a hook for each rank and micro-step.

Rows carry their number as tokens. W = 1 and 2 (gloo), A = 1 and 3, both purities, and groups of 1, W*A - 1, S, S + 1
and an odd total.
"""

import json
import math
from collections import Counter

import pytest
from helpers.launch import launch
from helpers.toys import QUIET, epochs_of, id_rows, plan_of, recorded, rows_in

B = QUIET["per_device_train_batch_size"]


SHAPES = [(f"{purity}-a{steps}", purity, steps) for purity in ("step", "micro") for steps in (1, 3)]
NAMES = [name for name, *_ in SHAPES]


def group_sizes(world_size, accumulation):
    capacity = B * world_size * accumulation
    sizes = [1, max(1, world_size * accumulation - 1), capacity, capacity + 1, 3 * capacity + 2, 2 * capacity]
    return [*sizes, 1] if sum(sizes) % 2 == 0 else sizes


def runs_of(world_size):
    shared, workers = {"commonit_metric": "task", "seed": 7}, {"dataloader_num_workers": 1}
    runs = {name: (accumulation, {"commonit_purity": purity}) for name, purity, accumulation in SHAPES}
    runs["workers"] = (1, workers | {"dataloader_persistent_workers": True})
    return {
        name: {
            "group_sizes": group_sizes(world_size, accumulation),
            "options": {**shared, "gradient_accumulation_steps": accumulation, **options},
        }
        for name, (accumulation, options) in runs.items()
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def seen(request, tmp_path_factory):
    """World size, directory and shapes of the runs, all trained."""
    directory = tmp_path_factory.mktemp("seen")
    shapes = runs_of(request.param)
    launch([{"name": name, **shape} for name, shape in shapes.items()], directory, world_size=request.param)
    return request.param, directory, shapes


def recorded_epochs(directory, name, world_size):
    """Two lists of steps, one an epoch; a step is rank -> micro-step -> row numbers."""
    steps = recorded(directory / f"{name}.ids", world_size)
    result = json.loads((directory / f"{name}.json").read_text())
    assert result["world_size"] == world_size
    assert len(steps) == result["global_step"]
    return epochs_of(steps)


@pytest.mark.parametrize("name", NAMES)
def test_i1_pure(seen, name):
    """I1: all micro-batches of a step hold one group; with purity `micro`, each micro-batch."""
    world_size, directory, shapes = seen
    group_of = id_rows(shapes[name]["group_sizes"])["task"]
    for epoch in recorded_epochs(directory, name, world_size):
        mixed_steps = 0
        for step in epoch:
            for micro_step in zip(*step, strict=True):  # also I3: ranks have as many micro-batches
                groups = [{group_of[row] for row in batch} for batch in micro_step]
                assert all(len(group) == 1 for group in groups)
                if not name.startswith("micro"):
                    assert len(set.union(*groups)) == 1
            mixed_steps += len({group_of[row] for row in rows_in([step])}) > 1
        if name.startswith("step"):
            assert mixed_steps == 0
        elif name == "micro-a3":
            assert mixed_steps > 0  # else `micro` would be `step`


@pytest.mark.parametrize("name", [*NAMES, "workers"])
def test_i2_lossless(seen, name):
    """I2: each epoch sees every row; only rows of groups too small for all micro-batches come again, and the steps of a
    group differ by at most one sample."""
    world_size, directory, shapes = seen
    sizes = shapes[name]["group_sizes"]
    group_of = id_rows(sizes)["task"]
    accumulation = shapes[name]["options"]["gradient_accumulation_steps"]
    for epoch in recorded_epochs(directory, name, world_size):
        rows = Counter(rows_in(epoch))
        assert set(rows) == set(range(sum(sizes)))
        micro_batches = 1 if name.startswith("micro") else world_size * accumulation
        repeats = Counter(group_of[row] for row, times in rows.items() for _ in range(times - 1))
        assert all(sizes[int(group[1:])] < micro_batches for group in repeats)
        assert all(count < micro_batches for count in repeats.values())
        if not name.startswith("micro"):
            step_sizes: dict = {}
            for step in epoch:
                step_rows = rows_in([step])
                step_sizes.setdefault(group_of[step_rows[0]], []).append(len(step_rows))
            for group, counts in step_sizes.items():
                assert len(counts) == math.ceil(sizes[int(group[1:])] / (B * micro_batches))
                assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", [*NAMES, "workers"])
def test_i3_i4_i5_the_model_sees_the_plan(seen, name):
    """I3 to I5: each rank trains the micro-batches of the plan; the run is two plans long; the epochs differ."""
    world_size, directory, shapes = seen
    options = shapes[name]["options"]
    rows = id_rows(shapes[name]["group_sizes"])
    epochs = recorded_epochs(directory, name, world_size)
    for number, epoch in enumerate(epochs):
        plan = plan_of(
            rows,
            world_size=world_size,
            accumulation_steps=options["gradient_accumulation_steps"],
            purity=options.get("commonit_purity", "step"),
            seed=7,
            epoch=number,
        )
        assert len(epoch) == plan.num_steps
        for rank in range(world_size):
            assert [batch for step in epoch for batch in step[rank]] == list(plan.batches(rank))
    assert epochs[0] != epochs[1]
