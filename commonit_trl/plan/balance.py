"""Arrange the samples of each unit by token length into micro-batches of different sizes. Numpy only.

A micro-batch costs its longest sample times its number of samples; a step costs what its slowest rank has to compute.
Steps: (1) sort each unit by length, descending: for given sizes of the micro-batches no other choice of samples makes
any of them cheaper than cutting the sorted unit into contiguous blocks; (2) find, by bisection, the lowest cost under
which every block can stay, which makes blocks about equal and the largest as small as it can be; (3) move single
samples between blocks while that makes the unit's step cheaper: equal blocks are not the cheapest when a rank runs
several, and whole samples leave them unequal; (4) deal the blocks to micro-steps and ranks from the costliest to the
cheapest, back and forth.

Everything is computed in integers, for all units at once, so the result is the same on every machine. Cost: 0.1 to
0.2 microseconds a sample. benchmarks/padding.py compares this with other ways.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SLOWEST_RANK_WEIGHT = 4
"""How much the cost of the slowest rank over the whole step counts against that of the slowest rank of each micro-step.
The first is what ranks wait for when they meet once a step, the second when they meet in every micro-step."""
_MOVES_TRIED = 256
"""Per unit, unless trying every pair of blocks twice is fewer: it bounds the time spent on units of many blocks, where
little is left to gain."""
_HEADROOM = 16
"""All samples of a unit at the cost of its longest, times this, stay below the largest integer."""
_SAME, _GIVES, _GIVES_LATER, _TAKES, _TAKES_EARLIER, _EARLIER, _LATER = range(7)


def arrange(
    lengths: NDArray[Any], unit_sizes: NDArray[np.int64], micro_steps: int, world_size: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Arrange each unit into `micro_steps` x `world_size` micro-batches of similar lengths and balanced cost.

    Args:
        lengths: (samples,) tokens of each sample, unit after unit.
        unit_sizes: (units,) samples of each unit, at least `micro_steps * world_size`.

    Returns:
        (samples,) the places in `lengths` in their new order: unit, micro-step, rank, place in the micro-batch; and
        (units, micro_steps * world_size) samples of each micro-batch, all above 0.
    """
    blocks = micro_steps * world_size
    by_length, descending = _sort_units(np.maximum(lengths, 1), unit_sizes)
    sizes = _cut_into_equal_costs(descending, unit_sizes.astype(descending.dtype), blocks)
    sizes = _move_samples(descending, sizes, micro_steps, world_size)

    starts = np.cumsum(sizes, axis=0) - sizes
    by_cost = np.argsort(-sizes * _at(descending, starts), axis=0, kind="stable")
    dealt = by_cost[_deal(micro_steps, world_size)]
    sizes = np.take_along_axis(sizes, dealt, axis=0).T
    starts = np.take_along_axis(starts, dealt, axis=0).T + np.arange(len(by_length))[:, None] * by_length.shape[1]
    return by_length.ravel()[concatenated_ranges(starts.ravel(), sizes.ravel())], sizes


def _deal(micro_steps: int, world_size: int) -> NDArray[np.int64]:
    """(micro-steps * world size,) which block, counted from the costliest, each micro-batch is: the ranks take turns in
    one order and then in the other, so that no rank gets the costlier block every time."""
    dealt = np.arange(micro_steps * world_size).reshape(micro_steps, world_size)
    dealt[1::2] = dealt[1::2, ::-1].copy()
    return dealt.ravel()


def concatenated_ranges(starts: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.int64]:
    """start, start + 1, ..., start + size - 1 of each pair, one after another."""
    ends = np.cumsum(sizes, dtype=np.int64)
    places = np.repeat(starts - (ends - sizes), sizes)
    places += np.arange(len(places))
    return places


def _sort_units(lengths: NDArray[Any], unit_sizes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sort each unit by length, descending, equal lengths by place.

    Returns:
        (units, width) places in `lengths`, and (width, units) lengths; behind a unit's samples, anything and 1.
    """
    longest, width = int(lengths.max()), int(unit_sizes.max())
    bits = len(lengths).bit_length()
    # 32 bits are twice as fast where they suffice for the sort keys and for the costs.
    largest = max((longest + 1) << bits, _HEADROOM * longest * width)
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    filled = np.arange(width) < unit_sizes[:, None]
    keys = np.full(filled.shape, longest << bits, dtype=dtype)  # as a sample of length 0, which there is not
    shortness: NDArray[Any] = longest - lengths.astype(dtype)
    keys[filled] = (shortness << bits) + np.arange(len(lengths))
    keys.sort(axis=1)
    descending = np.maximum(longest - (keys >> bits), 1)
    return keys & ((1 << bits) - 1), np.ascontiguousarray(descending.T)


def _at(descending: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    """(any, units) lengths at places of (any, units); faster than `take_along_axis`."""
    units = descending.shape[1]
    return descending.ravel().take(places * np.int64(units) + np.arange(units))


def _cut_into_equal_costs(descending: NDArray[Any], unit_sizes: NDArray[Any], blocks: int) -> NDArray[Any]:
    """(blocks, units) sizes of contiguous blocks; the costliest of a unit is as cheap as it can be."""
    tokens = descending.sum(axis=0, dtype=descending.dtype) - (len(descending) - unit_sizes)
    low = np.maximum(descending[0], tokens // blocks) - 1  # too low
    high = descending[0] * -(-unit_sizes // blocks)  # equal sizes always fit
    while np.any(high - low > 1):
        limit = (low + high) // 2
        fits = _fill(descending, unit_sizes, blocks, limit).sum(axis=0) == unit_sizes
        low, high = np.where(fits, low, limit), np.where(fits, limit, high)
    return _fill(descending, unit_sizes, blocks, high)


def _fill(descending: NDArray[Any], unit_sizes: NDArray[Any], blocks: int, limit: NDArray[Any]) -> NDArray[Any]:
    """(blocks, units) sizes of blocks filled up to a cost of `limit` (units,) each, from the longest sample on, with a
    sample left for each later block."""
    sizes = np.empty((blocks, len(unit_sizes)), dtype=descending.dtype)
    place = np.zeros_like(unit_sizes)
    for block in range(blocks):
        sizes[block] = np.minimum(limit // _at(descending, place), unit_sizes - place - (blocks - 1 - block))
        place += sizes[block]
    return sizes


def _move_samples(descending: NDArray[Any], sizes: NDArray[Any], micro_steps: int, world_size: int) -> NDArray[Any]:
    """(blocks, units) sizes after those single moves of a sample from one block to another that make the step cheaper.

    A round tries the moves over one distance, from every block, and takes the best. No block may get costlier than 5/4
    of the costliest at the start, for the sake of memory.
    """
    costs = sizes * _at(descending, np.cumsum(sizes, axis=0) - sizes)
    most = costs.max(axis=0) // 4 * 5
    least, _ = _step_costs(costs[:, None], micro_steps, world_size)
    for moved, costs_after in _rounds(len(sizes)):
        costs = _costs_of_changes(descending, sizes)[costs_after]
        after, peak = _step_costs(costs, micro_steps, world_size)
        after[peak > most] = np.iinfo(after.dtype).max
        best = after.argmin(axis=0)[None]
        after = np.take_along_axis(after, best, axis=0)
        sizes = sizes + np.where(after < least, moved[:, best[0]], 0)
        least = np.minimum(least, after)
    return sizes


@functools.cache
def _rounds(blocks: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """For each round: (blocks, moves) the change of the sizes, and (blocks, moves) rows of `_costs_of_changes`."""
    rounds = []
    block, giver = np.arange(blocks)[:, None], np.arange(blocks)
    for number in range(min(2 * (blocks - 1), _MOVES_TRIED // blocks)):
        taker = (giver + 1 + number % (blocks - 1)) % blocks
        moved = (block == taker).astype(np.int32) - (block == giver)
        change = np.select(
            [
                (block == giver) & (giver < taker),
                (block == giver) & (giver > taker),
                (block == taker) & (giver < taker),
                (block == taker) & (giver > taker),
                (giver < block) & (block < taker),
                (taker < block) & (block < giver),
            ],
            [_GIVES, _GIVES_LATER, _TAKES_EARLIER, _TAKES, _EARLIER, _LATER],
            _SAME,
        )
        rounds.append((moved, change * blocks + block))
    return rounds


def _costs_of_changes(descending: NDArray[Any], sizes: NDArray[Any]) -> NDArray[Any]:
    """(changes * blocks, units) cost of each block after each change: it gives or takes a sample or neither, and starts
    where it does, a place earlier or a place later in the sorted unit."""
    starts = np.cumsum(sizes, axis=0) - sizes
    first = _at(descending, starts)
    before = _at(descending, np.maximum(starts - 1, 0))
    after = _at(descending, np.minimum(starts + 1, len(descending) - 1))
    costs = np.empty((7, *sizes.shape), dtype=descending.dtype)
    costs[_SAME] = sizes * first
    costs[_EARLIER] = sizes * before
    costs[_LATER] = sizes * after
    costs[_GIVES] = costs[_SAME] - first
    costs[_GIVES_LATER] = costs[_LATER] - after
    costs[_TAKES] = costs[_SAME] + first
    costs[_TAKES_EARLIER] = costs[_EARLIER] + before
    # A block of one sample has none to give: too costly, whatever the unit.
    np.copyto(costs[_GIVES : _GIVES_LATER + 1], np.iinfo(costs.dtype).max // _HEADROOM, where=sizes == 1)
    return costs.reshape(-1, sizes.shape[1])


def _step_costs(costs: NDArray[Any], micro_steps: int, world_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(moves, units) what a step costs when blocks of (blocks, moves, units) costs are dealt to ranks and micro-steps,
    and (moves, units) the cost of the costliest block."""
    by_cost = list(costs)
    for one, other in _sorting_network(len(by_cost)):  # whole rows at a time: much faster than np.sort on this axis
        by_cost[one], by_cost[other] = (
            np.maximum(by_cost[one], by_cost[other]),
            np.minimum(by_cost[one], by_cost[other]),
        )
    dealt = [by_cost[block] for block in _deal(micro_steps, world_size)]
    ranks = [functools.reduce(np.add, dealt[rank::world_size]) for rank in range(world_size)]
    slowest_of_micro_steps = functools.reduce(np.add, by_cost[::world_size])
    return _SLOWEST_RANK_WEIGHT * functools.reduce(np.maximum, ranks) + slowest_of_micro_steps, by_cost[0]


@functools.cache
def _sorting_network(count: int) -> list[tuple[int, int]]:
    """Pairs of places to compare, in order, to sort `count` values: merge exchange (Batcher; Knuth, TAOCP 5.2.2 M)."""
    pairs = []
    half = 1 << (count - 1).bit_length() >> 1
    part = half
    while part:
        distance, offset, merge = part, 0, half
        while True:
            pairs += [(place, place + distance) for place in range(count - distance) if place & part == offset]
            if merge == part:
                break
            distance, offset, merge = merge - part, part, merge >> 1
        part >>= 1
    return pairs
