"""I1 to I5 with Axolotl, checked on the model's inputs.

Cases: every metric, packed and unpacked, accumulation 1 and 3, one and two ranks.

1. Pure: all micro-batches of a step, on all ranks, hold rows of one group.
2. Lossless: every row once per epoch; only groups with fewer rows than a step has micro-batches repeat rows.
3. Agreed: all ranks have the same number of micro-batches in every step.
4. Reproducible: the same recipe gives the same batches; epochs differ.
5. Honest length: N epochs without `max_steps` run the steps of N plans, and the scheduler ends with the last one.

The expected group of a row follows from its construction, not from the computed groups.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.axolotl_recipes import launch, recipe, result, seen, write_recipe, write_rows
from helpers.toys import epochs_of, rows_in

QUESTIONS = {
    "capital": "What is the capital city of {}?",
    "sum": "Add the numbers {} and {} together.",
    "poem": "Write a short love poem about {}.",
}
WORDS = ["France", "seven", "spring", "Japan", "nine", "the sea", "Peru", "four", "a rose"]
SIZES = {"capital": 13, "sum": 5, "poem": 1}  # at W = 2, A = 3: a step's rows plus one, its micro-batches minus one
ANSWER_LENGTHS = {5: 12, 20: 6, 35: 1}  # at W = 2, A = 3: a step's rows, its micro-batches
EDGES = [10, 30]
EPOCHS = 2
BATCH_SIZE = 2
SEQUENCE_LEN = 160
FORMAT = {"field_instruction": "instruction", "field_output": "output", "format": "{instruction}"}
PACKINGS = {
    "plain": {},
    "packed": {"sample_packing": True, "multipack_real_batches": False},
    "packed-rows": {"sample_packing": True, "multipack_real_batches": True},
}


def question(task, rng):
    return QUESTIONS[task].format(rng.choice(WORDS), rng.choice(WORDS))


def make_rows():
    rng = random.Random(0)
    tasks, lengths = ([name for name, size in of.items() for _ in range(size)] for of in (SIZES, ANSWER_LENGTHS))
    rng.shuffle(tasks)
    rng.shuffle(lengths)
    return [
        {"instruction": f"{question(task, rng)} #{number}#", "output": "a" * length, "task": task}
        for number, (task, length) in enumerate(zip(tasks, lengths, strict=True))
    ]


def make_reference():
    rng = random.Random(1)
    return [{"instruction": question(task, rng), "output": "a", "task": task} for task in QUESTIONS for _ in range(4)]


ROWS = make_rows()
TASKS, LENGTHS = [row["task"] for row in ROWS], [len(row["output"]) for row in ROWS]
GROUPS = {"task": TASKS, "length": LENGTHS, "embedding": TASKS}


@dataclass(frozen=True)
class Case:
    metric: str
    packing: str
    accumulation: int
    world_size: int

    @property
    def name(self):
        return f"{self.metric}-{self.packing}-A{self.accumulation}-W{self.world_size}"


CASES = [
    Case(metric, packing, accumulation, world_size)
    for world_size in (1, 2)
    for metric in GROUPS
    for packing in PACKINGS
    for accumulation in (1, 3)
    if metric == "task" or accumulation == 3 or packing == "plain"
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, minilm) -> Path:
    """Train all `CASES`, in one launch per number of ranks."""
    directory = tmp_path_factory.mktemp("axolotl")
    write_rows(directory / "reference.jsonl", make_reference())
    data = [{"path": str(write_rows(directory / "rows.jsonl", ROWS)), "type": FORMAT}]
    metrics = {
        "task": {"commonit_task_column": "task"},
        "length": {"commonit_length_edges": EDGES},
        "embedding": {
            "commonit_embedding_model": minilm,
            "commonit_reference_dataset": str(directory / "reference.jsonl"),
        },
    }

    def run(name, case):
        keys = {**PACKINGS[case.packing], **metrics[case.metric], "commonit_metric": case.metric}
        keys |= {"sequence_len": SEQUENCE_LEN, "micro_batch_size": BATCH_SIZE, "warmup_ratio": 0.1}
        keys |= {"gradient_accumulation_steps": case.accumulation, "num_epochs": EPOCHS}
        keys |= {"output_dir": str(directory / f"{name}-out")}
        return {"name": name, "recipe": str(write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys)))}

    for world_size in (1, 2):  # the run on one rank prepares the rows for two
        runs = [run(case.name, case) for case in CASES if case.world_size == world_size]
        if world_size == 2:
            runs.append(run("again", Case("task", "packed", 3, 2)))
        launch(runs, directory, world_size)
    return directory


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture
def steps(case, directory):
    """Optimizer step -> rank -> micro-step -> row numbers."""
    return seen(directory / case.name, case.world_size)


def test_each_step_has_one_group(case, steps):
    for step in steps.values():
        assert len({GROUPS[case.metric][number] for number in rows_in([step])}) == 1


def test_each_row_is_seen_once_per_epoch(case, steps):
    sizes = Counter(GROUPS[case.metric])
    micro_batches = case.world_size * case.accumulation
    for epoch in epochs_of(steps, EPOCHS):
        counts = Counter(rows_in(epoch))
        assert set(counts) == set(range(len(ROWS)))
        for group, size in sizes.items():
            seen_rows = sum(counts[number] for number in range(len(ROWS)) if GROUPS[case.metric][number] == group)
            if case.packing == "plain" or size >= micro_batches:
                assert seen_rows == max(size, micro_batches)
            else:
                assert seen_rows < size + micro_batches


def test_ranks_run_same_number_of_micro_batches(case, steps):
    for step in steps.values():
        assert [len(rank) for rank in step] == [case.accumulation] * case.world_size
        assert all(micro_batch for rank in step for micro_batch in rank)


def test_run_length_matches_plans(case, steps, directory):
    outcome = result(directory / case.name)
    sizes = Counter(GROUPS[case.metric]).values()
    capacity = BATCH_SIZE * case.world_size * case.accumulation
    unpacked = sum(-(-size // capacity) for size in sizes)
    assert (outcome["trainer"], outcome["world_size"]) == ("CommonITAxolotlTrainer", case.world_size)
    if case.packing == "plain":
        assert len(steps) == EPOCHS * unpacked
    else:
        assert EPOCHS * len(sizes) <= len(steps) <= EPOCHS * unpacked
    assert outcome["global_step"] == outcome["max_steps"] == outcome["scheduler_steps"] == len(steps)
    assert outcome["warmup_steps"] == {0: 0, 1: 2}.get(len(steps) // 10, len(steps) // 10)  # Axolotl turns 1 into 2
    assert [entry["learning_rate"] for entry in outcome["log"] if "learning_rate" in entry][-1] < 1e-3 / len(steps) * 2


def test_epochs_differ(steps):
    first, second = epochs_of(steps, EPOCHS)
    if len(first) > 3:  # two epochs of three steps may have the same order
        assert first != second


@pytest.mark.parametrize("case", [case for case in CASES if case.packing != "plain"], ids=lambda case: case.name)
def test_packed_micro_batches_fit_capacity(case, directory):
    paths = [Path(f"{directory / case.name}.ids.rank{rank}") for rank in range(case.world_size)]
    shapes = [json.loads(line)["shape"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    for rows, tokens in shapes:
        if case.packing == "packed":
            assert rows == 1 and tokens <= BATCH_SIZE * SEQUENCE_LEN
        else:
            assert tokens <= SEQUENCE_LEN
    assert max(tokens for _, tokens in shapes) > 100  # several rows share a bin


def test_same_recipe_gives_same_batches(directory):
    assert seen(directory / "again", 2) == seen(directory / "task-packed-A3-W2", 2)
