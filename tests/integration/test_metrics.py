"""Logged metrics of groups on one rank and two, with accumulation, and packed.

Expected losses are computed in float64 from the rows that the model's forward pass gets.
"""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers.launch import launch
from helpers.toys import QUIET, id_rows, recorded, row_losses
from helpers.trainers import make_trainer

SIZES = [13, 9, 2]
LOGGING_STEPS = 2
CASES = {
    "A3-step": {"gradient_accumulation_steps": 3},
    "A3-micro": {"gradient_accumulation_steps": 3, "commonit_purity": "micro"},
    "A1-micro": {"commonit_purity": "micro"},
    "A3-unbalanced": {"gradient_accumulation_steps": 3, "commonit_balance_lengths": False},
    "A3-every-step": {"gradient_accumulation_steps": 3, "logging_steps": 1},
    "A3-accumulated-mean": {
        "gradient_accumulation_steps": 3,
        "average_tokens_across_devices": False,
        "commonit_balance_lengths": False,
    },
}
WITHOUT_TOKEN_COUNTS = "A3-mean-of-means"  # a model whose loss does not take the step's token count
CASES[WITHOUT_TOKEN_COUNTS] = {"gradient_accumulation_steps": 3}
TASKS = id_rows(SIZES)["task"]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world_size: f"W{world_size}")
def runs(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics")
    shared = {"commonit_metric": "task", "logging_steps": LOGGING_STEPS, "learning_rate": 1e-2}
    run = {"group_sizes": SIZES, "losses": True}
    runs = [
        {**run, "name": name, "options": {**shared, **options}, "accepts_loss_kwargs": name != WITHOUT_TOKEN_COUNTS}
        for name, options in CASES.items()
    ]
    launch(runs, directory, request.param)
    return directory, request.param


def lines(directory, name, world_size):
    return [
        json.loads(line)
        for rank in range(world_size)
        for line in (directory / f"{name}.ids.rank{rank}").read_text(encoding="utf-8").splitlines()
    ]


def result(directory, name):
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


def logged(directory, name):
    return [entry for entry in result(directory, name)["log"] if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_group_is_the_mean_over_its_tokens(runs, name):
    directory, world_size = runs
    every = CASES[name].get("logging_steps", LOGGING_STEPS)
    sums = defaultdict(lambda: np.zeros(2))
    for line in lines(directory, name, world_size):
        for row, loss, trained in zip(line["ids"], line["losses"], line["trained"], strict=True):
            sums[line["step"] // every, TASKS[row]] += loss, trained
    logs = logged(directory, name)
    assert len(logs) == result(directory, name)["global_step"] // every
    for interval, entry in enumerate(logs):
        found = {key.removeprefix("loss_"): value for key, value in entry.items() if key.startswith("loss_")}
        expected = {task: loss / count for (at, task), (loss, count) in sums.items() if at == interval}
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_tokens_padding_and_group_match_the_batches(runs, name):
    directory, world_size = runs
    every = CASES[name].get("logging_steps", LOGGING_STEPS)
    lengths = [len(tokens) for tokens in id_rows(SIZES)["input_ids"]]
    steps = recorded(directory / f"{name}.ids", world_size)
    for interval, entry in enumerate(logged(directory, name)):
        within = range(interval * every, (interval + 1) * every)
        batches = [batch for step in within for rank in steps[step] for batch in rank]
        data = sum(lengths[row] for batch in batches for row in batch)
        computed = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
        assert entry["commonit_tokens"] == data
        assert entry["commonit_padding"] == pytest.approx(1 - data / computed)
        last = {TASKS[row] for rank in steps[(interval + 1) * every - 1] for batch in rank for row in batch}
        assert entry["commonit_group"] == (int(last.pop()[1:]) if len(last) == 1 else -1)


def test_the_gradient_norm_of_a_group_is_the_mean_over_its_steps(runs):
    directory, world_size = runs
    steps = recorded(directory / "A3-step.ids", world_size)
    norm_of_step = [entry["grad_norm"] for entry in logged(directory, "A3-every-step")]
    for entry in logged(directory, "A3-every-step"):
        (norm,) = (value for key, value in entry.items() if key.startswith("grad_norm_"))
        assert norm == pytest.approx(entry["grad_norm"])
    for interval, entry in enumerate(logged(directory, "A3-step")):
        norms = defaultdict(list)
        for step in range(interval * LOGGING_STEPS, (interval + 1) * LOGGING_STEPS):
            norms[TASKS[steps[step][0][0][0]]].append(norm_of_step[step])
        found = {key.removeprefix("grad_norm_"): value for key, value in entry.items() if key.startswith("grad_norm_")}
        assert found == pytest.approx({task: np.mean(values) for task, values in norms.items()}, rel=1e-4)


@pytest.mark.parametrize(
    "packing", [{"packing": True, "max_length": 24}, {"padding_free": True}], ids=["packed", "free"]
)
def test_packed_and_padding_free_batches(tmp_path, packing):
    options = {"max_length": None, "per_device_train_batch_size": QUIET["per_device_train_batch_size"], **packing}
    trainer = make_trainer(tmp_path, id_rows(SIZES), gradient_accumulation_steps=2, logging_steps=1, **options)
    sums = defaultdict(lambda: np.zeros(3))

    def record(model, args, kwargs):
        if torch.is_grad_enabled():
            losses, trained = row_losses(model, kwargs)
            sums[trainer.state.global_step] += sum(losses), sum(trained), kwargs["input_ids"].numel()

    trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        loss, count, tokens = sums[entry["step"] - 1]
        (found,) = (value for key, value in entry.items() if key.startswith("loss_"))
        assert found == pytest.approx(loss / count, rel=1e-4)
        assert (entry["commonit_tokens"], entry["commonit_padding"]) == (tokens, 0)


def test_none_logs_nothing_of_ours(tmp_path):
    trainer = make_trainer(tmp_path, id_rows(SIZES), commonit_metric="none")
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith(("loss_", "commonit"))]
