"""`reward_model: true`: I1, I2 and I4 on the pairs that the model saw, and Axolotl's evaluation.

The model gets the chosen and the rejected answers of a micro-batch in one forward pass.
"""

from collections import Counter

import pytest
from helpers.axolotl_recipes import launch, recipe, result, save_model, seen, write_recipe, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

SIZES = {"x": 9, "y": 6, "z": 2}
ANSWER_LENGTHS = [4, 30]
EPOCHS = 2
STEPS = 6
"""Of an epoch by task."""
EDGES = {"commonit_metric": "length", "commonit_length_edges": [16]}
FROZEN = {"learning_rate": 0.0, "num_epochs": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}


def make_pairs(sizes, first=0):
    """Make rows with a prompt that starts with the row number and answers of two lengths."""
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    return [
        {
            "system": "",
            "input": f"#{number}# question",
            "chosen": "y" * ANSWER_LENGTHS[number % 2],
            "rejected": "n" * 9,
            "task": task,
        }
        for number, task in enumerate(tasks, start=first)
    ]


ROWS = make_pairs(SIZES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of the runs `task`, `resumed`, `length` and `baseline`, on one rank.

    For several CPU ranks, Axolotl must prepare the rows beforehand, and `axolotl preprocess` fails on pairs (KeyError).
    """
    directory = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(save_model(directory / "model"), num_labels=1)
    model.save_pretrained(directory / "model")  # Axolotl does not seed a new score head
    pairs = {"type": "bradley_terry.chat_template"}
    data = [{"path": str(write_rows(directory / "rows.jsonl", ROWS)), **pairs}]
    held_out = write_rows(directory / "test.jsonl", make_pairs({"x": 3, "y": 4}, first=100))
    common = {"reward_model": True, "chat_template": "tokenizer_default", "gradient_accumulation_steps": 2}
    common |= {"test_datasets": [{"path": str(held_out), "split": "train", **pairs}]}

    def run(name, **keys):
        keys = {"commonit_metric": "task", "output_dir": str(directory / f"{name}-out"), **common, **keys}
        keys |= {"dataset_prepared_path": str(directory / f"prepared-{keys['commonit_metric']}")}
        return {"name": name, "recipe": str(write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys)))}

    saving = {"save_strategy": "steps", "save_steps": STEPS + 1, "num_epochs": EPOCHS}
    first = [run("task", **saving), run("length", **EDGES, **FROZEN)]
    first.append(run("baseline", commonit_metric="none", max_steps=1, **FROZEN))
    launch(first, directory, 1)
    interrupted = directory / "task-out" / f"checkpoint-{STEPS + 1}"
    launch([run("resumed", resume_from_checkpoint=str(interrupted), **saving)], directory, 1)
    return directory


def pairs_of_steps(runs, name):
    """Optimizer step -> row numbers of the pairs."""
    found = {}
    for step, (micro_batches,) in seen(runs / name, 1).items():
        for ids in micro_batches:
            chosen, rejected = ids[: len(ids) // 2], ids[len(ids) // 2 :]
            assert chosen == rejected
            found.setdefault(step, []).extend(chosen)
    return found


@pytest.mark.parametrize(("name", "group_of"), [("task", "task"), ("length", "chosen")])
def test_i1_i2_steps_are_pure_and_hold_every_pair(runs, name, group_of):
    steps, epochs = pairs_of_steps(runs, name), EPOCHS if name == "task" else 1
    assert result(runs / name)["trainer"] == "CommonITAxolotlRewardTrainer"
    for step in steps.values():
        assert len({ROWS[number][group_of] for number in step}) == 1
    for epoch in range(epochs):
        part = list(steps.values())[epoch * len(steps) // epochs : (epoch + 1) * len(steps) // epochs]
        times = Counter(number for step in part for number in step)
        assert set(times) == set(range(len(ROWS)))
        assert sum(times.values()) - len(ROWS) < 2 * len(SIZES)  # under a step's micro-batches per group


def test_i4_a_resumed_run_trains_the_remaining_pairs(runs):
    whole, resumed = (pairs_of_steps(runs, name) for name in ("task", "resumed"))
    assert list(resumed) == list(range(STEPS + 1, EPOCHS * STEPS))
    assert list(whole) == list(range(EPOCHS * STEPS))
    assert resumed == {step: whole[step] for step in resumed}
    weights = load_file(runs / "task-out" / "model.safetensors")
    for name, value in load_file(runs / "resumed-out" / "model.safetensors").items():
        assert (weights[name] == value).all(), name


def test_i8_the_evaluation_is_axolotls(runs):
    logs = (result(runs / name)["log"] for name in ("baseline", "length"))
    parent, ours = (next(entry for entry in log if "eval_loss" in entry) for log in logs)
    assert result(runs / "baseline")["trainer"] == "AxolotlRewardTrainer"
    assert ours["eval_loss"] == parent["eval_loss"] and ours["eval_accuracy"] == parent["eval_accuracy"]
