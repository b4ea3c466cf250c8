"""I4 under SIGKILL: killed and resumed runs drop and repeat no sample, no rank hangs, and the final weights are those
of an uninterrupted run.

Each kill happens at an event of the run (see `train_worker.py`). Each rank records a micro-batch before training it; of
an attempt, the micro-batches before the checkpoint of the next attempt count.
"""

import json
import random
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from helpers.launch import WORKER, start
from helpers.toys import id_rows, recorded
from safetensors.torch import load_file

SIZES = [1, 5, 7, 26, 62]
TASKS = id_rows(SIZES)["task"]
RATE = 1e-3
OPTIONS = {
    "commonit_metric": "task",
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "learning_rate": RATE,
    "lr_scheduler_type": "linear",
    "dataloader_num_workers": 1,
}
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
KINDS = {"W1": {}, "DDP": {"world_size": 2}, "ZeRO-2": {"world_size": 2, "deepspeed": ZERO2}}
ENGINES = {"ZeRO-2": ("DeepSpeedEngine", 2)}


class Seen(NamedTuple):
    """A step of a rank."""

    replanned: int
    step: int
    epoch: int
    rank: int
    micro_batches: list[list[int]]


def attempt(directory, number, world_size=1, options=None, **run):
    """Run one attempt; it resumes from the last complete checkpoint of those before."""
    options = {**OPTIONS, **(options or {}), "output_dir": str(directory / "out")}
    run = {"group_sizes": SIZES, "dropout": 0.1, **run}  # checkpoints must restore the random states too
    run |= {"name": f"run.{number}", "dir": str(directory), "options": options, "resume": True}
    return start(WORKER, [run], directory, world_size, together=False)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def seen_by(directory, number):
    """Return the start of an attempt, None if it was killed earlier, and its steps on all ranks."""
    if not (directory / f"run.{number}.start.json").exists():
        return None, []
    begins, name = read(directory / f"run.{number}.start.json"), directory / f"run.{number}.ids"
    steps = recorded(name, len(list(directory.glob(f"{name.name}.rank*"))))
    return begins, [
        Seen(begins["replanned"], step, step // begins["per epoch"], rank, micro_batches)
        for step, ranks in steps.items()
        for rank, micro_batches in enumerate(ranks)
    ]


def survived(directory, attempts):
    """Return the steps that count, in order, and the repeats that their plans announce.

    Repeats are numbers of samples by (times replanned, epoch).
    """
    history, announced = [], {}
    for number in range(attempts):
        begins, steps = seen_by(directory, number)
        if begins is not None:
            history = [seen for seen in history if (seen.replanned, seen.step) < tuple(begins["came from"])] + steps
            announced |= {(begins["replanned"], epoch): repeats for epoch, repeats in enumerate(begins["repeats"])}
    return sorted(history), announced


def live(directory, run, deaths):
    """Train a run to its end despite `deaths`; return the number of attempts and a record of each death."""
    died = []
    for number, death in enumerate([*deaths, *[{}] * 2]):
        ended = attempt(directory, number, **{**run, **death})
        if not any(ended.codes):
            return number + 1, died
        assert -9 in ended.codes, (death, ended.stderr)
        epoch = max((seen.epoch for seen in seen_by(directory, number)[1]), default=None)
        died.append({**death["kill"], "epoch": epoch})
    raise AssertionError(ended.stderr)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A function that returns the folder of an uninterrupted run of a kind."""
    folders = {}

    def done(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("whole")
            assert live(folders[kind], KINDS[kind], []) == (1, [])
        return folders[kind]

    return done


def rows_of_epochs(history):
    """Count how often each row was trained in each of the two epochs."""
    return [
        Counter(row for seen in history if seen.epoch == epoch for batch in seen.micro_batches for row in batch)
        for epoch in range(2)
    ]


def lost_and_repeated(directory, history):
    """Count dropped rows, and repeats beyond the saved epoch summary, over both epochs."""
    groups = read(directory / "out" / "commonit" / "groups.json")["epoch_summary"]["groups"]
    announced = Counter({group["name"]: group["samples"] + group["repeated"] for group in groups})
    lost = repeated = 0
    for times in rows_of_epochs(history):
        lost += len(set(range(sum(SIZES))) - set(times))
        repeated += (Counter(TASKS[row] for row in times.elements()) - announced).total()
    return lost, repeated


def assert_survived(kind, directory, attempts, whole):
    """Check that two runs trained the same micro-batches and have the same weights."""
    world_size, last = KINDS[kind].get("world_size", 1), f"run.{attempts - 1}"
    result, expected = read(directory / f"{last}.json"), read(whole / "run.0.json")
    assert (result["world_size"], result["global_step"]) == (world_size, expected["global_step"])
    assert (result.get("engine"), result.get("stage")) == ENGINES.get(kind, (None, None))
    seen, _ = survived(directory, attempts)
    assert seen == survived(whole, 1)[0]
    assert lost_and_repeated(directory, seen) == (0, 0)

    weights, expected = load_file(directory / f"{last}.safetensors"), load_file(whole / "run.0.safetensors")
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
def test_killed_run_resumes_exactly(whole, kind, tmp_path):
    attempts, died = live(tmp_path, KINDS[kind], DIES[kind])
    assert len(died) == len(DIES[kind])
    if kind == "W1":
        assert [death["epoch"] for death in died] == [0, 0, 1]
    assert_survived(kind, tmp_path, attempts, whole(kind))


def changed(**options):
    """Return the options of a run that resumes with other settings."""
    return {"options": {"commonit_resume": "replan", **options}}


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


def test_resume_with_other_ranks_and_settings(tmp_path):
    """Each death is followed by a resume with other ranks, batches, seed, purity or metric."""
    attempts, died = live(tmp_path, {}, ELASTIC)
    assert [death["epoch"] for death in died] == [0, 0, 0]
    history, announced = survived(tmp_path, attempts)
    assert {seen.replanned for seen in history if seen.epoch == 0} == {0, 1, 2, 3}
    assert {seen.rank for seen in history if seen.replanned in (0, 2)} == {0, 1}
    assert_nothing_lost(history, announced)


@pytest.mark.faults
def test_zero2_replan(tmp_path):
    """ZeRO-2 resumes with other accumulation and seed, at the learning rate of the new number of steps.

    It refuses other ranks, because DeepSpeed cannot read the checkpoint.
    """
    kind = KINDS["ZeRO-2"]
    deaths = [
        {"kill": {"at": "micro-batch", "count": 11, "ranks": [0]}},
        changed(gradient_accumulation_steps=3, seed=5),
    ]
    attempts, died = live(tmp_path, kind, deaths)
    assert len(died) == 1
    history, announced = survived(tmp_path, attempts)
    assert {seen.replanned for seen in history} == {0, 1}
    assert_nothing_lost(history, announced)
    result = read(tmp_path / "run.1.json")
    assert (result["engine"], result["stage"]) == ENGINES["ZeRO-2"]
    begins, rates = seen_by(tmp_path, 1)[0], {e["step"]: e["learning_rate"] for e in result["log"] if "loss" in e}
    total = 2 * begins["per epoch"]
    for step in range(begins["begins"] + 1, total + 1):  # DeepSpeed steps the scheduler before the rate is logged
        assert rates[step] == pytest.approx(RATE * (1 - step / total)), step

    refused = attempt(tmp_path, 2, **{**kind, **changed(), "world_size": 1})
    assert refused.codes == [1]
    error = "ValueError: commonit_resume='replan': world size: 2 -> 1: DeepSpeed's checkpoints"
    assert error in refused.stderr


def draw_deaths(seed, world_size, everyone, count):
    """Draw `count` deaths of one rank, or of all at the same event; consecutive deaths differ in kind."""
    draw = random.Random(seed)
    kinds = ["grouping", "micro-batch", "write", "optimizer step", "saved", "micro-batch", "write"]
    most = {"micro-batch": 24 // world_size, "write": 8, "optimizer step": 5, "saved": 2}
    deaths = []
    for number in range(count):
        at, rank = kinds[number % len(kinds)], draw.randrange(world_size)
        # Ranks other than 0 write one file per save.
        limit = 2 if at == "write" and rank and not everyone else most.get(at, 1)
        ranks = list(range(world_size)) if everyone else [rank]
        deaths.append({"kill": {"at": at, "count": draw.randint(limit // 2, limit) or 1, "ranks": ranks}})
    return deaths


LIVES = [("W1", False, 1), ("DDP", False, 2), ("DDP", True, 3), ("ZeRO-2", False, 14), ("ZeRO-2", True, 5)]
DEATHS = 9


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "everyone", "seed"), LIVES)
def test_many_kills(whole, figures, kind, everyone, seed, tmp_path):
    deaths = draw_deaths(seed, KINDS[kind].get("world_size", 1), everyone, DEATHS)
    attempts, died = live(tmp_path, KINDS[kind], deaths)
    assert_survived(kind, tmp_path, attempts, whole(kind))
    epochs = Counter(kill["epoch"] for kill in died)
    lost, repeated = lost_and_repeated(tmp_path, survived(tmp_path, attempts)[0])
    assert len(died) == DEATHS and epochs[0] and epochs[1], "other seeds or counts, please"
    figures["Deaths by SIGKILL, each followed by a resume"].append(
        {
            "run": kind,
            "who died": "all ranks" if everyone else "one rank",
            "deaths": len(died),
            "at": ", ".join(f"{number} × {at}" for at, number in Counter(kill["at"] for kill in died).items()),
            "before training / in epoch 0 / 1": f"{epochs[None]} / {epochs[0]} / {epochs[1]}",
            "samples dropped": lost,
            "samples repeated beyond the epoch summary": repeated,
        }
    )
