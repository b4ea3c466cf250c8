"""Compare searches for the sizes of micro-batches: cost of a step, peak, time and lines of code.

Steps: (1) read and tokenise the mixture as benchmarks/padding.py does; (2) cut it into steps by task, by response
length (8 bins), and by both with mixed remainders; (3) sort each step by length, cut it into contiguous blocks with
every search of `SEARCHES`, and deal the blocks to ranks and micro-steps; (4) write a table for each geometry and
grouping.

    python -m benchmarks balance --size full --data FOLDER

A search is a function from the sorted lengths of all steps and a geometry to the sizes of the blocks. Cost: a minute of
one CPU core; nothing is downloaded.
"""

import inspect
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Report, Settings, Table
from benchmarks.mixture import VOCABULARY, read_mixture, tokenized, train_tokenizer
from benchmarks.padding import Ints, figures
from commonit_trl import plan_epoch
from commonit_trl.plan.balance import (
    block_costs,
    concatenated_ranges,
    cut_into_equal_costs,
    deal,
    fill,
    move_samples,
    sort_partitions,
    step_costs,
)
from commonit_trl.rows import Rows

TITLE = "Searches that balance a step"
SIZES = {
    "quick": {"seeds": 1, "geometries": [[8, 4, 2]]},
    "full": {"seeds": 3, "geometries": [[8, 4, 2], [4, 8, 4], [8, 1, 4], [4, 2, 1]]},
}
BINS = 8
Deal = Callable[[Ints, int, int], Ints]
Search = Callable[[Ints, Ints, int, int], Ints]
"""(width, steps) descending lengths, (steps,) samples, micro-steps and ranks -> (blocks, steps) sizes"""


# --- searches ---------------------------------------------------------------------------------------------------------


def equal_sizes(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    blocks = micro_steps * world_size
    return counts // blocks + (np.arange(blocks)[:, None] < counts % blocks)


def bisection(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    return cut_into_equal_costs(descending, counts, micro_steps * world_size)


def sums_of_ranks(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    """Bisect a limit per rank: a rank with a cheaper first block may get a costlier second block."""
    blocks, every = micro_steps * world_size, np.arange(len(counts))

    def fill(limit: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        sizes, loads = np.empty((blocks, len(counts)), int), np.zeros((world_size, len(counts)), int)
        start = np.zeros(len(counts), int)
        for block in range(blocks):
            micro_step, turn = divmod(block, world_size)
            if turn == 0:
                ranks = np.argsort(loads, axis=0, kind="stable")
            longest = descending[start, every]
            room = limit * (micro_step + 1) // micro_steps - loads[ranks[turn], every]
            sizes[block] = np.clip(room // longest, 1, counts - start - (blocks - 1 - block))
            loads[ranks[turn], every] += sizes[block] * longest
            start += sizes[block]
        return sizes, (start == counts) & (loads.max(axis=0) <= limit)

    too_low, enough = np.zeros(len(counts), int), descending[0] * counts * micro_steps
    best = bisection(descending, counts, micro_steps, world_size)
    while np.any(enough - too_low > 1):
        limit = (too_low + enough) // 2
        sizes, fits = fill(limit)
        best = np.where(fits, sizes, best)
        too_low, enough = np.where(fits, too_low, limit), np.where(fits, limit, enough)
    return best


def least_padding(descending: Ints, counts: Ints, micro_steps: int, world_size: int, percent: int) -> Ints:
    """Minimise padded tokens by dynamic programming, with a bound on the peak."""
    best = bisection(descending, counts, micro_steps, world_size).astype(int)
    most = block_costs(descending, best).max(axis=0) * (100 + percent) // 100
    for step, count in enumerate(counts):
        lengths, never = descending[:count, step].astype(int), 1 << 60
        size = np.arange(count + 1) - np.arange(count)[:, None]  # (start, end)
        costs = np.where((size > 0) & (lengths[:, None] * size <= most[step]), lengths[:, None] * size, never)
        least, starts = np.r_[0, np.full(count, never)], []
        for _ in range(len(best)):
            totals = np.minimum(least[:-1, None] + costs, never)
            starts.append(totals.argmin(axis=0))
            least = totals.min(axis=0)
        ends = [count]
        for start in reversed(starts):
            ends.append(start[ends[-1]])
        best[:, step] = -np.diff(ends)[::-1]
    return best


def random_limits(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    """Bisect with limits that differ by block, and keep the cheapest step; the peak may grow by 5 %."""
    blocks, every = micro_steps * world_size, np.arange(len(counts))
    best = bisection(descending, counts, micro_steps, world_size)
    most = block_costs(descending, best).max(axis=0) * 21 // 20
    least = step_costs(block_costs(descending, best), micro_steps, world_size)
    for weights in np.random.default_rng(0).integers(58, 71, (8, blocks)):
        too_low, enough = np.zeros(len(counts), int), most * 2
        while np.any(enough - too_low > 1):
            limit = (too_low + enough) // 2
            sizes, start = np.empty_like(best), np.zeros(len(counts), int)
            for block in range(blocks):
                room = limit * weights[block] // 64 // descending[start, every]
                sizes[block] = np.clip(room, 1, counts - start - (blocks - 1 - block))
                start += sizes[block]
            fits = start == counts
            too_low, enough = np.where(fits, too_low, limit), np.where(fits, limit, enough)
            costs = block_costs(descending, sizes)
            cost = step_costs(costs, micro_steps, world_size)
            better = fits & (costs.max(axis=0) <= most) & (cost < least)
            best, least = np.where(better, sizes, best), np.where(better, cost, least)
    return best


def best_moves(descending: Ints, counts: Ints, micro_steps: int, world_size: int, percent: int) -> Ints:
    """Move a sample between the best two blocks of each distance; two passes, at most 256 pairs."""
    sizes = bisection(descending, counts, micro_steps, world_size)
    blocks, every = len(sizes), np.arange(len(counts))
    costs = block_costs(descending, sizes)
    most, least = costs.max(axis=0) * (100 + percent) // 100, step_costs(costs, micro_steps, world_size)
    distances = [*range(1, blocks)] * 2
    for distance in distances[: 256 // blocks]:
        pairs = [(giver, (giver + distance) % blocks) for giver in range(blocks)]
        tried = np.repeat(sizes[None], len(pairs), axis=0)
        steps = np.empty((len(pairs), len(counts)), int)
        for number, (giver, taker) in enumerate(pairs):
            tried[number, giver] -= 1
            tried[number, taker] += 1
            costs = block_costs(descending, tried[number])
            steps[number] = step_costs(costs, micro_steps, world_size)
            steps[number, (tried[number, giver] == 0) | (costs.max(axis=0) > most)] = 1 << 60
        best = steps.argmin(axis=0)
        sizes = np.where(steps[best, every] < least, tried[best, :, every].T, sizes)
        least = np.minimum(least, steps[best, every])
    return sizes


def moves_between_neighbours(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    """Move samples between neighbouring blocks only, twice over all edges; the peak may grow by 5 %."""
    sizes = bisection(descending, counts, micro_steps, world_size)
    costs = block_costs(descending, sizes)
    most, least = costs.max(axis=0) * 21 // 20, step_costs(costs, micro_steps, world_size)
    for edge in [*range(len(sizes) - 1)] * 2:
        for giver, taker in ((edge, edge + 1), (edge + 1, edge)):
            tried = sizes.copy()
            tried[giver] -= 1
            tried[taker] += 1
            costs = block_costs(descending, tried)
            cost = step_costs(costs, micro_steps, world_size)
            better = (tried[giver] > 0) & (costs.max(axis=0) <= most) & (cost < least)
            sizes, least = np.where(better, tried, sizes), np.where(better, cost, least)
    return sizes


def first_moves(descending: Ints, counts: Ints, micro_steps: int, world_size: int) -> Ints:
    sizes = bisection(descending, counts, micro_steps, world_size)
    move_samples(descending, sizes, micro_steps, world_size)
    return sizes


def dealt_by_load(costs: Ints, micro_steps: int, world_size: int) -> Ints:
    """Give the costliest block of each micro-step to the rank with the least load (LPT)."""
    by_cost = np.argsort(-costs, axis=0, kind="stable")
    loads, order = np.zeros((world_size, costs.shape[1]), int), np.empty_like(by_cost)
    for micro_step in range(micro_steps):
        here = slice(micro_step * world_size, (micro_step + 1) * world_size)
        ranks = np.argsort(loads, axis=0, kind="stable")
        np.put_along_axis(order[here], ranks, by_cost[here], axis=0)
        loads += np.take_along_axis(costs, order[here], axis=0)
    return order


def dealt_in_turns(costs: Ints, micro_steps: int, world_size: int) -> Ints:
    return np.argsort(-costs, axis=0, kind="stable")[deal(micro_steps, world_size)]


BISECTION = [cut_into_equal_costs, fill]
MOVES = [*BISECTION, step_costs]
SEARCHES: dict[str, tuple[Search, Deal, list[Callable[..., object]]]] = {
    "equal sizes": (equal_sizes, dealt_in_turns, [equal_sizes]),
    "bisection": (bisection, dealt_in_turns, BISECTION),
    "bisection, dealt by load": (bisection, dealt_by_load, [*BISECTION, dealt_by_load]),
    "bisection of the sums of ranks": (sums_of_ranks, dealt_by_load, [sums_of_ranks, dealt_by_load]),
    "dynamic program, peak + 5 %": (partial(least_padding, percent=5), dealt_by_load, [*BISECTION, least_padding]),
    "best of 8 random limits, peak + 5 %": (random_limits, dealt_in_turns, [*MOVES, random_limits]),
    "moves between neighbours, peak + 5 %": (
        moves_between_neighbours,
        dealt_in_turns,
        [*MOVES, moves_between_neighbours],
    ),
    **{
        f"best moves, peak + {percent} %": (partial(best_moves, percent=percent), dealt_in_turns, [*MOVES, best_moves])
        for percent in (25, 5, 0)
    },
    "this package: first moves, peak + 5 %": (first_moves, dealt_in_turns, [*MOVES, move_samples]),
}
"""Name -> search, dealing of blocks, and the functions whose lines count. Formerly the package used `best moves, peak
+ 25 %`, in 98 lines beyond the bisection and ten times as fast as here."""


# --- steps ------------------------------------------------------------------------------------------------------------


def bins(values: Ints) -> Ints:
    edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS, method="higher"))
    return np.searchsorted(edges, values, side="right")


def pure_steps(groups: Ints, geometry: tuple[int, int, int], seed: int) -> list[Ints]:
    micro_batch_size, world_size, micro_steps = geometry
    plan = plan_epoch(
        groups,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation_steps=micro_steps,
        seed=seed,
    )
    blocks = world_size * micro_steps
    return np.split(plan.indices, plan.offsets[blocks:-1:blocks])


def steps_with_mixed_remainders(groups: Ints, geometry: tuple[int, int, int], seed: int) -> list[Ints]:
    """Cut full pure steps of each group, and mixed steps of the remaining rows of neighbouring groups."""
    capacity, rng = int(np.prod(geometry)), np.random.default_rng(seed)
    steps, remaining = [], []
    for group in range(groups.max() + 1):
        rows = rng.permutation(np.flatnonzero(groups == group))
        full = len(rows) // capacity * capacity
        steps += np.split(rows[:full], full // capacity) if full else []
        remaining.append(rows[full:])
    rest = np.concatenate(remaining)
    return steps + [rest[start : start + capacity] for start in range(0, len(rest) - capacity + 1, capacity)]


# --- figures ----------------------------------------------------------------------------------------------------------


def measure(
    search: Search, dealt: Deal, lengths: Ints, counts: Ints, micro_steps: int, world_size: int
) -> dict[str, float]:
    begin = time.process_time()
    order, descending = sort_partitions(lengths, counts)
    sizes = search(descending, counts, micro_steps, world_size)
    places = dealt(block_costs(descending, sizes), micro_steps, world_size)
    starts = np.cumsum(sizes, axis=0) - sizes + np.arange(len(order)) * order.shape[1]
    starts, sizes = (np.take_along_axis(each, places, axis=0).T for each in (starts, sizes))
    chosen = order.ravel()[concatenated_ranges(starts.ravel(), sizes.ravel())]
    microseconds = (time.process_time() - begin) / len(lengths) * 1e6
    return {**figures((lengths[chosen], sizes), micro_steps, world_size), "microseconds": microseconds}


def compare(units: list[list[Ints]], lengths: Ints, micro_steps: int, world_size: int) -> dict[str, dict[str, float]]:
    """Compute the mean figures of every search over the epochs; the time is the minimum."""
    results = {}
    for name, (search, dealt, functions) in SEARCHES.items():
        epochs = []
        for steps in units:
            counts = np.array([len(step) for step in steps])
            epochs.append(measure(search, dealt, lengths[np.concatenate(steps)], counts, micro_steps, world_size))
        results[name] = {figure: float(np.mean([epoch[figure] for epoch in epochs])) for figure in epochs[0]}
        results[name]["microseconds"] = min(epoch["microseconds"] for epoch in epochs)
        results[name]["lines"] = sum(len(inspect.getsource(function).splitlines()) for function in functions)
    return results


def table(heading: str, results: dict[str, dict[str, float]]) -> Table:
    return Table(
        heading=heading,
        header=["", "by step", "by micro-step", "padding", "peak tokens", "of bisection's", "µs a sample", "lines"],
        rows=[
            [
                f"**{name}**" if name.startswith("this package") else name,
                f"{row['cost']:.3f}",
                f"{row['micro_step_cost']:.3f}",
                f"{row['padding']:.1%}",
                f"{row['peak']:,.0f}",
                f"{row['peak'] / results['bisection']['peak']:.2f}",
                f"{row['microseconds']:.2f}",
                row["lines"],
            ]
            for name, row in results.items()
        ],
    )


def run(settings: Settings) -> Report:
    rows = read_mixture(settings.data)
    measured = Rows(tokenized(rows, train_tokenizer(rows, VOCABULARY)))
    lengths, responses = measured.token_counts("total"), measured.token_counts("response")
    tasks = np.unique([row["task"] for row in rows], return_inverse=True)[1]
    both = np.zeros_like(tasks)
    for task in np.unique(tasks):
        both[tasks == task] = task * BINS + bins(responses[tasks == task])
    groupings = {
        "by task": partial(pure_steps, tasks),
        "by response length": partial(pure_steps, bins(responses)),
        "by task and response length, remainders mixed": partial(steps_with_mixed_remainders, both),
    }
    results = {}
    for geometry in settings["geometries"]:
        micro_batch_size, world_size, micro_steps = geometry
        words = f"{micro_batch_size} samples a micro-batch, {world_size} ranks, {micro_steps} micro-steps"
        for name, steps_of in groupings.items():
            epochs = [steps_of(geometry, seed) for seed in range(settings["seeds"])]
            results[f"{words}: {name}"] = compare(epochs, lengths, micro_steps, world_size)
    return Report(
        head={
            "data": f"{len(lengths)} rows of GSM8K, CodeAlpaca and APIBench, {lengths.sum():,} tokens of a byte-level "
            f"BPE of {VOCABULARY:,}",
            "figures": f"means of {settings['seeds']} epochs; *by step*: padded tokens of the slowest rank of each "
            "step, times the ranks, for each token; *by micro-step*: the same when ranks wait in every micro-step; "
            "*peak tokens*: padded tokens of the largest micro-batch; *µs a sample*: CPU time, sorting and dealing "
            "included; *lines*: of the search, bisection included, without sorting and dealing",
        },
        parts=[table(name, each) for name, each in results.items()],
        results=results,
    )
