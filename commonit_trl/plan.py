"""The epoch plan: which samples make up which micro-batch, for every rank and step of an epoch. Numpy only.

Steps: (1) decide how many samples each group gives to the epoch; (2) cut each group's count into *units*, the largest
runs of micro-batches that hold one group: an optimizer step (purity `step`), a micro-step of all ranks (`global`) or
one micro-batch (`micro`); (3) shuffle the samples inside each group and the units across groups; (4) cut each unit into
its micro-batches, by token length where lengths are given. Everything follows from the arguments, so ranks that call
`plan_epoch` with the same arguments need no communication to agree.

Source: CommonIT (arXiv 2410.03077), section 3: batches of one group each, in random order. The even cut of a group's
remainder, accumulation-wide purity and the arrangement by length are this project's.

Cost, N samples: one permutation and one stable argsort of N (a radix sort below 32,768 groups), a few gathers of N;
with lengths, about 25 passes over N more. The plan holds 16 bytes a sample, and 16 a micro-batch.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from commonit_trl.config import check_choice, check_weights

_LIMIT_SEARCH_ROUNDS = 24
_ARRANGED_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The ledger of an epoch: what it trains, what it leaves out and what it repeats. Counts are samples."""

    num_groups: int
    """Groups that have at least one sample."""
    num_steps: int
    """Optimizer steps of the epoch."""
    vanilla_steps: int
    """Steps that plain random batches of the same geometry take."""
    num_samples: int
    """Samples in the dataset."""
    lost: int
    """Samples that the epoch does not train."""
    repeated: int
    """Samples trained again, counted once for each time beyond the first."""
    group_samples: NDArray[np.int64]
    """(groups,) samples of each group in the dataset."""
    group_lost: NDArray[np.int64]
    """(groups,) of those, how many the epoch does not train."""
    group_repeated: NDArray[np.int64]
    """(groups,) repeats in each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """All micro-batches of one epoch.

    The micro-batch of micro-step `m` on rank `r` holds `indices[offsets[m * W + r] : offsets[m * W + r + 1]]`, and
    micro-step `m` belongs to optimizer step `m // accumulation_steps`. Every rank has exactly one micro-batch in each
    micro-step.
    """

    indices: NDArray[np.int64]
    """(samples seen,) row numbers of the dataset, in the order micro-step, rank, place in the micro-batch."""
    offsets: NDArray[np.int64]
    """(micro-steps * world size + 1,) where each micro-batch starts in `indices`."""
    micro_batch_groups: NDArray[np.int64]
    """(micro-steps, world size) group id of each micro-batch."""
    group_ids: NDArray[np.int64]
    """(samples,) group id of each row of the dataset."""
    micro_batch_size: int
    world_size: int
    accumulation_steps: int

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches that each rank gets: the length of its dataloader."""
        return len(self.micro_batch_groups)

    @property
    def num_steps(self) -> int:
        """Optimizer steps; with purity `global` or `micro` the last one may hold fewer micro-steps."""
        return -(-self.num_micro_steps // self.accumulation_steps)

    @property
    def step_groups(self) -> NDArray[np.int64]:
        """(steps,) the group of each optimizer step, -1 for a step of several groups."""
        starts = np.arange(0, self.num_micro_steps, self.accumulation_steps)
        lowest = np.minimum.reduceat(self.micro_batch_groups.min(axis=1), starts)
        highest = np.maximum.reduceat(self.micro_batch_groups.max(axis=1), starts)
        return np.where(lowest == highest, lowest, -1)

    def micro_batch(self, micro_step: int, rank: int) -> NDArray[np.int64]:
        """(samples,) row numbers of one micro-batch."""
        position = micro_step * self.world_size + rank
        return self.indices[self.offsets[position] : self.offsets[position + 1]]

    def batches(self, rank: int) -> Iterator[list[int]]:
        """The micro-batches of `rank` in training order, as lists of row numbers."""
        for micro_step in range(self.num_micro_steps):
            yield self.micro_batch(micro_step, rank).tolist()

    def summary(self) -> PlanSummary:
        """Count what the epoch loses and repeats, per group and in all."""
        seen = np.bincount(self.indices, minlength=len(self.group_ids))
        groups = int(self.group_ids.max()) + 1
        group_samples = np.bincount(self.group_ids, minlength=groups)
        group_lost = np.bincount(self.group_ids[seen == 0], minlength=groups)
        repeats = np.maximum(seen - 1, 0)
        group_repeated = np.bincount(self.group_ids, weights=repeats, minlength=groups).astype(np.int64)
        capacity = self.micro_batch_size * self.world_size * self.accumulation_steps
        return PlanSummary(
            num_groups=int(np.count_nonzero(group_samples)),
            num_steps=self.num_steps,
            vanilla_steps=-(-len(self.group_ids) // capacity),
            num_samples=len(self.group_ids),
            lost=int(group_lost.sum()),
            repeated=int(repeats.sum()),
            group_samples=group_samples,
            group_lost=group_lost,
            group_repeated=group_repeated,
        )

    def digest(self) -> str:
        """A hash of every micro-batch of the epoch: equal digests mean equal plans."""
        content = hashlib.blake2b(digest_size=16)
        for array in (self.indices, self.offsets, self.micro_batch_groups):
            content.update(np.ascontiguousarray(array, dtype="<i8").data)
        return content.hexdigest()


def plan_epoch(
    group_ids: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    micro_batch_size: int,
    world_size: int = 1,
    accumulation_steps: int = 1,
    purity: str = "step",
    remainder: str = "keep",
    weights: Mapping[int, float] | str = "proportional",
    seed: int = 0,
    epoch: int = 0,
) -> EpochPlan:
    """Plan one epoch of group-pure batches.

    Args:
        group_ids: (samples,) integers >= 0, the group of each row of the dataset.
        lengths: (samples,) tokens of each row. When given, the samples of each unit are arranged so that similar
            lengths share a micro-batch and ranks cost the same; the units themselves do not depend on them.
        micro_batch_size: samples a rank's micro-batch holds on average (B).
        world_size: data-parallel ranks (W).
        accumulation_steps: micro-batches a rank accumulates in one optimizer step (A).
        purity: what holds one group: a whole `step`, a micro-step of all ranks (`global`), a micro-batch (`micro`).
        remainder: `keep` trains every sample once, in ceil(n / capacity) units a group whose sizes differ by at most
            one; only a unit with fewer samples than micro-batches repeats samples of its group. `drop` leaves out what
            does not fill a unit, `pad` fills it with repeats. (With purity `micro`, the number of micro-batches is also
            made a multiple of W, in the same way.)
        weights: `proportional` (every sample once), `uniform` or `sqrt` over groups, or a mapping of group id to
            weight; the samples drawn in the epoch stay as many as the dataset has, so a group drawn beyond its size
            repeats samples and one drawn below it leaves some out.
        seed, epoch: integers >= 0. The same pair gives the same plan, another epoch another shuffle of equal length.

    Raises:
        ValueError: on an argument out of range, fewer samples than W * A, or an epoch without a step.
    """
    ids = np.asarray(group_ids)
    _check_arguments(ids, micro_batch_size, world_size, accumulation_steps, purity, remainder, weights, seed, epoch)
    ids = ids.astype(np.int64, copy=False)
    rng = np.random.default_rng([seed, epoch])

    # Where each group's shuffled samples lie in `pool`.
    sizes = np.bincount(ids)
    shuffled = rng.permutation(len(ids))
    sort_type = np.int16 if len(sizes) <= np.iinfo(np.int16).max else np.int64
    pool = shuffled[np.argsort(ids[shuffled].astype(sort_type), kind="stable")]
    group_starts = np.cumsum(sizes) - sizes

    micro_steps_per_unit = accumulation_steps if purity == "step" else 1
    micro_batches_per_unit = 1 if purity == "micro" else micro_steps_per_unit * world_size
    capacity = micro_batch_size * micro_batches_per_unit
    draws = _draws_per_group(sizes, weights)
    units = draws // capacity if remainder == "drop" else -(-draws // capacity)
    if purity == "micro":
        _round_to_world_size(units, draws, world_size, remainder)
    num_units = int(units.sum())
    if num_units == 0:
        raise ValueError(
            f"commonit_remainder: remainder='drop' leaves no step: the largest group has {sizes.max()} samples and a "
            f"unit of purity {purity!r} takes {capacity}. Use remainder='keep', smaller batches or fewer groups."
        )

    # A unit is a run of its group's draws: where it starts among them and how many it takes.
    unit_groups = np.repeat(np.arange(len(sizes)), units)
    number_in_group = np.arange(num_units) - np.repeat(np.cumsum(units) - units, units)
    if remainder == "keep":
        base, extra = np.divmod(draws, np.maximum(units, 1))
        unit_starts = number_in_group * base[unit_groups] + np.minimum(number_in_group, extra[unit_groups])
        unit_sizes = np.maximum(base[unit_groups] + (number_in_group < extra[unit_groups]), micro_batches_per_unit)
    else:
        unit_starts = number_in_group * capacity
        unit_sizes = np.full(num_units, capacity)

    order = rng.permutation(num_units)
    unit_groups, unit_starts, unit_sizes = unit_groups[order], unit_starts[order], unit_sizes[order]
    first = np.cumsum(unit_sizes) - unit_sizes
    # A run that goes past its group's last sample goes on at the first: only then is a sample repeated.
    draw = np.arange(unit_sizes.sum()) + np.repeat(unit_starts - first, unit_sizes)
    draw %= np.repeat(sizes[unit_groups], unit_sizes)
    draw += np.repeat(group_starts[unit_groups], unit_sizes)
    indices = pool[draw]

    if lengths is None or micro_batches_per_unit == 1:
        base, extra = np.divmod(unit_sizes, micro_batches_per_unit)
        block_sizes = base[:, None] + (np.arange(micro_batches_per_unit) < extra[:, None])
    else:
        token_lengths = np.asarray(lengths)
        if token_lengths.shape != ids.shape:
            raise ValueError(f"lengths has shape {token_lengths.shape}, group_ids {ids.shape}: give one for each row.")
        indices, block_sizes = _arrange_units(
            indices, token_lengths[indices], unit_sizes, micro_steps_per_unit, world_size
        )

    offsets = np.concatenate([[0], np.cumsum(block_sizes.ravel())])
    micro_batch_groups = np.repeat(unit_groups, micro_batches_per_unit).reshape(-1, world_size)
    return EpochPlan(
        indices=indices,
        offsets=offsets,
        micro_batch_groups=micro_batch_groups,
        group_ids=ids,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
    )


def _check_arguments(
    ids: NDArray[Any],
    micro_batch_size: int,
    world_size: int,
    accumulation_steps: int,
    purity: str,
    remainder: str,
    weights: Mapping[int, float] | str,
    seed: int,
    epoch: int,
) -> None:
    check_choice("purity", purity, ("step", "global", "micro"))
    check_choice("remainder", remainder, ("keep", "drop", "pad"))
    check_weights(weights)
    least = {"micro_batch_size": 1, "world_size": 1, "accumulation_steps": 1, "seed": 0, "epoch": 0}
    values = (micro_batch_size, world_size, accumulation_steps, seed, epoch)
    for (name, low), value in zip(least.items(), values, strict=True):
        if not isinstance(value, int | np.integer) or value < low:
            raise ValueError(f"{name}={value!r} must be a whole number >= {low}.")
    if ids.ndim != 1 or (ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0)):
        raise ValueError(f"group_ids must be one-dimensional integers >= 0, not {ids.dtype} of shape {ids.shape}.")
    if len(ids) < world_size * accumulation_steps:
        raise ValueError(
            f"The dataset has {len(ids)} samples, fewer than the {world_size * accumulation_steps} micro-batches of "
            f"one step (world_size={world_size} x accumulation_steps={accumulation_steps}): use fewer ranks, less "
            "gradient accumulation or more data."
        )


def _draws_per_group(sizes: NDArray[np.int64], weights: Mapping[int, float] | str) -> NDArray[np.int64]:
    """(groups,) samples that each group gives to the epoch, in all as many as the dataset has."""
    if weights == "proportional":
        return sizes.copy()
    if weights == "uniform":
        shares = (sizes > 0).astype(np.float64)
    elif weights == "sqrt":
        shares = np.sqrt(sizes)
    else:
        assert not isinstance(weights, str)
        unknown = [group for group in weights if not 0 <= group < len(sizes) or not sizes[group]]
        missing = [int(group) for group in np.flatnonzero(sizes) if group not in weights]
        if unknown or missing:
            raise ValueError(
                f"weights must name every group that has samples: missing {missing}, without samples {unknown}."
            )
        shares = np.array([weights.get(group, 0.0) for group in range(len(sizes))], dtype=np.float64)
    exact = shares / shares.sum() * sizes.sum()
    draws = np.floor(exact).astype(np.int64)
    # Largest remainders get the samples that rounding down left over.
    left_over = int(sizes.sum() - draws.sum())
    draws[np.argsort(draws - exact, kind="stable")[:left_over]] += 1
    return draws


def _round_to_world_size(units: NDArray[np.int64], draws: NDArray[np.int64], world_size: int, remainder: str) -> None:
    """Make the number of units a multiple of W, in place: cut the groups with the fullest units once more (or, for
    `drop`, take units from the groups that have most)."""
    surplus = int(units.sum()) % world_size
    if remainder == "drop":
        for _ in range(surplus):
            units[np.argmax(units)] -= 1
    elif surplus:
        for _ in range(world_size - surplus):
            units[np.argmax(draws / np.maximum(units, 1))] += 1


def _arrange_units(
    indices: NDArray[np.int64],
    lengths: NDArray[Any],
    unit_sizes: NDArray[np.int64],
    micro_steps: int,
    world_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Arrange the samples of each unit into `micro_steps` x `world_size` micro-batches of equal padded cost.

    Each unit is sorted by length and cut into contiguous blocks whose padded cost (longest x count) stays under the
    lowest limit that needs no more blocks than there are micro-batches, found by bisection. In each micro-step the W
    costliest blocks left go to the ranks, the costliest to the rank with the least so far.

    Args:
        indices, lengths: (samples,) rows of the units, unit after unit, and the tokens of each.
        unit_sizes: (units,) samples of each unit, at least `micro_steps * world_size`.

    Returns:
        indices in their new order, and (units, micro_steps * world_size) samples of each micro-batch.
    """
    blocks = micro_steps * world_size
    arranged = np.empty_like(indices)
    block_sizes = np.empty((len(unit_sizes), blocks), dtype=np.int64)
    width = int(unit_sizes.max())
    unit_starts = np.cumsum(unit_sizes) - unit_sizes
    units_at_once = max(1, _ARRANGED_AT_ONCE // width)
    for low in range(0, len(unit_sizes), units_at_once):
        units = slice(low, low + units_at_once)
        sizes = unit_sizes[units]
        samples = slice(unit_starts[low], unit_starts[low] + sizes.sum())
        filled = np.arange(width) < sizes[:, None]  # (units, width) ragged rows, filled from the left
        lengths_by_unit = np.zeros(filled.shape, dtype=np.int64)
        indices_by_unit = np.zeros(filled.shape, dtype=np.int64)
        lengths_by_unit[filled] = np.maximum(lengths[samples], 1)
        indices_by_unit[filled] = indices[samples]

        by_length = np.argsort(-lengths_by_unit, axis=1, kind="stable")
        lengths_by_unit = np.take_along_axis(lengths_by_unit, by_length, axis=1)
        block_of_sample, block_costs = _cut_into_blocks(lengths_by_unit, sizes, blocks)
        place_of_block = _deal_to_ranks(block_costs, micro_steps, world_size)

        place_of_sample = np.take_along_axis(place_of_block, block_of_sample, axis=1)
        place_of_sample[~filled] = blocks  # behind all micro-batches
        by_place = np.argsort(place_of_sample, axis=1, kind="stable")
        by_length_and_place = np.take_along_axis(by_length, by_place, axis=1)
        arranged[samples] = np.take_along_axis(indices_by_unit, by_length_and_place, axis=1)[filled]
        flat_places = (place_of_sample + np.arange(len(sizes))[:, None] * (blocks + 1))[filled]
        counts = np.bincount(flat_places, minlength=len(sizes) * (blocks + 1)).reshape(-1, blocks + 1)
        block_sizes[units] = counts[:, :blocks]
    return arranged, block_sizes


def _cut_into_blocks(
    lengths: NDArray[np.int64], sizes: NDArray[np.int64], blocks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut each row of `lengths` (units, width; descending, 0 behind the row's samples) into contiguous blocks.

    Returns:
        (units, width) block of each sample, and (units, blocks) padded cost of each block.
    """
    low = np.maximum(lengths[:, 0], lengths.sum(axis=1) // blocks) - 1  # one below the least possible limit
    high = lengths[:, 0] * -(-sizes // blocks)  # equal counts always fit
    for _ in range(_LIMIT_SEARCH_ROUNDS):
        if np.all(high - low <= 1):
            break
        limit = low + np.maximum((high - low) // 2, 1)  # never below the longest sample
        fits = _fill_blocks(lengths, sizes, blocks, limit)[1] <= blocks
        low, high = np.where(fits, low, limit), np.where(fits, limit, high)
    block_of_sample, _ = _fill_blocks(lengths, sizes, blocks, high, use_all=True)
    costs = np.zeros((len(lengths), blocks), dtype=np.int64)
    rows = np.broadcast_to(np.arange(len(lengths))[:, None], lengths.shape)
    filled = lengths > 0
    np.add.at(costs, (rows[filled], block_of_sample[filled]), 1)
    longest = np.zeros_like(costs)
    np.maximum.at(longest, (rows[filled], block_of_sample[filled]), lengths[filled])
    return block_of_sample, costs * longest


def _fill_blocks(
    lengths: NDArray[np.int64],
    sizes: NDArray[np.int64],
    blocks: int,
    limit: NDArray[np.int64],
    use_all: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fill blocks up to `limit` (units,) from the longest sample down; `use_all` opens new blocks early where a unit
    would otherwise end with fewer than `blocks`.

    Returns:
        (units, width) block of each sample (empty without `use_all`), and (units,) number of blocks.
    """
    block = np.zeros(len(lengths), dtype=np.int64)
    longest = lengths[:, 0].copy()
    count = np.zeros(len(lengths), dtype=np.int64)
    block_of_sample = np.empty(lengths.shape, dtype=np.int64) if use_all else np.empty((0, 0), dtype=np.int64)
    for place in range(lengths.shape[1]):
        length = lengths[:, place]
        present = length > 0
        opens = present & (longest * (count + 1) > limit)
        if use_all and place:
            opens |= present & (sizes - place <= blocks - 1 - block)
        block += opens
        longest = np.where(opens, length, longest)
        count = np.where(opens, 1, count + present)
        if use_all:
            block_of_sample[:, place] = block
    return block_of_sample, block + 1


def _deal_to_ranks(costs: NDArray[np.int64], micro_steps: int, world_size: int) -> NDArray[np.int64]:
    """(units, blocks) place `micro_step * W + rank` of each block, from (units, blocks) costs."""
    by_cost = np.argsort(-costs, axis=1, kind="stable")
    places = np.empty_like(by_cost)
    load = np.zeros((len(costs), world_size), dtype=np.int64)
    for micro_step in range(micro_steps):
        dealt = by_cost[:, micro_step * world_size : (micro_step + 1) * world_size]
        ranks = np.argsort(load, axis=1, kind="stable")
        np.put_along_axis(places, dealt, micro_step * world_size + ranks, axis=1)
        dealt_costs = np.take_along_axis(costs, dealt, axis=1)
        np.put_along_axis(load, ranks, np.take_along_axis(load, ranks, axis=1) + dealt_costs, axis=1)
    return places
