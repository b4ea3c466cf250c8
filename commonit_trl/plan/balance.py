"""Cut each partition into micro-batches of balanced cost by token length. NumPy only.

A micro-batch costs its longest sample times its number of samples, the tokens that a padded batch computes. A step
costs as much as its slowest rank.

Steps: (1) sort each partition by length, descending. For given sizes of the micro-batches, contiguous blocks of the
sorted partition are the cheapest choice. (2) Find by bisection the lowest cost that no block needs to exceed. (3) Move
single samples between blocks while that lowers the cost of the step; the peak may grow by a twentieth. (4) Deal the
blocks to micro-steps and ranks from the costliest to the cheapest, in alternating directions.

All partitions are computed at once, in integers, so every machine gets the same result. `python -m benchmarks balance`
compares this search with others: cost of a step, peak, time and lines of code.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SLOWEST_RANK_WEIGHT = 4
"""Weight of the slowest rank over the whole step (DDP synchronises once a step) against the slowest ranks of each
micro-step (ZeRO-3 and FSDP synchronise in every micro-step)."""
_MOVES_TRIED = 64
"""Moves tried per partition: two passes over all pairs of up to 6 blocks; it bounds the time for more."""


def balance(
    lengths: NDArray[Any], partition_sizes: NDArray[np.int64], micro_steps: int, world_size: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Cut partitions into micro-batches of similar lengths and balanced cost.

    Args:
        lengths: (samples,) tokens of each sample, partition after partition.
        partition_sizes: (partitions,) samples of each partition, at least `micro_steps * world_size`.

    Returns:
        (samples,) indices into `lengths` in the order partition, micro-step, rank; and (partitions, micro_steps *
        world_size) samples of each micro-batch, at least 1.
    """
    order, descending = sort_partitions(np.maximum(lengths, 1), partition_sizes)
    sizes = cut_into_equal_costs(descending, partition_sizes, micro_steps * world_size)
    move_samples(descending, sizes, micro_steps, world_size)

    starts = np.cumsum(sizes, axis=0) - sizes + np.arange(len(order)) * order.shape[1]
    dealt = np.argsort(-block_costs(descending, sizes), axis=0, kind="stable")[deal(micro_steps, world_size)]
    starts, sizes = (np.take_along_axis(each, dealt, axis=0).T for each in (starts, sizes))
    return order.ravel()[concatenated_ranges(starts.ravel(), sizes.ravel())], sizes


def concatenated_ranges(starts: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Concatenate the ranges [start, start + size) of all pairs."""
    ends = np.cumsum(sizes, dtype=np.int64)
    indices = np.repeat(starts - (ends - sizes), sizes)
    indices += np.arange(len(indices))
    return indices


def sort_partitions(
    lengths: NDArray[Any], partition_sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Sort each partition by length, descending; equal lengths keep their order.

    Returns:
        (partitions, width) indices into `lengths`, and (width, partitions) sorted lengths, 0 after a partition's end.
    """
    width = int(partition_sizes.max())
    most = 2 * int(lengths.max()) * width  # the largest sum of two limits; 32 bits are faster where it fits in them
    padded = np.zeros((len(partition_sizes), width), dtype=np.int32 if most <= np.iinfo(np.int32).max else np.int64)
    padded[np.arange(width) < partition_sizes[:, None]] = lengths
    order = np.argsort(-padded, axis=1, kind="stable")
    descending = np.ascontiguousarray(np.take_along_axis(padded, order, axis=1).T)
    return order + (np.cumsum(partition_sizes) - partition_sizes)[:, None], descending


def cut_into_equal_costs(descending: NDArray[Any], partition_sizes: NDArray[np.int64], blocks: int) -> NDArray[Any]:
    """Return (blocks, partitions) sizes of contiguous blocks for which the costliest block is as cheap as possible."""
    counts = partition_sizes.astype(descending.dtype)
    too_low = np.maximum(descending[0], descending.sum(axis=0, dtype=descending.dtype) // blocks) - 1
    enough = descending[0] * -(-counts // blocks)  # for equal sizes
    while np.any(enough - too_low > 1):
        limit = (too_low + enough) // 2
        fits = fill(descending, counts, blocks, limit).sum(axis=0) == counts
        too_low, enough = np.where(fits, too_low, limit), np.where(fits, limit, enough)
    return fill(descending, counts, blocks, enough)


def fill(descending: NDArray[Any], counts: NDArray[Any], blocks: int, limit: NDArray[Any]) -> NDArray[Any]:
    """Return (blocks, partitions) sizes of blocks filled up to a cost of `limit`, longest samples first.

    Each later block keeps at least one sample.
    """
    sizes = np.empty((blocks, len(counts)), dtype=descending.dtype)
    start = np.zeros_like(counts)
    for block in range(blocks):
        sizes[block] = np.minimum(limit // _at(descending, start), counts - start - (blocks - 1 - block))
        start += sizes[block]
    return sizes


def move_samples(descending: NDArray[Any], sizes: NDArray[Any], micro_steps: int, world_size: int) -> None:
    """Move single samples between blocks, in place, where that makes the step cheaper."""
    costs = block_costs(descending, sizes)
    most = costs.max(axis=0) + costs.max(axis=0) // 20
    least = step_costs(costs, micro_steps, world_size)
    blocks = len(sizes)
    distances = itertools.chain(range(1, blocks), range(1, blocks))
    pairs = ((giver, (giver + distance) % blocks) for distance in distances for giver in range(blocks))
    # With one micro-step the cut into equal costs is optimal.
    for giver, taker in itertools.islice(pairs, _MOVES_TRIED if micro_steps > 1 else 0):
        sizes[giver] -= 1
        sizes[taker] += 1
        costs = block_costs(descending, sizes)
        moved = step_costs(costs, micro_steps, world_size)
        rejected = (sizes[giver] == 0) | (costs.max(axis=0) > most) | (moved >= least)
        sizes[giver] += rejected
        sizes[taker] -= rejected
        least = np.where(rejected, least, moved)


def step_costs(costs: NDArray[Any], micro_steps: int, world_size: int) -> NDArray[Any]:
    """Return the (partitions,) weighted costs of steps whose blocks have (blocks, partitions) costs."""
    by_cost = np.sort(costs, axis=0)[::-1]
    of_ranks = by_cost[deal(micro_steps, world_size)].reshape(micro_steps, world_size, -1).sum(axis=0)
    return _SLOWEST_RANK_WEIGHT * of_ranks.max(axis=0) + by_cost[::world_size].sum(axis=0)


def deal(micro_steps: int, world_size: int) -> NDArray[np.int64]:
    """Return the index of each micro-batch's block by cost; ranks take turns in alternating directions."""
    dealt = np.arange(micro_steps * world_size).reshape(micro_steps, world_size)
    dealt[1::2] = dealt[1::2, ::-1].copy()
    return dealt.ravel()


def block_costs(descending: NDArray[Any], sizes: NDArray[Any]) -> NDArray[Any]:
    """Return the (blocks, partitions) cost of each block: its longest sample times its size."""
    return sizes * _at(descending, np.cumsum(sizes, axis=0, dtype=sizes.dtype) - sizes)


def _at(descending: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Return the lengths in (..., partitions) rows; faster than `take_along_axis`."""
    partitions = descending.shape[1]
    # "clip": an empty last block may start after the end.
    return descending.ravel().take(rows * np.int64(partitions) + np.arange(partitions), mode="clip")
