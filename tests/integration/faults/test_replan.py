"""`commonit_resume="replan"`: a run resumed with other settings trains the remaining rows of its epoch once."""

import shutil
from collections import Counter

import pytest
from helpers.launch import launch
from helpers.toys import id_rows, recorded, rows_in
from helpers.trainers import Seen, make_trainer, train

SIZES = [13, 7, 9, 2]
ROWS = id_rows(SIZES)
FIRST_RUN = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Output directory of a run with a checkpoint at every step, and the row numbers of its steps."""
    directory = tmp_path_factory.mktemp("first_run")
    _, seen = train(directory, ROWS, **FIRST_RUN)
    return directory / "out", numbers(seen)


def numbers(seen):
    return [[row.number for row in step] for step in seen.steps]


def resume(directory, checkpoint, rows=ROWS, **options):
    """Resume; return the trainer and the row numbers of its steps."""
    trainer = make_trainer(directory, rows, **{**FIRST_RUN, "commonit_resume": "replan", **options})
    seen = Seen(trainer)
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    return trainer, numbers(seen)


def assert_trained_once(steps):
    """Check that all rows are trained; only the group of two rows, smaller than a step, may repeat."""
    times = Counter(row for step in steps for row in step)
    assert set(times) == set(range(sum(SIZES)))
    assert {ROWS["task"][row] for row, count in times.items() if count > 1} <= {"g003"}


CHANGES = {
    "smaller batches": {"per_device_train_batch_size": 1},
    "seed": {"seed": 8},
    "metric": {"commonit_metric": "length", "commonit_num_groups": 3},
    "purity and accumulation": {"commonit_purity": "micro", "gradient_accumulation_steps": 3},
    "balance": {"commonit_balance_lengths": False},
    "larger batches": {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "commonit_remainder": "drop",
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_remaining_rows_are_trained_once(first_run, tmp_path, change):
    """Replan in the middle of epoch 0; epoch 1 and the learning rate are those of a new run with these settings."""
    directory, steps = first_run
    trainer, resumed = resume(tmp_path, directory / "checkpoint-5", **CHANGES[change])
    plan = trainer.commonit_plan(epoch=1)
    assert_trained_once(steps[:5] + resumed[: -plan.num_steps])
    planned = [row for batch in plan.batches(rank=0) for row in batch]
    assert [row for step in resumed[-plan.num_steps :] for row in step] == planned
    total = 2 * plan.num_steps
    assert trainer.state.global_step == total
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    for step in range(total - len(resumed) + 1, total + 1):
        assert rates[step] == pytest.approx(FIRST_RUN["learning_rate"] * (1 - (step - 1) / total)), step


LARGER = {"per_device_train_batch_size": 4}


def test_replanned_epoch_resumes_exactly_from_the_latest_run(first_run, tmp_path):
    """Checkpoints of the first run in the same output directory may have higher numbers."""
    directory, _ = first_run
    trainer, resumed = resume(tmp_path, directory / "checkpoint-5", **LARGER)
    first = trainer.state.global_step - len(resumed) + 1
    assert first < 5, "its step numbers must be below those of the first run"
    out = tmp_path / "both" / "out"
    for source, step in ((directory, 5), (directory, 6), (tmp_path / "out", first)):
        shutil.copytree(source / f"checkpoint-{step}", out / f"checkpoint-{step}")
    _, seen = resume(tmp_path / "both", True, **LARGER, commonit_resume="exact")
    assert seen == resumed[1:]


def test_replan_between_epochs_and_at_end(first_run, tmp_path):
    directory, steps = first_run
    trainer, seen = resume(tmp_path / "between", directory / f"checkpoint-{len(steps) // 2}", seed=3)
    plan = trainer.commonit_plan(epoch=1)
    assert [row for step in seen for row in step] == [row for batch in plan.batches(rank=0) for row in batch]
    trainer, seen = resume(tmp_path / "end", directory / f"checkpoint-{len(steps)}", **LARGER)
    assert (trainer.state.global_step, seen) == (2 * trainer.commonit_plan().num_steps, [])


def test_replan_without_changes_resumes_exactly(first_run, tmp_path):
    directory, steps = first_run
    assert resume(tmp_path, directory / "checkpoint-5")[1] == steps[5:]


def test_replan_refuses_other_rows(first_run, tmp_path):
    checkpoint = first_run[0] / "checkpoint-5"
    more, others = id_rows([13, 7, 9, 3]), id_rows(SIZES, seed=1)
    for rows, what in ((more, "rows: 31 -> 32"), (others, "tokens of rows: ")):
        with pytest.raises(ValueError) as error:
            resume(tmp_path, checkpoint, rows, seed=8)
        message = str(error.value)
        assert message.startswith("commonit_resume='replan' needs the rows that ") and what in message, message
        assert "start a new run" in message and "\n" not in message


def test_replan_refuses_other_groups(first_run, tmp_path):
    """The tokens are equal, but the labels contradict the checkpoint's plan, so remaining rows are unknown."""
    tasks = ["g000" if row < 3 else task for row, task in enumerate(ROWS["task"])]
    with pytest.raises(ValueError, match=r"needs the rows .* their groups or numbers of tokens differ"):
        resume(tmp_path, first_run[0] / "checkpoint-5", ROWS.remove_columns("task").add_column("task", tasks))


def test_replan_packed_rows(tmp_path):
    """A replan keeps the packs for other batch sizes, and refuses other groups, which change the packs."""
    packed = {"packing": True, "packing_strategy": "wrapped", "max_length": 48}
    trainer, seen = train(tmp_path, ROWS, **FIRST_RUN, **packed)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    options = {**FIRST_RUN, **packed, "per_device_train_batch_size": 3, "commonit_resume": "replan"}
    resumed = make_trainer(tmp_path / "resumed", ROWS, **options)
    seen_again = Seen(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    remaining = seen_again.steps
    second = resumed.commonit_plan(epoch=1).num_steps
    packs = {tuple(tokens) for tokens in trainer.train_dataset["input_ids"]}
    times = Counter(row.tokens for step in seen.steps[:3] + remaining[:-second] for row in step)
    assert set(times) == packs and max(times.values()) <= 2  # the pack of the group of two rows fills a whole step
    assert sum(times.values()) < len(packs) + 4
    with pytest.raises(ValueError, match=r"with packing, the same packs, .*: rows: "):
        resume(tmp_path / "refused", checkpoint, commonit_metric="length", commonit_num_groups=2, **packed)


def test_refused_resume_suggests_replan(first_run, tmp_path):
    with pytest.raises(ValueError, match=r"data seed: 7 -> 8.*commonit_resume='replan' continues"):
        resume(tmp_path, first_run[0] / "checkpoint-5", seed=8, commonit_resume="exact")


def test_replan_keeps_equal_micro_batches(tmp_path):
    """A loss that is not a sum over tokens needs equal micro-batches; a replan reads this from the manifest."""
    run = {"group_sizes": SIZES, "accepts_loss_kwargs": False}
    options = {"commonit_metric": "task", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    launch([{**run, "name": "first_run", "options": {**options, "max_steps": 2}}], tmp_path, world_size=2)
    resumed = {**options, "commonit_resume": "replan", "gradient_accumulation_steps": 2}
    checkpoint = str(tmp_path / "first_run-out" / "checkpoint-2")
    launch([{**run, "name": "resumed", "options": resumed, "resume": checkpoint}], tmp_path, world_size=2)
    steps = [recorded(tmp_path / f"{name}.ids", 2) for name in ("first_run", "resumed")]
    for ranks in (rank for part in steps for rank in part.values()):
        assert len({len(batch) for rank in ranks for batch in rank}) == 1
    times = Counter(rows_in(ranks for part in steps for ranks in part.values()))
    assert set(times) == set(range(sum(SIZES)))
