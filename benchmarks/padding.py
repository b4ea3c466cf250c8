"""What does a step cost, padding and waiting included, for each way to order samples and to arrange those of a step?

Steps: (1) read the mixture (GSM8K, CodeAlpaca, APIBench) and tokenise it with a byte-level BPE trained on it; (2) group
it by task, by response length (8 bins) and by embedding (32 clusters); (3) plan epochs and arrange the samples of each
step in every way of `ARRANGEMENTS`: all ways get the same steps; (4) add orders that are not pure, of transformers and
random ones; (5) compute the padded tokens of each micro-batch and write a report.

    python -m benchmarks padding --size full --data FOLDER

A way to arrange is a function from the lengths of some units to `Arranged`; a way that only cuts the sorted unit into
blocks is registered by `cut`. Cost: some minutes of one CPU core, and once some minutes to encode the prompts (the
quick size leaves embeddings out); nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from benchmarks.common import Cases, Report, Settings, Table
from benchmarks.mixture import VOCABULARY, encoder, read_mixture, tokenized, train_tokenizer
from commonit_trl import plan_epoch
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.cache import fit_assign_cached
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.task import TaskGrouper
from commonit_trl.plan.balance import _deal, _step_costs, arrange
from commonit_trl.rows import Rows

TITLE = "Padding and waiting"
SIZES = {
    "quick": {"seeds": 2, "metrics": ["task", "length"]},
    "full": {"seeds": 5, "metrics": ["task", "length", "embedding"]},
}
GROUPERS: dict[str, tuple[str, Callable[[], Grouper], float]] = {
    "task": ("task", lambda: TaskGrouper(columns=["task"]), 1.10),
    "length": ("response length, 8 bins", LengthGrouper, 1.06),
    "embedding": ("embedding, 32 clusters", lambda: EmbeddingGrouper(model=encoder()), 1.10),
}
"""How each metric is named in the report, its grouper, and the relative cost that we want to stay under."""
B, W, A = 8, 4, 2
BLOCKS = W * A
STEP = B * BLOCKS
ANNEALING_MOVES = 10_000

Ints = NDArray[np.int64]
Arranged = tuple[Ints, Ints]
"""Lengths of the samples in the order unit, micro-step, rank; and (units, A * W) sizes of the micro-batches."""
ARRANGEMENTS = Cases()
ORDERS = Cases()


# --- ways to arrange a step -------------------------------------------------------------------------------------------


def cut(name: str) -> Callable[[Callable[[Ints], Ints]], Callable[[Ints], Ints]]:
    """Register a function from the lengths of one unit, descending, to the sizes of contiguous blocks; the blocks are
    dealt as the package does, from the costliest to the cheapest, back and forth."""

    def register(function: Callable[[Ints], Ints]) -> Callable[[Ints], Ints]:
        @ARRANGEMENTS(name)
        def arrange_all(units: list[Ints]) -> Arranged:
            descending = [np.sort(unit)[::-1] for unit in units]
            return dealt(descending, np.array([function(unit) for unit in descending]))

        return function

    return register


def dealt(descending: list[Ints], sizes: Ints) -> Arranged:
    lengths, dealt_sizes = [], []
    for unit, counts in zip(descending, sizes, strict=True):
        blocks = np.split(unit, np.cumsum(counts)[:-1])
        by_cost = sorted(blocks, key=lambda block: -block[0] * len(block))
        blocks = [by_cost[place] for place in _deal(A, W)]
        lengths += blocks
        dealt_sizes.append([len(block) for block in blocks])
    return np.concatenate(lengths), np.array(dealt_sizes)


def equal_sizes(count: int) -> Ints:
    return np.full(BLOCKS, count // BLOCKS) + (np.arange(BLOCKS) < count % BLOCKS)


@ARRANGEMENTS("none: random order, equal sizes")
def as_shuffled(units: list[Ints]) -> Arranged:
    return np.concatenate(units), np.array([equal_sizes(len(unit)) for unit in units])


@cut("sorted, equal sizes")
def sorted_equal_sizes(lengths: Ints) -> Ints:
    return equal_sizes(len(lengths))


@ARRANGEMENTS("transformers' rebalance")
def transformers_rebalance(units: list[Ints]) -> Arranged:
    lengths, sizes = [], []
    for unit in units:
        sampler = BatchRebalanceSampler([1] * len(unit), len(unit), dp_size=W, grad_accum=A)
        ranks = sampler._assign(unit.tolist(), unit.tolist())
        batches = [ranks[rank][micro_step] for micro_step in range(A) for rank in range(W)]
        lengths += batches
        sizes.append([len(batch) for batch in batches])
    return np.concatenate(lengths), np.array(sizes)


def fill(lengths: Ints, limits: NDArray[Any]) -> Ints | None:
    """Sizes of blocks filled up to the limits, from the longest sample on; None where samples are left over."""
    place, sizes = 0, []
    for later, limit in zip(range(BLOCKS - 1, -1, -1), limits, strict=True):
        sizes.append(int(min(max(1, limit // lengths[place]), len(lengths) - place - later)))
        place += sizes[-1]
    return np.array(sizes) if place == len(lengths) else None


def least_limit(lengths: Ints, weights: NDArray[Any]) -> Ints:
    """Sizes for the least limit, times the weights, that all samples fit under."""
    low, high = 0, int(lengths[0]) * len(lengths)
    best = fill(lengths, high * weights)
    assert best is not None
    while high - low > 1:
        limit = (low + high) // 2
        sizes = fill(lengths, limit * weights)
        low, high, best = (limit, high, best) if sizes is None else (low, limit, sizes)
    return best


@cut("equal costs (bisection)")
def equal_costs(lengths: Ints) -> Ints:
    return least_limit(lengths, np.ones(BLOCKS))


@cut("best of 32 limits near equal costs")
def best_limits(lengths: Ints) -> Ints:
    weights = np.clip(1 + 0.1 * np.random.default_rng(0).standard_normal((32, BLOCKS)), 0.8, 1.2)
    weights[0] = 1
    sizes = np.array([least_limit(lengths, each) for each in weights])
    costs = sizes * lengths[np.cumsum(sizes, axis=1) - sizes]
    return sizes[_step_costs(costs.T[:, :, None], A, W)[0].argmin()]


@cut("filling what earlier micro-steps left")
def filled_up(lengths: Ints) -> Ints:
    """The limit is a rank's over the step: a rank whose first block ended below its share gets a costlier second."""
    low, high, best = 0, int(lengths[0]) * len(lengths), equal_sizes(len(lengths))
    while high - low > 1:
        limit = (low + high) // 2
        loads, place, sizes = np.zeros(W), 0, []
        for block in range(BLOCKS):
            micro_step, turn = divmod(block, W)
            if turn == 0:
                ranks = np.argsort(loads, kind="stable")
            room = limit * (micro_step + 1) / A - loads[ranks[turn]]
            sizes.append(int(min(max(1, room // lengths[place]), len(lengths) - place - (BLOCKS - 1 - block))))
            loads[ranks[turn]] += sizes[-1] * lengths[place]
            place += sizes[-1]
        fits = place == len(lengths) and loads.max() <= limit
        low, high, best = (low, limit, np.array(sizes)) if fits else (limit, high, best)
    return best


def linear_partition(lengths: Ints, power: float) -> Ints:
    """Sizes with the least sum of the blocks' costs to `power`, by dynamic programming."""
    count = len(lengths)
    size = np.arange(count + 1) - np.arange(count)[:, None]  # (start, end)
    costs = np.where(size > 0, (lengths[:, None] * np.maximum(size, 0)).astype(float) ** power, np.inf)
    least, starts = np.r_[0.0, np.full(count, np.inf)], []
    for _ in range(BLOCKS):
        totals = least[:-1, None] + costs
        starts.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    ends = [count]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return -np.diff(ends)[::-1]


@cut("least padding (dynamic program)")
def least_padding(lengths: Ints) -> Ints:
    return linear_partition(lengths, 1)


@cut("least sum of squared costs (dynamic program)")
def least_squares(lengths: Ints) -> Ints:
    return linear_partition(lengths, 2)


@ARRANGEMENTS("this package: equal costs, then moves")
def ours(units: list[Ints]) -> Arranged:
    lengths = np.concatenate(units)
    order, sizes = arrange(lengths, np.array([len(unit) for unit in units]), A, W)
    return lengths[order], sizes


@ARRANGEMENTS("the same, with an attention term in the cost")
def ours_with_attention(units: list[Ints]) -> Arranged:
    lengths = np.concatenate(units)
    order, sizes = arrange(with_attention(lengths), np.array([len(unit) for unit in units]), A, W)
    return lengths[order], sizes


@ARRANGEMENTS(f"annealing, {ANNEALING_MOVES:,} moves a unit")
def annealed(units: list[Ints]) -> Arranged:
    """How much is left: random moves between blocks, for the same aim as the package's, with no limit for memory."""
    rng = np.random.default_rng(0)
    descending = [np.sort(unit)[::-1] for unit in units]
    width, every = max(map(len, units)), np.arange(len(units))
    lengths = np.array([np.pad(unit, (0, width - len(unit)), constant_values=1) for unit in descending])

    def step_costs(sizes: Ints) -> Ints:
        starts = np.cumsum(sizes, axis=1) - sizes
        costs = sizes * np.take_along_axis(lengths, np.minimum(starts, width - 1), axis=1)
        return _step_costs(costs.T[:, None], A, W)[0][0]

    sizes = np.array([equal_sizes(len(unit)) for unit in units])
    cost, best = step_costs(sizes), sizes
    least = cost
    for heat in np.geomspace(0.02, 0.0001, ANNEALING_MOVES):
        giver, taker = rng.integers(0, BLOCKS, (2, len(units)))
        moved = sizes.copy()
        moved[every, giver] -= 1
        moved[every, taker] += 1
        after = step_costs(moved)
        accepted = rng.random(len(units)) < np.exp(np.minimum(0, (cost - after) / (heat * cost)))
        accepted &= moved.min(axis=1) > 0
        sizes, cost = np.where(accepted[:, None], moved, sizes), np.where(accepted, after, cost)
        best, least = np.where((cost < least)[:, None], sizes, best), np.minimum(cost, least)
    return dealt(descending, best)


# --- orders that are not pure -----------------------------------------------------------------------------------------


def whole_steps(lengths: Ints, rows: Ints) -> Arranged:
    """The rows in this order, cut into equal micro-batches; the last step is left out where it is not full."""
    rows = rows[: len(rows) // STEP * STEP]
    return lengths[rows], np.full((len(rows) // STEP, BLOCKS), B)


@ORDERS("random (TRL's default)")
def random_order(lengths: Ints, seed: int) -> Arranged:
    return whole_steps(lengths, np.random.default_rng(seed).permutation(len(lengths)))


@ORDERS("transformers' group_by_length")
def group_by_length(lengths: Ints, seed: int) -> Arranged:
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(B * A, lengths=lengths.tolist(), generator=generator)
    return whole_steps(lengths, np.array(list(sampler)))


@ORDERS("transformers' batch_rebalance")
def batch_rebalance(lengths: Ints, seed: int) -> Arranged:
    rows = np.random.default_rng(seed).permutation(len(lengths))
    return transformers_rebalance(np.split(lengths[rows[: len(rows) // STEP * STEP]], len(rows) // STEP))


# --- figures ----------------------------------------------------------------------------------------------------------


def with_attention(lengths: Ints) -> Ints:
    """Cost of each sample with transformers' term for attention, in thousandths of a token."""
    return lengths * 1_000 + lengths * lengths


def figures(arranged: Arranged) -> dict[str, float]:
    lengths, sizes = arranged
    longest = np.maximum.reduceat(lengths, np.r_[0, np.cumsum(sizes)[:-1]]).reshape(sizes.shape)
    padded = (longest * sizes).reshape(-1, A, W)
    attention = (with_attention(longest) * sizes).reshape(-1, A, W)
    return {
        "padding": 1 - lengths.sum() / padded.sum(),
        "cost": W * padded.sum(axis=1).max(axis=1).sum() / lengths.sum(),
        "micro_step_cost": W * padded.max(axis=2).sum() / lengths.sum(),
        "attention_cost": W * attention.sum(axis=1).max(axis=1).sum() / with_attention(lengths).sum(),
        "peak": float(padded.max()),
    }


def over_seeds(results: list[dict[str, float]]) -> dict[str, float]:
    means = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    return {**means, "cost_deviation": float(np.std([result["cost"] for result in results]))}


def compare(groups: Ints, lengths: Ints, seeds: int) -> dict[str, dict[str, float]]:
    """The figures of every way to arrange the steps of the same plans."""
    functions, _ = ARRANGEMENTS.present()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for seed in range(seeds):
        plan = plan_epoch(groups, micro_batch_size=B, world_size=W, accumulation_steps=A, seed=seed)
        units = np.split(lengths[plan.indices], plan.offsets[BLOCKS:-1:BLOCKS])
        for name, arrange_all in functions.items():
            results[name].append(figures(arrange_all(units)))
    return {name: over_seeds(each) for name, each in results.items()}


def table(heading: str, results: dict[str, dict[str, float]], goal: float | None) -> Table:
    return Table(
        heading=heading,
        header=["", "padding", "relative cost", "by micro-step", "with attention", "peak tokens"],
        rows=[
            [
                f"**{name}**" if name.startswith("this package") else name,
                f"{row['padding']:.1%}",
                f"{row['cost']:.3f} ± {row['cost_deviation']:.3f}",
                f"{row['micro_step_cost']:.3f}",
                f"{row['attention_cost']:.3f}",
                f"{row['peak']:,.0f}",
            ]
            for name, row in results.items()
        ],
        bars={name: row["cost"] for name, row in results.items()},
        bars_of="relative cost of a step",
        goal=goal,
    )


def run(settings: Settings) -> Report:
    rows = read_mixture(settings.data)
    measured = Rows(tokenized(rows, train_tokenizer(rows, VOCABULARY)))
    lengths, seeds = measured.token_counts("total"), settings["seeds"]
    results = {
        "no groups": {
            name: over_seeds([figures(order(lengths, seed)) for seed in range(seeds)])
            for name, order in ORDERS.present()[0].items()
        }
    }
    goals = {}
    for metric in settings["metrics"]:
        words, grouper, goal = GROUPERS[metric]
        _, groups = fit_assign_cached(grouper(), measured)
        results[f"pure by {words}"] = compare(groups, lengths, seeds)
        goals[f"pure by {words}"] = goal
    return Report(
        head={
            "data": f"{len(lengths)} rows of GSM8K, CodeAlpaca and APIBench, {lengths.sum():,} tokens of a byte-level "
            f"BPE of {VOCABULARY:,}; {B} samples a micro-batch, {W} ranks, {A} micro-batches a rank and step",
            "figures": f"means of {seeds} seeds, ± the standard deviation; *relative cost*: padded tokens of the "
            "slowest rank of each step, times the ranks, for each token; *by micro-step*: the same when ranks wait for "
            "the slowest in every micro-step; *with attention*: relative cost when a sample of n tokens costs n + "
            "n²/1000; *peak tokens*: padded tokens of the largest micro-batch",
        },
        parts=[table(name, each, goals.get(name)) for name, each in results.items()],
        results=results,
    )
