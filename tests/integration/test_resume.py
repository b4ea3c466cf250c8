"""I4 under SIGKILL: a run killed in the middle of an epoch and resumed sees exactly what was left, and ends with the
weights of the run that was never killed."""

import json
from collections import Counter

import pytest
import torch
from helpers.launch import launch
from helpers.toys import recorded
from safetensors.torch import load_file

SIZES = [1, 5, 7, 13, 31]
SAVE_EVERY = 3
OPTIONS = {
    "commonit_metric": "task",
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": SAVE_EVERY,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
}


def rows_of(steps):
    return Counter(row for step in steps for rank in step for batch in rank for row in batch)


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_and_resumed(world_size, tmp_path):
    """Killed in epoch 0 and in epoch 1; attention dropout makes the random state part of what must come back."""
    run = {"group_sizes": SIZES, "options": OPTIONS, "dropout": 0.1}
    launch([{**run, "name": "whole"}], tmp_path, world_size)
    whole = recorded(tmp_path / "whole.ids", world_size)
    per_epoch = len(whole) // 2
    kills = {"epoch0": per_epoch - 3, "epoch1": per_epoch + 5}
    for name, step in kills.items():
        launch([{**run, "name": name, "kill_at": step}], tmp_path, world_size, killed=True)
    checkpoints = {name: step // SAVE_EVERY * SAVE_EVERY for name, step in kills.items()}
    assert 0 < checkpoints["epoch0"] < per_epoch < checkpoints["epoch1"] < len(whole)
    launch(
        [
            {**run, "name": f"{name}-resumed", "resume": str(tmp_path / f"{name}-out" / f"checkpoint-{step}")}
            for name, step in checkpoints.items()
        ],
        tmp_path,
        world_size,
    )

    for name, checkpoint in checkpoints.items():
        killed = recorded(tmp_path / f"{name}.ids", world_size)
        resumed = recorded(tmp_path / f"{name}-resumed.ids", world_size)
        assert max(killed) >= kills[name]  # it did train past the checkpoint
        assert resumed == {step: seen for step, seen in whole.items() if step >= checkpoint}
        before = {step: seen for step, seen in killed.items() if step < checkpoint}
        assert before == {step: seen for step, seen in whole.items() if step < checkpoint}
        trained = {**before, **resumed}
        for epoch in range(2):
            steps = [trained[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
            assert set(rows_of(steps)) == set(range(sum(SIZES)))

        weights, expected = (load_file(tmp_path / f"{run}.safetensors") for run in (f"{name}-resumed", "whole"))
        for weight, value in expected.items():
            if world_size == 1:
                assert torch.equal(weights[weight], value), weight
            else:
                assert (weights[weight] - value).abs().max() <= 1e-6, weight
        steps_done = json.loads((tmp_path / f"{name}-resumed.json").read_text())["global_step"]
        assert steps_done == 2 * per_epoch
