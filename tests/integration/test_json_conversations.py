"""Conversations whose messages differ in keys or in the type of their content, which datasets stores as JSON.

The model sees every row with the tokens and labels of `SFTTrainer`, in pure steps; `commonit sft` accepts the file.
"""

import json

import pytest
from datasets import load_dataset
from helpers.trainers import SFT_FLAGS, as_argv, groups_of_steps, train
from trl import SFTTrainer

from commonit_trl.cli import main as cli

CALL = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}


def plain(task, number):
    return [{"role": "user", "content": f"[{task}] {number}?"}, {"role": "assistant", "content": task * (number + 1)}]


def with_call(task, number):
    question, answer = plain(task, number)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    return [question, call, {"role": "tool", "name": "sum", "content": "3"}, answer]


def with_name(task, number):
    question, answer = plain(task, number)
    return [question | {"name": "Ann"}, answer]


def in_parts(task, number):
    question, answer = plain(task, number)
    return [question | {"content": [{"type": "text", "text": question["content"]}]}, answer]


@pytest.fixture(params=[with_call, with_name, in_parts])
def path(request, tmp_path):
    """The path of 16 rows of two tasks; the messages of every other row have the odd form."""
    odd = request.param
    rows = [
        {"task": task, "messages": (odd if number % 2 else plain)(task, number)}
        for number in range(8)
        for task in ("a", "b")
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def rows(path, tmp_path):
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "data"))
    assert "Json" in str(dataset.features), "datasets stores these messages as JSON"
    return dataset


@pytest.mark.parametrize("metric", ["task", "length", "embedding"])
def test_steps_are_pure_and_rows_equal_trls(metric, rows, minilm, tmp_path):
    options = {"per_device_train_batch_size": 2, "commonit_metric": metric, "commonit_report": True}
    if metric != "task":
        options["commonit_num_groups"] = 2
    if metric == "embedding":
        options["commonit_embedding_model"] = minilm
    trainer, seen = train(tmp_path, rows, **options)
    _, parent = train(tmp_path / "parent", rows, trainer_class=SFTTrainer)
    assert seen.rows == parent.rows
    assert sum(seen.rows.values()) == len(rows)
    groups = {
        tuple(tokens): group
        for tokens, group in zip(trainer.train_dataset["input_ids"], trainer.commonit_group_ids.tolist(), strict=True)
    }
    assert len(set(groups_of_steps(seen, lambda row: groups[row.tokens]))) == 2


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("metric", ["none", "length"])
def test_the_command_line_trains_them(metric, path, model, tmp_path):
    options = {"model_name_or_path": model, "dataset_name": path, "output_dir": "out", "commonit_metric": metric}
    assert cli.main(["sft", *as_argv({**SFT_FLAGS, **options, "max_steps": 1})]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
