"""I1 to I4 for compositions of an epoch, on the rows that a model sees in training, on one rank and two.

Expected groups and counts are computed here from the rows, without the code under test. One launch trains all cases.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.kinds import FROZEN, KINDS, group_loss, load, row_groups
from helpers.launch import WORKER, launch, start
from helpers.toys import QUIET, epochs_of, id_rows, recorded, rows_in
from helpers.trainers import make_trainer, write_jsonl
from trl import pack_dataset

from commonit_trl.cli import main as cli

ACCUMULATION = 2
BINS = 4
LENGTH_EDGES = [12, 24]
PACK = {"packing": True, "packing_strategy": "bfd", "max_length": 48}
MIX = {"commonit_metric": "task", "commonit_remainder": "mix"}
CASES = {
    "mix": MIX,
    "logged": {**MIX, "logging_steps": 3},
    "half": {**MIX, "commonit_pure_fraction": [1.0, 0.5], "num_train_epochs": 2, "save_strategy": "steps"},
    "zero": {**MIX, "commonit_pure_fraction": 0.0},
    "drop": {"commonit_metric": "task", "commonit_remainder": "drop", "commonit_pure_fraction": 0.5},
    "ascending": {**MIX, "commonit_order": "ascending"},
    "pure_first": {**MIX, "commonit_order": "pure_first", "commonit_balance_lengths": False},
    "heaviest": {**MIX, "commonit_heaviest_first": True, "num_train_epochs": 2},
    "small_mix": {**MIX, "commonit_small_groups": "mix"},
    "small_drop": {**MIX, "commonit_small_groups": "drop"},
    "task_file": MIX,
    "column": {
        **MIX,
        "commonit_metric": "column",
        "commonit_column": "score",
        "commonit_num_groups": BINS,
        "commonit_order": "descending",
    },
    "joined": {**MIX, "commonit_metric": "task+length", "commonit_length_edges": LENGTH_EDGES},
    "vectors": {
        **MIX,
        "commonit_metric": "embedding",
        "commonit_embedding_column": "vector",
        "commonit_num_groups": BINS,
    },
    "packed": {**MIX, **PACK},
}
MICRO = "micro"  # its steps may hold several groups, so most tests leave it out
RUNS = {**CASES, MICRO: {**MIX, "commonit_purity": "micro"}}


class Trained:
    """The runs of one launch."""

    def __init__(self, world_size: int, directory: Path) -> None:
        self.world_size, self.directory = world_size, directory
        self.micro_batches = world_size * ACCUMULATION
        self.capacity = step = QUIET["per_device_train_batch_size"] * self.micro_batches
        self.sizes = [1, step - 1, step, step + 1, 3 * step + 2, 2 * step, 1]
        self.rows = id_rows(self.sizes)
        self.tasks = np.array([int(task[1:]) for task in self.rows["task"]])
        self.lengths = np.array([len(tokens) for tokens in self.rows["input_ids"]])
        rng = np.random.default_rng(0)
        self.scores = rng.permutation(len(self.rows)) / 8
        clusters = np.arange(len(self.rows)) % BINS
        responses = [sum(label != -100 for label in labels) for labels in self.rows["labels"]]
        self.groups = dict.fromkeys(RUNS, self.tasks) | {
            "column": (self.scores * 8).astype(int) * BINS // len(self.rows),
            "joined": self.tasks * 10 + np.digitize(responses, LENGTH_EDGES),
            "vectors": clusters,
        }
        vectors = np.eye(BINS + 1)[clusters] + rng.normal(0, 0.02, (len(self.rows), BINS + 1))
        self.columns = {"score": self.scores.tolist(), "vector": vectors.tolist()}

    def options(self, name: str) -> dict:
        options = {"num_train_epochs": 1, "gradient_accumulation_steps": ACCUMULATION, "seed": 7, **RUNS[name]}
        if name.startswith("small"):
            options["commonit_min_group_size"] = self.capacity + 2
        if "save_strategy" in options:
            options["save_steps"] = self.checkpoint
        return options

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.capacity)

    @property
    def checkpoint(self) -> int:
        """A step of the second epoch, in which `half` saves its only checkpoint."""
        return self.steps_per_epoch + 3

    def steps(self, name: str) -> dict[int, list[list[list[int]]]]:
        """Optimizer step -> rank -> micro-step -> row numbers."""
        return recorded(self.directory / f"{name}.ids", self.world_size)

    def epochs(self, name: str) -> list[list[list[list[list[int]]]]]:
        """Epochs of steps."""
        return epochs_of(self.steps(name), RUNS[name].get("num_train_epochs", 1))

    def logs(self, name: str) -> list[dict]:
        result = json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))
        assert result["world_size"] == self.world_size
        return [entry for entry in result["log"] if "loss" in entry]

    def logged_groups(self, name: str) -> dict[int, int]:
        """Optimizer step -> the group of its log, -1 for a mixed one."""
        steps = self.steps(name)
        if name == "logged":  # which does not log every step
            assert steps == self.steps("mix")
            name = "mix"
        groups = {entry["step"] - 1: entry["commonit_group"] for entry in self.logs(name)}
        return {step: groups[step] for step in steps}

    @functools.cache  # noqa: B019
    def units(self, name: str) -> Counter:
        """Group -> its samples: rows, or packs made by TRL from the rows of the group alone."""
        if name != "packed":
            return Counter(self.groups[name].tolist())
        rows = self.rows.select_columns(["input_ids", "labels"])
        groups = self.groups[name]
        packs = {g: rows.select(np.flatnonzero(groups == g)) for g in range(len(self.sizes))}
        return Counter({g: len(pack_dataset(own, PACK["max_length"], "bfd")) for g, own in packs.items()})

    def small(self, name: str) -> list[int]:
        least = self.options(name).get("commonit_min_group_size", 1)
        return [group for group, size in self.units(name).items() if size < least]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def trained(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compositions")
    runs = Trained(request.param, directory)
    task_file = {"commonit_task_file": task_file_of(runs.rows, directory)}
    columns = {name: runs.columns for name in RUNS} | {"task_file": {"task": ["another"] * len(runs.rows)}}
    made = [{"name": name, "options": runs.options(name) | (task_file if name == "task_file" else {})} for name in RUNS]
    half = {"options": runs.options("half") | {"save_strategy": "no"}, "columns": runs.columns}
    half["resume"] = str(directory / "half-out" / f"checkpoint-{runs.checkpoint}")
    made = [{**run, "columns": columns[run["name"]]} for run in made]
    made.append({**half, "name": "resumed"})
    replan = {"commonit_resume": "replan", "per_device_train_batch_size": 1}
    made.append({**half, "name": "replanned", "options": half["options"] | replan})
    launch([{**run, "group_sizes": runs.sizes, "losses": True} for run in made], directory, request.param)
    return runs


def task_file_of(rows, directory):
    """The assignment that `commonit group` writes for the metric `task`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "datasets")
        name = write_jsonl(directory / "rows.jsonl", rows.to_list())
        options = ["--commonit_metric", "task", "--commonit_cache_dir", "grouped_cache", "--output", "grouped"]
        assert cli.main(["group", name, *options]) == 0
    return str(directory / "grouped" / "assignment.parquet")


@pytest.mark.parametrize("name", CASES)
def test_i1_pure_steps_are_pure_and_as_many_as_promised(trained, name):
    """The others are the steps that the log calls mixed."""
    group_of, logged = trained.groups[name], trained.logged_groups(name)
    fractions = np.atleast_1d(RUNS[name].get("commonit_pure_fraction", 1.0))
    units, small = trained.units(name), trained.small(name)
    capacity, total = trained.capacity, 0
    full = sum(size // capacity for group, size in units.items() if group not in small)
    trains = sum(size for group, size in units.items() if group not in small or name != "small_drop")
    names: dict = {}
    for epoch, steps in enumerate(trained.epochs(name)):
        assert len(steps) == (full if name == "drop" else math.ceil(trains / capacity))
        pure = 0
        for number, step in enumerate(steps, start=epoch * len(steps)):
            groups = {int(group_of[row]) for row in rows_in([step])}
            group = logged[number]
            if group >= 0:
                pure += 1
                assert len(groups) == 1 and not groups & {*small}
                assert names.setdefault(group, groups) == groups
        promised = full * fractions[min(epoch, len(fractions) - 1)]
        assert abs(pure - promised) <= 0.5
        total += len(steps) - pure
    assert total > 0  # mixed steps
    assert len({*map(tuple, names.values())}) == len(names)


@pytest.mark.parametrize("name", RUNS)
def test_i2_each_row_trains_once(trained, name):
    """Only a mixed step with fewer samples than micro-batches repeats some of them; `drop` leaves rows out."""
    group_of, small = trained.groups[name], trained.small(name)
    assert bool(small) == name.startswith("small")
    for steps in trained.epochs(name):
        times = Counter(rows_in(steps))
        if name == "drop":
            left_out = Counter(group_of.tolist())
            left_out.subtract(group_of[[*times]].tolist())
            assert left_out == {group: size % trained.capacity for group, size in enumerate(trained.sizes)}
        else:
            left_out_groups = small if name == "small_drop" else []
            assert set(times) == set(np.flatnonzero(~np.isin(group_of, left_out_groups)))
        repeats = sum(times.values()) - len(times)
        samples = [rows_in([step]) for step in steps]
        repeating = [rows for rows in samples if len({*rows}) < len(rows)]
        assert repeats < trained.micro_batches and len(repeating) == bool(repeats)
        assert all(len({*rows}) < trained.micro_batches for rows in repeating)


@pytest.mark.parametrize("name", RUNS)
def test_i3_ranks_read_as_many_micro_batches(trained, name):
    for steps in trained.epochs(name):
        for step in steps if name != MICRO else steps[:-1]:
            assert [len(rank) for rank in step] == [ACCUMULATION] * trained.world_size
            assert all(batch for rank in step for batch in rank)
        assert len({len(rank) for rank in steps[-1]}) == 1
    epochs = trained.epochs(name)
    assert len(epochs) == 1 or epochs[0] != epochs[1]


def test_micro_batches_are_pure_with_purity_micro(trained):
    (steps,) = trained.epochs(MICRO)
    batches = [batch for step in steps for rank in step for batch in rank]
    size = QUIET["per_device_train_batch_size"]
    promised = sum(rows // size for rows in trained.sizes)
    plain = math.ceil(len(trained.rows) / size)
    assert len(batches) - plain in range(trained.world_size)
    pure = [batch for batch in batches if len({trained.tasks[row] for row in batch}) == 1]
    assert len(pure) >= promised and any(len(batch) == size for batch in pure)


def test_task_file_gives_the_groups_of_the_task_column(trained):
    """The dataset's own task column names one task."""
    assert trained.steps("task_file") == trained.steps("mix")


@pytest.mark.parametrize("name", ["ascending", "column", "pure_first"])
def test_steps_come_in_their_order(trained, name):
    (steps,) = trained.epochs(name)
    mixed = np.array([group < 0 for group in trained.logged_groups(name).values()])
    if name == "pure_first":
        assert mixed.tolist() == sorted(mixed) and 0 < mixed.sum() < len(mixed)
        return
    if name == "ascending":
        means = [trained.tasks[rows_in([step])].mean() for step in steps]
        assert means == sorted(means)
    else:
        bins = [trained.groups[name][rows_in([step])[0]] for step, skip in zip(steps, mixed, strict=True) if not skip]
        assert bins == sorted(bins, reverse=True) and len(set(bins)) == BINS


def test_heaviest_first(trained):
    def costs(steps):
        return [max(max(trained.lengths[batch]) * len(batch) for rank in step for batch in rank) for step in steps]

    first, second = map(costs, trained.epochs("heaviest"))
    assert first[0] == max(first)
    assert second[0] < max(second)  # the first epoch only
    (without,) = map(costs, trained.epochs("mix"))
    assert without[0] < max(without) == max(first)


@pytest.mark.parametrize("name", CASES)
def test_losses_of_mixed_steps_and_of_groups(trained, name):
    """`loss_(mixed)` is the mean loss of the trained tokens of mixed steps, `loss_<group>` that of pure ones."""
    every = RUNS[name].get("logging_steps", 1)
    groups = trained.logged_groups(name)
    sums: dict = {}
    for rank in range(trained.world_size):
        for line in (trained.directory / f"{name}.ids.rank{rank}").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            key = entry["step"] // every, groups[entry["step"]]
            sums[key] = sums.get(key, 0) + np.array([sum(entry["losses"]), sum(entry["trained"])])
    both = 0
    for interval, entry in enumerate(trained.logs(name)):
        found = {key: value for key, value in entry.items() if key.startswith("loss_")}
        expected = {group: loss / count for (at, group), (loss, count) in sums.items() if at == interval}
        assert ("loss_(mixed)" in found) == (-1 in expected)
        if -1 in expected:
            assert found.pop("loss_(mixed)") == pytest.approx(expected.pop(-1), rel=1e-4)
            both += bool(expected)
        if name in ("column", "joined", "vectors"):
            assert sorted(found.values()) == pytest.approx(sorted(expected.values()), rel=1e-4)
        else:
            assert found == pytest.approx({f"loss_g{g:03d}": value for g, value in expected.items()}, rel=1e-4)
        last = min((interval + 1) * every, len(groups)) - 1
        assert entry["commonit_group"] == groups[last]
    assert name != "logged" or both  # a log of pure and mixed steps


def test_i4_resume_in_epoch_two_is_exact(trained):
    whole, resumed = trained.steps("half"), trained.steps("resumed")
    assert resumed == {step: seen for step, seen in whole.items() if step >= trained.checkpoint}
    assert trained.logged_groups("resumed").items() <= trained.logged_groups("half").items()


def test_replanned_epoch_trains_each_remaining_row_once_and_keeps_its_pure_share(trained):
    """Resumed with batches of half the size."""
    whole, replanned = trained.steps("half"), trained.steps("replanned")
    before = [whole[step] for step in range(trained.steps_per_epoch, trained.checkpoint)]
    after = [replanned[step] for step in sorted(replanned)]
    assert max(len(rows_in([step])) for step in after) == trained.capacity // 2
    times = Counter(rows_in(before + after))
    assert set(times) == set(range(len(trained.rows)))
    assert sum(times.values()) - len(times) < trained.micro_batches
    old, new = trained.logged_groups("half"), trained.logged_groups("replanned")
    for step, group in new.items():
        assert group < 0 or {*trained.tasks[rows_in([replanned[step]])]} == {group}
    pure_before = sum(old[step] >= 0 for step in range(trained.steps_per_epoch, trained.checkpoint))
    pure = sum(old[step] >= 0 for step in range(trained.steps_per_epoch, len(whole)))
    assert sum(group >= 0 for group in new.values()) == 2 * (pure - pure_before) > 0


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """Runs on two ranks of trainers whose losses need as many samples on each rank."""
    directory = tmp_path_factory.mktemp("gathered")
    options = {"gradient_accumulation_steps": 2, "commonit_remainder": "mix", **FROZEN}
    runs = [{"name": kind, "kind": kind, "metric": "task", "options": options} for kind in ("dpo", "bert-classes")]
    ended = start(WORKER.with_name("rank_worker.py"), runs, directory, world_size=2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return directory


@pytest.mark.parametrize("kind", ["dpo", "bert-classes"])
def test_mixed_steps_of_gathered_losses_have_equal_micro_batches(gathered, kind, tmp_path):
    ranks = [load(gathered / f"{kind}.rank{rank}.pt") for rank in (0, 1)]
    groups, trainer = row_groups(KINDS[kind], tmp_path), KINDS[kind].make(tmp_path, None)
    steps = list(zip(*(rank.rows for rank in ranks), strict=True))
    logs = [entry for entry in ranks[0].logs if "loss" in entry]
    assert len(logs) == len(steps) == 5  # 12, 12 and 9 rows in steps of 8: 3 pure ones, and 9 rows in two mixed ones
    for number, (step, entry) in enumerate(zip(steps, logs, strict=True)):
        assert len({len(batch) for rank in step for batch in rank}) == 1
        held = {groups[row] for row in rows_in([step])}
        mixed = entry["commonit_group"] < 0
        assert mixed or len(held) == 1
        assert [key for key in entry if key.startswith("loss_")] == ["loss_(mixed)" if mixed else f"loss_{held.pop()}"]
        if mixed:
            inputs = [inputs for rank in ranks for inputs, _ in rank.losses[number]]
            # transformers multiplies the loss of a model that takes **kwargs by the number of ranks
            own = group_loss(KINDS[kind], trainer, inputs) * (2 if kind == "bert-classes" else 1)
            assert entry["loss_(mixed)"] == pytest.approx(own, rel=1e-4)
    assert sum(entry["commonit_group"] < 0 for entry in logs) == 2
    times = Counter(rows_in(steps))
    assert set(times) == set(groups)
    sequences = 2 if kind == "dpo" else 1
    assert sum(times.values()) - len(times) < 4 * sequences


WRONG = [
    (
        {"commonit_metric": "embedding", "commonit_embedding_column": "vectors"},
        "commonit_embedding_column='vectors' | vector | Name one",
    ),
    (
        {"commonit_task_file": "missing.parquet"},
        "commonit_task_file='missing.parquet' | Parquet | Write it with `commonit group`",
    ),
    ({"commonit_task_file": "other.parquet"}, "other.parquet' | 3 rows | 8 rows of the dataset | Write it again"),
    (
        {"commonit_task_file": "nameless.parquet"},
        "nameless.parquet' | 'name' | Write it with `commonit group`",
    ),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=lambda value: None if isinstance(value, str) else str(value))
def test_options_that_do_not_fit_the_rows_are_refused_in_one_line(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"row": [0, 1, 2], "name": ["a", "b", "c"]}), "other.parquet")
    pq.write_table(pa.table({"row": [0, 1, 2]}), "nameless.parquet")
    rows = id_rows([4, 4])
    rows = rows.add_column("score", [*range(8)]).add_column("vector", [[0.0, 1.0]] * 8)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, rows, **options)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in says.split(" | ")), message


def test_heaviest_first_needs_token_counts(tmp_path):
    with pytest.raises(ValueError, match=r"commonit_heaviest_first=True: .*\. Set it to False") as error:
        KINDS["vit-classes"].make(tmp_path, "task", commonit_heaviest_first=True)
    assert "\n" not in str(error.value)
