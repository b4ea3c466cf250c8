"""Runs killed by SIGKILL and resumed: no sample is dropped or repeated, no rank hangs, and the final state equals that
of an uninterrupted run.

Each kill happens at an event of the run (see server.py), drawn from a seed. Each rank logs a micro-batch to disk before
it trains it; of an attempt, the lines before the checkpoint of the next attempt count.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.toys import id_rows
from safetensors.torch import load_file

SIZES = [1, 5, 7, 26, 62]
TASKS = id_rows(SIZES)["task"]
RUN = {
    "group_sizes": SIZES,
    "dropout": 0.1,  # checkpoints must then restore the random states
    "resume": True,
    "options": {
        "commonit_metric": "task",
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
    },
}
KINDS = {
    "W1": {"world_size": 1},
    "DDP": {"world_size": 2},
    "ZeRO-2": {"world_size": 2, "zero2": True},
}
ENGINES = {"ZeRO-2": ("DeepSpeedEngine", 2)}


class Seen(NamedTuple):
    """A micro-batch."""

    replanned: int
    step: int
    epoch: int
    rank: int
    rows: list[int]


def begins(directory, name, attempt, rank):
    """Return the start of an attempt, None if it was killed earlier, and its logged micro-batches."""
    path = Path(directory) / f"{name}.{attempt}.rank{rank}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return (lines[0], lines[1:]) if lines else (None, [])


def survived(directory, name, attempts, most_ranks=2):
    """Return the micro-batches that count, in order of steps, and the repeats that their plans announce.

    Repeats are numbers of samples by (times replanned, epoch).
    """
    history, announced = [], {}
    for attempt in range(attempts):
        start, _ = begins(directory, name, attempt, 0)
        if start is None:
            continue
        now, came_from = start["replanned"], tuple(start["came from"])
        history = [seen for seen in history if (seen.replanned, seen.step) < came_from]
        for rank in range(most_ranks):
            for line in begins(directory, name, attempt, rank)[1]:
                step = line["step"]
                history.append(Seen(now, step, step // start["per epoch"], rank, line["ids"]))
        announced.update({(now, epoch): repeats for epoch, repeats in enumerate(start["repeats"])})
    return sorted(history, key=lambda seen: (seen.replanned, seen.step, seen.rank)), announced


def live(server, directory, name, run, deaths):
    """Train a run to its end despite `deaths`; return the number of attempts and a record of each death."""
    died = []
    for attempt, death in enumerate([*deaths, *[{}] * 2]):
        answer = server.do(**{**RUN, **run, "name": name, "dir": str(directory), "attempt": attempt, **death})
        assert not answer["hung"], (death, answer["output"])
        if not any(answer["codes"]):
            return attempt + 1, died
        assert -9 in answer["codes"], (death, answer["output"])
        starts = [begins(directory, name, attempt, rank) for rank in range(len(answer["codes"]))]
        steps = [line["step"] // start["per epoch"] for start, lines in starts for line in lines]
        epoch = max(steps, default=None)
        died.append({**death["kill"], "epoch": epoch, "hung": answer["hung"], "outlived_s": answer["outlived_s"]})
    raise AssertionError(answer["output"])


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory):
    """A function that returns the folder of an uninterrupted run of a kind."""
    folders = {}

    def done(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("whole")
            assert live(server, folders[kind], "run", KINDS[kind], []) == (1, [])
        return folders[kind]

    return done


def rows_of_epochs(history):
    """Count how often each row was trained in each of the two epochs."""
    return [Counter(row for seen in history if seen.epoch == epoch for row in seen.rows) for epoch in range(2)]


def lost_and_repeated(directory, history):
    """Count dropped rows, and repeats beyond the saved epoch summary, over both epochs."""
    groups = json.loads((directory / "run-out" / "commonit" / "groups.json").read_text())["ledger"]["groups"]
    announced = Counter({group["name"]: group["samples"] + group["repeated"] for group in groups})
    lost = repeated = 0
    for times in rows_of_epochs(history):
        lost += len(set(range(sum(SIZES))) - set(times))
        repeated += (Counter(TASKS[row] for row in times.elements()) - announced).total()
    return lost, repeated


def assert_survived(kind, directory, attempts, whole):
    """Check that two runs trained the same micro-batches and have the same results and weights."""
    world_size, result = KINDS[kind]["world_size"], json.loads((directory / "run.json").read_text())
    assert result == json.loads((whole / "run.json").read_text())
    assert result["world_size"] == world_size
    assert (result.get("engine"), result.get("stage")) == ENGINES.get(kind, (None, None))
    seen, _ = survived(directory, "run", attempts)
    assert seen == survived(whole, "run", 1)[0]
    assert lost_and_repeated(directory, seen) == (0, 0)

    weights, expected = (load_file(place / "run.safetensors") for place in (directory, whole))
    for name, value in expected.items():
        if world_size == 1:
            assert torch.equal(weights[name], value), name
        else:
            assert (weights[name] - value).abs().max() <= 1e-6, name


DIES = {
    "W1": [
        {"kill": {"at": "micro-batch", "count": 17, "ranks": [0]}},
        {"kill": {"at": "write", "count": 6, "ranks": [0]}},  # the Trainer's state in the first checkpoint
        {"kill": {"at": "micro-batch", "count": 46, "ranks": [0]}},  # in the second epoch
    ],
    "DDP": [{"kill": {"at": "micro-batch", "count": 12, "ranks": [1]}}],
}


@pytest.mark.parametrize("kind", DIES)
def test_killed_run_resumes_exactly(server, whole, kind, tmp_path):
    attempts, died = live(server, tmp_path, "run", KINDS[kind], DIES[kind])
    assert len(died) == len(DIES[kind])
    if kind == "W1":
        assert [death["epoch"] for death in died] == [0, 0, 1]
    assert_survived(kind, tmp_path, attempts, whole(kind))


def changed(**options):
    """Return the options of a run that resumes with other settings."""
    return {"options": {**RUN["options"], "commonit_resume": "replan", **options}}


ELASTIC = [  # four layouts of batches and two metrics in one epoch; starts on two ranks and ends on one
    {"world_size": 2, "kill": {"at": "micro-batch", "count": 9, "ranks": [1]}},
    {
        "world_size": 1,
        **changed(per_device_train_batch_size=3, gradient_accumulation_steps=1, save_steps=1),
        "kill": {"at": "micro-batch", "count": 5, "ranks": [0]},
    },
    {
        "world_size": 2,
        **changed(seed=5, commonit_purity="micro", save_steps=1),
        "kill": {"at": "optimizer step", "count": 4, "ranks": [0, 1]},
    },
    {"world_size": 1, **changed(commonit_metric="length", commonit_num_groups=3)},
]


def assert_nothing_lost(history, announced):
    """Check that each epoch has every row, and no more repeats than its plans announce."""
    for epoch, times in enumerate(rows_of_epochs(history)):
        assert set(times) == set(range(sum(SIZES)))
        plans = {seen.replanned for seen in history if seen.epoch == epoch}
        assert sum(times.values()) - len(times) <= sum(announced[plan, epoch] for plan in plans)


def test_resume_with_other_ranks_and_settings(server, tmp_path):
    """Each death is followed by a resume with other ranks, batches, seed, purity or metric."""
    attempts, died = live(server, tmp_path, "run", {}, ELASTIC)
    assert [death["epoch"] for death in died] == [0, 0, 0]
    history, announced = survived(tmp_path, "run", attempts)
    assert {seen.replanned for seen in history if seen.epoch == 0} == {0, 1, 2, 3}
    assert {seen.rank for seen in history if seen.replanned in (0, 2)} == {0, 1}
    assert_nothing_lost(history, announced)


@pytest.mark.faults
def test_zero2_replan(server, tmp_path):
    """ZeRO-2 resumes with other accumulation and seed, at the learning rate of the new number of steps.

    It refuses other ranks, because DeepSpeed cannot read the checkpoint.
    """
    kind = KINDS["ZeRO-2"]
    deaths = [
        {"kill": {"at": "micro-batch", "count": 11, "ranks": [0]}},
        changed(gradient_accumulation_steps=3, seed=5),
    ]
    attempts, died = live(server, tmp_path, "run", kind, deaths)
    assert len(died) == 1
    history, announced = survived(tmp_path, "run", attempts)
    assert {seen.replanned for seen in history} == {0, 1}
    assert_nothing_lost(history, announced)
    result = json.loads((tmp_path / "run.json").read_text())
    assert (result["engine"], result["stage"]) == ENGINES["ZeRO-2"]
    start = begins(tmp_path, "run", 1, 0)[0]
    total = 2 * start["per epoch"]
    for step in range(start["begins"] + 1, total + 1):
        rate = RUN["options"]["learning_rate"] * (
            1 - step / total
        )  # DeepSpeed steps the scheduler before the rate is logged
        assert result["rates"][str(step)] == pytest.approx(rate), step

    refused = server.do(**{**RUN, **kind, "name": "run", "dir": str(tmp_path), **changed(), "world_size": 1})
    assert refused["codes"] == [1]
    error = "ValueError: commonit_resume='replan': world size: 2 -> 1: DeepSpeed's checkpoints"
    assert error in refused["output"][0]


def draw_deaths(seed, world_size, everyone, count):
    """Draw `count` deaths of one rank, or of all at the same event; consecutive deaths differ in kind."""
    draw = random.Random(seed)
    kinds = ["grouping", "micro-batch", "write", "optimizer step", "saved", "micro-batch", "write", "epoch begin"]
    kinds += ["micro-batch", "train begin"]
    most = {"grouping": 2, "micro-batch": 24 // world_size, "write": 8, "optimizer step": 5, "saved": 2}
    deaths = []
    for number in range(count):
        at, rank = kinds[number % len(kinds)], draw.randrange(world_size)
        limit = (
            2 if at == "write" and rank and not everyone else most.get(at, 1)
        )  # ranks other than 0 write one file per save
        ranks = list(range(world_size)) if everyone else [rank]
        deaths.append({"kill": {"at": at, "count": draw.randint(limit // 2, limit) or 1, "ranks": ranks}})
    return deaths


LIVES = [("W1", False, 1), ("DDP", False, 2), ("DDP", True, 3), ("ZeRO-2", False, 14), ("ZeRO-2", True, 5)]
DEATHS = 9


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "everyone", "seed"), LIVES)
def test_many_kills(server, whole, figures, kind, everyone, seed, tmp_path):
    deaths = draw_deaths(seed, KINDS[kind]["world_size"], everyone, DEATHS)
    attempts, died = live(server, tmp_path, "run", KINDS[kind], deaths)
    assert_survived(kind, tmp_path, attempts, whole(kind))
    epochs = Counter(kill["epoch"] for kill in died)
    lost, repeated = lost_and_repeated(tmp_path, survived(tmp_path, "run", attempts)[0])
    assert len(died) == DEATHS and epochs[0] and epochs[1], "other seeds or counts, please"
    figures["Deaths by SIGKILL, each followed by a resume"].append(
        {
            "run": kind,
            "who died": "all ranks" if everyone else "one rank",
            "deaths": len(died),
            "at": ", ".join(f"{number} × {at}" for at, number in Counter(kill["at"] for kill in died).items()),
            "before training / in epoch 0 / 1": f"{epochs[None]} / {epochs[0]} / {epochs[1]}",
            "ranks that hung": sum(len(kill["hung"]) for kill in died),
            "longest a rank outlived another, s": max(kill["outlived_s"] for kill in died),
            "samples lost": lost,
            "samples repeated beyond the ledger": repeated,
        }
    )
