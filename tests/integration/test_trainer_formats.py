"""Every form of data that `SFTTrainer` takes trains in pure steps, with the tokens and labels of `SFTTrainer`.

Rows carry their task and number as text, so that a row can be recognised in the model's input.
"""

import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from helpers.toys import tiny_tokenizer
from helpers.trainers import groups_of_steps, train
from trl import SFTTrainer

GROUP_SIZES = {"g1": 9, "g2": 6, "g3": 5}


def parts(number):
    """Task, prompt and response of row `number`; responses have 3 to 40 characters."""
    order = np.random.default_rng(0).permutation(np.repeat(list(GROUP_SIZES), list(GROUP_SIZES.values())))
    task = str(order[number])
    return task, f"[{task}#{number:02d}] What?", "x" * (3 + number * 7 % 38)


def label_and_number(row):
    task, number = re.search(r"\[(g\d)#(\d+)\]", row.text).groups()
    return task, int(number)


def chat(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def tokenized(prompt, response, **masks):
    tokenizer = tiny_tokenizer()
    start, end = tokenizer(prompt)["input_ids"], [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    row = {"input_ids": start + end}
    if "labels" in masks:
        row["labels"] = [-100] * len(start) + end
    if "completion_mask" in masks:
        row["completion_mask"] = [0] * len(start) + [1] * len(end)
    return row


# name -> (row from prompt and response, options, more arguments of the trainer)
FORMATS = {
    "text": (lambda p, r: {"text": p + r}, {}, {}),
    "text field": (lambda p, r: {"body": p + r}, {"dataset_text_field": "body"}, {}),
    "formatting_func": (
        lambda p, r: {"question": p, "answer": r},
        {},
        {"formatting_func": lambda row: row["question"] + row["answer"]},
    ),
    "prompt-completion": (lambda p, r: {"prompt": p, "completion": r}, {}, {}),
    "prompt-completion, all tokens": (lambda p, r: {"prompt": p, "completion": r}, {"completion_only_loss": False}, {}),
    "conversational prompt-completion": (lambda p, r: {"prompt": chat(p, r)[:1], "completion": chat(p, r)[1:]}, {}, {}),
    "messages": (lambda p, r: {"messages": chat(p, r)}, {}, {}),
    "messages, assistant only": (lambda p, r: {"messages": chat(p, r)}, {"assistant_only_loss": True}, {}),
    "ShareGPT": (
        lambda p, r: {"conversations": [{"from": "user", "value": p}, {"from": "assistant", "value": r}]},
        {},
        {},
    ),
    "input_ids": (tokenized, {}, {}),
    "input_ids and labels": (lambda p, r: tokenized(p, r, labels=True), {}, {}),
    "input_ids and completion_mask": (
        lambda p, r: tokenized(p, r, completion_mask=True),
        {"completion_only_loss": True},
        {},
    ),
    "not prepared": (
        lambda p, r: tokenized(p, r, labels=True),
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        {},
    ),
}
WITHOUT_RESPONSE = ("text", "text field", "formatting_func", "input_ids")


def dataset_of(make_row, numbers=range(20)):
    rows = []
    for number in numbers:
        task, prompt, response = parts(number)
        rows.append({**make_row(prompt, response), "task": task})
    return Dataset.from_list(rows)


def train_format(tmp_path, name, **more):
    make_row, options, extra = FORMATS[name]
    return train(tmp_path, dataset_of(make_row), extra=extra, gradient_accumulation_steps=2, **options, **more)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    """Steps hold one task, or one bin of response lengths, eos included; where nothing marks the response, of rows."""
    trainer, seen = train_format(tmp_path, name)
    steps = groups_of_steps(seen, lambda row: label_and_number(row)[0])
    assert Counter(steps) == {"g1": 3, "g2": 2, "g3": 2}  # ceil(9 / 4), ceil(6 / 4), ceil(5 / 4)
    assert [trainer.commonit_grouper.names[group] for group in trainer.commonit_plan().step_groups] == steps
    _, parent_seen = train_format(tmp_path, name, trainer_class=SFTTrainer)
    assert seen.rows == parent_seen.rows
    assert set(seen.rows.values()) == {1}

    trainer, seen = train_format(tmp_path, name, commonit_metric="length", commonit_num_groups=3)

    def bin_of(row):
        length = len(row.tokens) if name in WITHOUT_RESPONSE else len(parts(label_and_number(row)[1])[2]) + 1
        return int(np.searchsorted(trainer.commonit_grouper.edges, length, side="right"))

    assert set(groups_of_steps(seen, bin_of)) == {0, 1, 2}
    assert seen.rows == parent_seen.rows


def test_length_counts_after_truncation(tmp_path):
    """Metric `length` counts the response tokens that remain after truncation."""
    rows = [{"prompt": f"[g1#{n:02d}]", "completion": "x" * (30 if n % 2 else 500)} for n in range(8)]
    options = {"commonit_metric": "length", "commonit_length_edges": [35, 41], "max_length": 47}
    trainer, seen = train(tmp_path, Dataset.from_list(rows), **options)
    assert set(trainer.commonit_group_ids) == {0, 1}
    assert set(groups_of_steps(seen, lambda row: row.trained)) == {31, 40}  # 47 less the prompt's 7


def test_length_when_truncation_keeps_the_end(tmp_path):
    rows = [{"messages": chat("u" * 60, f"[g1#{n:02d}]" + "x" * (3 if n % 2 else 20))} for n in range(8)]
    options = {"commonit_metric": "length", "commonit_length_edges": [20], "truncation_mode": "keep_end"}
    _, seen = train(tmp_path, Dataset.from_list(rows), max_length=40, **options)
    assert set(groups_of_steps(seen, lambda row: label_and_number(row)[1] % 2)) == {0, 1}


@pytest.mark.parametrize("options", [{"shuffle_dataset": True}, {"remove_unused_columns": False}], ids=str)
def test_options_of_the_dataset_keep_labels_with_their_rows(tmp_path, options):
    _, seen = train_format(tmp_path, "prompt-completion", **options)
    groups_of_steps(seen, lambda row: label_and_number(row)[0])
    assert sorted(label_and_number(row)[1] for row in seen.rows.elements()) == list(range(20))


def test_task_column_by_name_and_joined(tmp_path):
    rows = dataset_of(FORMATS["text"][0])
    rows = rows.rename_column("task", "kind").add_column("half", [n % 2 for n in range(20)])
    trainer, seen = train(tmp_path, rows, commonit_task_column=["kind", "half"])

    def group_of(row):
        task, number = label_and_number(row)
        return f"{task} / {number % 2}"

    assert set(groups_of_steps(seen, group_of)) == set(trainer.commonit_grouper.names)
