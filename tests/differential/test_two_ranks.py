"""The differential test on two ranks: without a metric a run is the parent's (I7); with one, the update is that of the
parent in one process on the same rows, in equal micro-batches (I6)."""

import functools
from collections.abc import Callable

import pytest
from helpers.kinds import FROZEN, KINDS, Run, change, differences, feed, load
from helpers.launch import WORKER, start

GEOMETRIES = [(kind, steps) for kind in ("sft", "bert-classes", "dpo", "reward") for steps in (1, 2)]
# Not with precomputed references: rank 1 looks for the values of rank 0 in a temporary folder of its own (TRL).
GEOMETRIES += [(kind, 2) for kind in ("kto", "orpo", "cpo")]
KINDS_ON_TWO_RANKS = list(dict.fromkeys(kind for kind, _ in GEOMETRIES))
EXACT = 1e-5
METHODS = {
    "parent": (None, {"evaluated": ["one"], "max_steps": 3}),
    "none": ("none", {"evaluated": ["one"], "max_steps": 3}),
    "balanced": ("task", FROZEN),
    "equal": ("task", {"commonit_balance_lengths": False, **FROZEN}),
}
geometries = pytest.mark.parametrize(("kind", "accumulation"), GEOMETRIES)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Callable[..., dict[str, list[Run]]]:
    """A function that trains kinds by methods in one launch of two processes, once: name -> run of each rank."""

    @functools.cache
    def launch(kinds: tuple[str, ...], *methods: str) -> dict[str, list[Run]]:
        directory = tmp_path_factory.mktemp("ranks")
        wanted = [
            {
                "name": f"{kind}-{accumulation}-{method}",
                "kind": kind,
                "metric": METHODS[method][0],
                "options": {"gradient_accumulation_steps": accumulation, **METHODS[method][1]},
            }
            for kind, accumulation in GEOMETRIES
            for method in methods
            if kind in kinds
        ]
        done = start(WORKER.with_name("rank_worker.py"), wanted, directory, world_size=2)
        assert done.returncode == 0, done.stderr[-2000:]
        return {run["name"]: [load(directory / f"{run['name']}.rank{rank}.pt") for rank in (0, 1)] for run in wanted}

    return launch


@geometries
def test_i7_without_a_metric_two_ranks_run_as_the_parents(kind, accumulation, launched) -> None:
    runs = launched(tuple(KINDS_ON_TWO_RANKS), "parent", "none")
    parents, ours = runs[f"{kind}-{accumulation}-parent"], runs[f"{kind}-{accumulation}-none"]
    for parent, our in zip(parents, ours, strict=True):
        assert len(parent.steps) == 3
        for name in ("steps", "evaluated", "losses", "logs", "updates", "weights"):
            assert not differences(getattr(parent, name), getattr(our, name), name)


@geometries
def test_i6_two_ranks_make_the_update_of_one_process(kind, accumulation, launched, tmp_path) -> None:
    """The reference is the parent in one process, which accumulates the equal micro-batches of both ranks."""
    runs = launched((kind,), "balanced", "equal")
    equal = runs[f"{kind}-{accumulation}-equal"]
    fed = [
        inputs
        for step in range(len(equal[0].steps))
        for micro_step in range(accumulation)
        for inputs in (rank.losses[step][micro_step][0] for rank in equal)
    ]
    reference = feed(KINDS[kind], tmp_path, fed, gradient_accumulation_steps=2 * accumulation)
    for method in ("equal", "balanced"):
        both = runs[f"{kind}-{accumulation}-{method}"]
        assert list(map(sorted, steps_of_both(both))) == list(map(sorted, steps_of_both(equal)))
        for rank in both:
            updates = zip(rank.updates, reference.updates, strict=True)
            assert max(change(update, expected) for update, expected in updates) <= EXACT, method


def steps_of_both(ranks: list[Run]) -> list[list[tuple]]:
    """The rows of each optimizer step."""
    return [
        [row for step in steps for batch in step for row in batch]
        for steps in zip(*(rank.rows for rank in ranks), strict=True)
    ]
