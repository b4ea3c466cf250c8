"""Checkpoints hold the manifest of their run; a run with other settings or data refuses them and names the difference.

Exact resumes are in faults/test_faults.py, incomplete checkpoints and replans beside it.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.bad_input import PICKLE
from helpers.toys import id_rows
from helpers.trainers import Seen, make_trainer, train
from trl import SFTTrainer

from commonit_trl import Rows, load_grouper

SIZES = [9, 6, 5]
ROWS = id_rows(SIZES)
OPTIONS = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "commonit_weights": {"g000": 2, "g001": 1.0, "g002": 1},
}


def longer(rows):
    """Repeat the last token of each row."""
    tokens = {
        "input_ids": [ids + ids[-1:] for ids in rows["input_ids"]],
        "labels": [ids + ids[-1:] for ids in rows["labels"]],
    }
    return Dataset.from_dict({**rows.to_dict(), **tokens})


def relabelled(rows):
    """Swap the groups of two rows."""
    tasks = list(rows["task"])
    one, other = tasks.index("g000"), tasks.index("g001")
    tasks[one], tasks[other] = tasks[other], tasks[one]
    return Dataset.from_dict({**rows.to_dict(), "task": tasks})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its directory, what it saw, and its trainer."""
    directory = tmp_path_factory.mktemp("run")
    trainer, seen = train(directory, ROWS, **OPTIONS)
    trainer.save_model(str(directory / "saved"))
    return directory, seen.steps, trainer


def resume(directory, checkpoint, rows=ROWS, **options):
    trainer = make_trainer(directory, rows, **{**OPTIONS, **options})
    seen = Seen(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, seen


@pytest.mark.parametrize("name", ["out/checkpoint-5", "saved"])
def test_groups_and_manifest_are_saved(run, name):
    """Checkpoints and saved models hold the fitted groups, which assign as before, and the manifest."""
    directory, _, trainer = run
    saved = directory / name / "commonit"
    assert sorted(file.name for file in saved.iterdir()) == ["groups.json", "run.json"]
    grouper = load_grouper(saved)
    assert grouper.names == ["g000", "g001", "g002"]
    assert np.array_equal(grouper.assign(Rows(ROWS)), trainer.commonit_group_ids)
    description = json.loads((saved / "run.json").read_text())
    assert description["commonit_metric"] == "task" and description["rows"] == 20
    assert description["order of samples"] == trainer.commonit_plan().fingerprint()


def test_embedding_groups_are_saved_with_their_centroids(tmp_path, minilm):
    rows = Dataset.from_list([{"text": text} for text in ("a dog", "a cat", "3 + 4", "5 + 6")])
    options = {"commonit_embedding_model": str(minilm), "commonit_num_groups": 2}
    trainer = make_trainer(tmp_path, rows, commonit_metric="embedding", **options)
    trainer.save_model()
    saved = tmp_path / "out" / "commonit"
    assert sorted(file.name for file in saved.iterdir()) == ["groups.json", "groups.safetensors", "run.json"]
    assert np.array_equal(load_grouper(saved).centroids, trainer.commonit_grouper.centroids)


DIFFERENCES = {
    "seed": ({"seed": 8}, ["data seed: 7 -> 8"]),
    "batch size": ({"per_device_train_batch_size": 1}, ["per_device_train_batch_size: 2 -> 1"]),
    "accumulation": ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps: 2 -> 1"]),
    "metric": (
        {"commonit_metric": "length", "commonit_weights": "proportional"},
        ["commonit_metric: 'task' -> 'length'", "commonit_weights: {'g000': 2"],
    ),
    "purity": ({"commonit_purity": "micro"}, ["commonit_purity: 'step' -> 'micro'"]),
    "remainder": ({"commonit_remainder": "drop"}, ["commonit_remainder: 'keep' -> 'drop'"]),
    "balance": ({"commonit_balance_lengths": False}, ["commonit_balance_lengths: True -> False"]),
    "grouping option": (
        {"commonit_min_group_size": 8, "commonit_weights": "proportional"},
        ["commonit_min_group_size: 1 -> 8", "number of groups: 3 -> 2"],
    ),
    "truncation": ({"max_length": 12}, ["max_length: None -> 12"]),
    "rows": ({"rows": id_rows([9, 6, 6])}, ["rows: 20 -> 21"]),
    "groups": (
        {"rows": id_rows([9, 6, 4, 1]), "commonit_weights": "proportional"},
        ["number of groups: 3 -> 4"],
    ),
    "assignment": ({"rows": relabelled(ROWS)}, ["assignment of rows to groups: "]),
    "lengths": ({"rows": longer(ROWS)}, ["token lengths: "]),
}
HASH = re.compile(r"'[0-9a-f]{16}'")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_resume_of_another_run_names_the_differences(run, tmp_path, name):
    """Settings with both values; hashes only where no setting differs, and then those of the part that differs."""
    options, parts = DIFFERENCES[name]
    with pytest.raises(ValueError) as error:
        resume(tmp_path, str(run[0] / "out" / "checkpoint-5"), **options)
    message = str(error.value)
    assert all(part in message for part in [*parts, "Resume with the same settings and data, or start a new run"])
    assert "\n" not in message
    assert bool(HASH.search(message)) == (name in ("assignment", "lengths")), message
    unchanged = {"lengths": "groups: ", "assignment": "rows: "}.get(name, "commonit_cache_dir")
    assert f" {unchanged}" not in message


def test_resume_with_and_without_commonit(run, tmp_path):
    """Checkpoints of a baseline are refused with a metric, and those of a metric without one.

    A baseline that overwrites the checkpoint of a metric leaves the `commonit` folder inside.
    """
    with pytest.raises(ValueError, match="written with CommonIT, and this run trains without it"):
        resume(tmp_path / "baseline", str(run[0] / "out" / "checkpoint-5"), commonit_metric="none")
    shutil.copytree(run[0] / "out", tmp_path / "out")
    train(tmp_path, ROWS, trainer_class=SFTTrainer, **{**OPTIONS, "max_steps": 5})
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "commonit" / "run.json").exists()
    for overwritten in (True, False):
        with pytest.raises(ValueError, match=r"checkpoint-5'.*written without CommonIT, and this run trains with it"):
            resume(tmp_path, str(checkpoint))
        if overwritten:
            shutil.rmtree(checkpoint / "commonit")
    resumed, _ = resume(tmp_path, str(checkpoint), commonit_metric="none")
    assert resumed.state.global_step == 10


def test_checkpoint_with_files_of_two_runs(run, tmp_path):
    """The manifest and the Trainer's state of a checkpoint must come from one run."""
    shutil.copytree(run[0] / "out" / "checkpoint-5", tmp_path / "checkpoint-5")
    train(tmp_path, ROWS, **{**OPTIONS, "max_steps": 5})
    shutil.copy(tmp_path / "out" / "checkpoint-5" / "trainer_state.json", tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="checkpoint-5'"):
        resume(tmp_path, str(tmp_path / "checkpoint-5"))


def test_callback_states_are_restored(run, tmp_path):
    """With `restore_callback_states_from_checkpoint` the Trainer rebuilds our callback; the next checkpoint resumes."""
    directory, steps, _ = run
    checkpoint = str(directory / "out" / "checkpoint-5")
    _, seen = resume(tmp_path, checkpoint, restore_callback_states_from_checkpoint=True)
    assert seen.steps == steps[5:]
    _, seen = resume(tmp_path, str(tmp_path / "out" / "checkpoint-10"))
    assert seen.steps == steps[10:]


@pytest.mark.parametrize("content", [b"", b'{"commonit_metric": "ta', b"{}", b"[]", b"\xff", PICKLE])
def test_damaged_run_file(run, tmp_path, content):
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(run[0] / "out" / "checkpoint-5", checkpoint)
    (checkpoint / "commonit" / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint-5/commonit/run\.json is damaged .*use another checkpoint"):
        resume(tmp_path, str(checkpoint))


def test_resume_from_the_last_checkpoint_trains_nothing(run, tmp_path):
    directory, steps, whole = run
    resumed, seen = resume(tmp_path, str(directory / "out" / f"checkpoint-{len(steps)}"))
    assert seen.steps == []
    assert resumed.state.global_step == len(steps)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_resume_true_takes_and_checks_the_last_checkpoint(run, tmp_path):
    shutil.copytree(run[0] / "out" / "checkpoint-5", tmp_path / "out" / "checkpoint-5")
    shutil.copytree(run[0] / "out" / "checkpoint-10", tmp_path / "out" / "checkpoint-10")
    _, seen = resume(tmp_path, True)
    assert seen.steps == run[1][10:]
    with pytest.raises(ValueError, match="data seed"):
        resume(tmp_path, True, seed=8)
