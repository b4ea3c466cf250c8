"""Evaluation and logging on one rank and two."""

import json

import pytest
from helpers.launch import launch
from helpers.toys import group_losses, id_rows, tiny_model

SIZES = [9, 6, 1, 1]  # two tasks are not in the training set


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world_size: f"W{world_size}")
def logs(request, tmp_path_factory):
    """The log of a run that evaluates before training, and of the baseline, which is the parent's (I7)."""
    directory = tmp_path_factory.mktemp("evaluation")
    options = {"eval_strategy": "steps", "eval_steps": 100, "eval_on_start": True, "per_device_eval_batch_size": 3}
    run = {"group_sizes": [8, 4], "eval_group_sizes": SIZES, "logs_alone": True}
    runs = [
        {**run, "name": metric, "options": {**options, "max_steps": 3, "commonit_metric": metric}}
        for metric in ("task", "none")
    ]
    launch(runs, directory, request.param)
    return [json.loads((directory / f"{metric}.json").read_text())["log"] for metric in ("task", "none")]


def test_i8_group_losses_equal_the_losses_of_their_rows(logs):
    """I8: `eval_loss` to the last digit; group losses token-weighted, each row once, although the last batches are
    filled with rows of the first ones."""
    ours, baseline = (log[0] for log in logs)
    assert ours["eval_loss"] == baseline["eval_loss"]
    rows = id_rows(SIZES, seed=1)
    groups = [task if task in ("g000", "g001") else "(unseen task)" for task in rows["task"]]
    for group, loss in group_losses(tiny_model().eval(), rows, groups).items():
        assert ours[f"eval_{group}_loss"] == pytest.approx(loss, rel=1e-5)


def test_user_code_may_log_on_the_first_rank_alone(logs):
    """`log` has no collective, so a loss that a callback logs on rank 0 neither hangs nor shifts the group metrics."""
    log = logs[0]
    assert sum(entry.get("loss") == 0.5 for entry in log) == 3
    assert sum(any(name.startswith("loss_g") for name in entry) for entry in log) == 3
