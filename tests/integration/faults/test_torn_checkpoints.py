"""Incomplete checkpoints are skipped, or refused when named."""

import json
import shutil

import pytest
import torch
from helpers.toys import id_rows
from helpers.trainers import Seen, make_trainer, train

from commonit_trl.trainer.checkpoint import last_checkpoint, read_checkpoint

ROWS = id_rows([9, 6])
OPTIONS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output directory and steps of a run."""
    directory = tmp_path_factory.mktemp("run")
    _, seen = train(directory, ROWS, **OPTIONS)
    return directory / "out", seen.steps


@pytest.fixture
def out(run, tmp_path):
    """An output directory with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        shutil.copytree(run[0] / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def resume(directory, checkpoint):
    trainer = make_trainer(directory, ROWS, **OPTIONS)
    seen = Seen(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return seen.steps


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def second_rank_is_missing(checkpoint):
    run = checkpoint / "commonit" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"random states": [0, 1]}))


TORN = {
    "no state": (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), "trainer_state.json: it is missing"),
    "half a state": (lambda checkpoint: cut(checkpoint / "trainer_state.json"), "trainer_state.json: "),
    "an empty state": (lambda checkpoint: (checkpoint / "trainer_state.json").write_text(""), "trainer_state.json: "),
    "half a random state": (lambda checkpoint: cut(checkpoint / "rng_state.pth"), "rng_state.pth: it ends early"),
    "a rank without random state": (second_rank_is_missing, "1 of 2 ranks have one"),
}


@pytest.mark.parametrize("how", TORN)
def test_torn_checkpoint_is_skipped_and_refused(run, out, tmp_path, how):
    tear, what = TORN[how]
    tear(out / "checkpoint-4")
    assert last_checkpoint(out) == str(out / "checkpoint-2")
    with pytest.raises(ValueError) as error:
        resume(tmp_path, str(out / "checkpoint-4"))
    message = str(error.value)
    assert message.startswith(f"resume_from_checkpoint={str(out / 'checkpoint-4')!r} was not written to its end"), (
        message
    )
    assert what in message and "use an earlier checkpoint" in message and "\n" not in message
    assert resume(tmp_path, True) == run[1][2:]


def test_checkpoint_without_groups_is_torn(out, tmp_path):
    """Killed while writing the model; the error must not claim that the run has no groups."""
    shutil.rmtree(out / "checkpoint-4" / "commonit")
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="was not written to its end"):
        resume(tmp_path, str(out / "checkpoint-4"))


def test_no_complete_checkpoint(out, tmp_path):
    for step in (2, 4):
        cut(out / f"checkpoint-{step}" / "trainer_state.json")
    assert last_checkpoint(out) is None and last_checkpoint(out / "missing") is None
    with pytest.raises(ValueError, match=r"checkpoint-4' was not written to its end .*remove this one"):
        resume(tmp_path, True)


def test_overwritten_checkpoint_is_incomplete(out, tmp_path, monkeypatch):
    """A run resumed from an earlier checkpoint overwrites later ones.

    If it is killed then, the checkpoint has the new model and the old optimizer and must count as incomplete.
    """

    def disk_full(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(OSError, match="the disk is full"):
            resume(tmp_path, str(out / "checkpoint-2"))
    with pytest.raises(ValueError, match="not written to its end"):
        read_checkpoint(out / "checkpoint-4")
    assert last_checkpoint(out) == str(out / "checkpoint-2")
