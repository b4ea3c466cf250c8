"""The epoch plan: which samples make up which micro-batch, for every rank and step of an epoch. Numpy only.

Steps: (1) sort the rows by group and shuffle them inside each group; (2) decide how many samples each group gives to
the epoch, and cut that count into *units*, the largest runs of micro-batches that hold one group: an optimizer step
(purity `step`) or one micro-batch (`micro`); (3) shuffle the units of all groups;
(4) as micro-batches are read, cut each unit into them, by token length where lengths are given (balance.py). Everything
follows from the arguments, so ranks that call `plan_epoch` with the same arguments need no communication to agree.
`EpochPlan.left` and `plan_rest` go on with an epoch under other arguments than it was begun with.

Source: CommonIT (arXiv 2410.03077), section 3: batches of one group each, in random order. The even cut of a group's
remainder, accumulation-wide purity and the arrangement by length are this project's.

Cost, N samples: about that of one random permutation of N, and 4 bytes a sample (8 from 2^31 samples on) besides the
arguments; reading a stretch of micro-batches takes time and memory for that stretch only. benchmarks/plan_speed.py
measures both.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from commonit_trl.config import PURITIES, REMAINDERS, check_choice, check_weights
from commonit_trl.plan.balance import balance, concatenated_ranges

_SAMPLES_AT_ONCE = 1 << 16
"""Sorted, arranged or read together: few enough for the processor's cache, enough to make numpy's overhead small."""


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

    Micro-step `m` belongs to optimizer step `m // accumulation_steps`, and every rank has exactly one micro-batch in
    each micro-step. The plan holds what decides the micro-batches, and works them out as they are read: `batches` a
    stretch at a time, from anywhere in the epoch; `indices` and `offsets` all at once.
    """

    group_ids: NDArray[np.integer[Any]]
    """(samples,) group id of each row of the dataset."""
    lengths: NDArray[Any] | None
    """(samples,) tokens of each row, where units are arranged by them."""
    group_sizes: NDArray[np.int64]
    """(groups,) rows of each group."""
    group_draws: NDArray[np.int64]
    """(groups,) draws that each group owes the epoch: its rows, or its share by weight. A unit's draws beyond them only
    fill it."""
    shuffled_rows: NDArray[np.integer[Any]]
    """(samples,) row numbers, group after group, in random order inside each group."""
    unit_groups: NDArray[np.int64]
    """(units,) group of each unit, in training order."""
    unit_starts: NDArray[np.int64]
    """(units,) the first of the group's draws in each unit; draw `d` is its shuffled row `d` modulo its size."""
    unit_sizes: NDArray[np.int64]
    """(units,) draws, that is samples, in each unit."""
    micro_batches_per_unit: int
    micro_batch_size: int
    world_size: int
    accumulation_steps: int
    equal_sizes: bool = False
    """Whether all micro-batches of a step have the same number of samples."""

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches that each rank gets: the length of its dataloader."""
        return len(self.unit_sizes) * self.micro_batches_per_unit // self.world_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps; with purity `micro` the last one may hold fewer micro-steps."""
        return -(-self.num_micro_steps // self.accumulation_steps)

    @cached_property
    def micro_batch_groups(self) -> NDArray[np.int64]:
        """(micro-steps, world size) group id of each micro-batch."""
        return np.repeat(self.unit_groups, self.micro_batches_per_unit).reshape(-1, self.world_size)

    @property
    def step_groups(self) -> NDArray[np.int64]:
        """(steps,) the group of each optimizer step, -1 for a step of several groups."""
        groups = self.micro_batch_groups
        starts = np.arange(0, self.num_micro_steps, self.accumulation_steps)
        lowest = np.minimum.reduceat(groups.min(axis=1), starts)
        highest = np.maximum.reduceat(groups.max(axis=1), starts)
        return np.where(lowest == highest, lowest, -1)

    def group_of(self, step: int) -> int:
        """Return the group of optimizer step `step`, counted from the run's start; -1 for a step of several groups."""
        first = step % self.num_steps * self.accumulation_steps
        groups = np.unique(self.micro_batch_groups[first : first + self.accumulation_steps])
        return int(groups[0]) if len(groups) == 1 else -1

    @property
    def indices(self) -> NDArray[np.int64]:
        """(samples seen,) row numbers of the dataset, in the order micro-step, rank, place in the micro-batch."""
        return self._all[0]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(micro-steps * world size + 1,) where each micro-batch starts in `indices`: that of micro-step `m` on rank
        `r` is `indices[offsets[m * W + r] : offsets[m * W + r + 1]]`."""
        return self._all[1]

    @cached_property
    def _all(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows, sizes = zip(*(self._read(first, end) for first, end in self._stretches()), strict=True)
        return np.concatenate(rows, dtype=np.int64), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])

    def micro_batch(self, micro_step: int, rank: int) -> NDArray[np.integer[Any]]:
        """(samples,) row numbers of one micro-batch."""
        first = micro_step - micro_step % self._micro_steps_per_unit
        rows, sizes = self._read(first, first + self._micro_steps_per_unit, rank)
        return np.split(rows, np.cumsum(sizes))[micro_step - first]

    def batches(self, rank: int, start: int = 0) -> Iterator[list[int]]:
        """The micro-batches of `rank` in training order, from micro-step `start` on, as lists of row numbers."""
        for first, end in self._stretches(start):
            rows, sizes = self._read(first, end, rank)
            ends = np.cumsum(sizes).tolist()
            batches = map(rows.tolist().__getitem__, map(slice, [0, *ends], ends))
            yield from itertools.islice(batches, max(0, start - first), None)

    def _stretches(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """First micro-step and end of stretches of whole units, from the unit that holds micro-step `start` on."""
        per_unit = self._micro_steps_per_unit
        units_at_once = max(1, _SAMPLES_AT_ONCE // (self.micro_batch_size * self.world_size * per_unit))
        length = units_at_once * per_unit
        for first in range(start - start % per_unit, self.num_micro_steps, length):
            yield first, min(first + length, self.num_micro_steps)

    @property
    def _micro_steps_per_unit(self) -> int:
        return max(1, self.micro_batches_per_unit // self.world_size)

    def _read(
        self, first: int, end: int, rank: int | None = None
    ) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """The micro-batches from micro-step `first` to `end`, both the edge of a unit, of one rank or of all.

        Returns:
            Row numbers, one micro-batch after another, and (micro-steps, ranks) how many each micro-batch has.
        """
        ranks = slice(None) if rank is None else slice(rank, rank + 1)
        if self.lengths is None:  # the samples of a unit are in random order: cut it into equal sizes
            micro_batches = np.arange(first, end)[:, None] * self.world_size + np.arange(self.world_size)[ranks]
            units, blocks = np.divmod(micro_batches, self.micro_batches_per_unit)
            base, extra = np.divmod(self.unit_sizes[units], self.micro_batches_per_unit)
            sizes = base + (blocks < extra)
            starts = self.unit_starts[units] + blocks * base + np.minimum(blocks, extra)
            return self._rows(self.unit_groups[units].ravel(), starts.ravel(), sizes.ravel()), sizes
        here = slice(first // self._micro_steps_per_unit, end // self._micro_steps_per_unit)
        rows = self._rows(self.unit_groups[here], self.unit_starts[here], self.unit_sizes[here])
        filled = self.unit_sizes[here] > 0
        sizes = np.zeros((len(filled), self.micro_batches_per_unit), dtype=np.int64)
        order = rows[:0]
        if filled.any():
            order, sizes[filled] = balance(
                self.lengths[rows], self.unit_sizes[here][filled], self._micro_steps_per_unit, self.world_size
            )
        sizes = sizes.reshape(-1, self.world_size)
        starts = np.cumsum(sizes).reshape(sizes.shape) - sizes
        starts, sizes = starts[:, ranks], sizes[:, ranks]
        return rows[order[concatenated_ranges(starts.ravel(), sizes.ravel())]], sizes

    def _rows(
        self, groups: NDArray[np.int64], starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.integer[Any]]:
        """Row numbers of runs of draws, one run after another: the group, first draw and number of draws of each."""
        group_sizes = self.group_sizes[groups]
        draws = concatenated_ranges(starts, sizes)
        if np.any(starts + sizes > group_sizes):  # only then is a sample repeated
            draws %= np.repeat(group_sizes, sizes)
        group_starts = np.cumsum(self.group_sizes) - self.group_sizes
        draws += np.repeat(group_starts[groups], sizes)
        return self.shuffled_rows[draws]

    def left(self, steps: int) -> NDArray[np.integer[Any]]:
        """(draws left,) ascending row numbers that the epoch owes after its first `steps` steps.

        With weights a row is there once for each time that it is still to be drawn; repeats that only fill a unit are
        left out.
        """
        first = steps * self.accumulation_steps * self.world_size // self.micro_batches_per_unit
        draws = np.flatnonzero(self._owed(slice(first, None)) & ~self._owed(slice(first)))
        groups = np.repeat(np.arange(len(self.group_draws)), self.group_draws)[draws]
        places = draws - (np.cumsum(self.group_draws) - self.group_draws)[groups]
        starts = np.cumsum(self.group_sizes) - self.group_sizes
        return np.sort(self.shuffled_rows[starts[groups] + places % self.group_sizes[groups]])

    def _owed(self, units: slice) -> NDArray[np.bool_]:
        """(draws,) which of the draws owed, group after group, `units` hold."""
        groups, starts, total = self.unit_groups[units], self.unit_starts[units], int(self.group_draws.sum())
        first_draws = np.cumsum(self.group_draws) - self.group_draws
        edges = np.zeros(total + 1, dtype=np.int64)
        for places, sign in ((starts, 1), (starts + self.unit_sizes[units], -1)):
            places = first_draws[groups] + np.minimum(places, self.group_draws[groups])
            edges += sign * np.bincount(places, minlength=total + 1)
        return np.cumsum(edges)[:-1] > 0

    def summary(self) -> PlanSummary:
        """Count what the epoch loses and repeats, per group and in all."""
        drawn, reached = np.zeros_like(self.group_sizes), np.zeros_like(self.group_sizes)
        np.add.at(drawn, self.unit_groups, self.unit_sizes)
        # The units of a group lie end to end, or overlap, from its draw 0 on.
        np.maximum.at(reached, self.unit_groups, self.unit_starts + self.unit_sizes)
        seen = np.minimum(reached, self.group_sizes)
        capacity = self.micro_batch_size * self.world_size * self.accumulation_steps
        return PlanSummary(
            num_groups=int(np.count_nonzero(self.group_sizes)),
            num_steps=self.num_steps,
            vanilla_steps=-(-len(self.group_ids) // capacity),
            num_samples=len(self.group_ids),
            lost=int((self.group_sizes - seen).sum()),
            repeated=int((drawn - seen).sum()),
            group_samples=self.group_sizes,
            group_lost=self.group_sizes - seen,
            group_repeated=drawn - seen,
        )

    def digest(self) -> str:
        """A hash of all that decides the micro-batches: equal digests mean equal plans."""
        geometry = np.array([self.micro_batches_per_unit, self.world_size, self.accumulation_steps])
        arrays = [geometry, self.group_sizes, self.unit_groups, self.unit_starts, self.unit_sizes, self.shuffled_rows]
        content = hashlib.blake2b(digest_size=16)
        for array in arrays if self.lengths is None else [*arrays, self.lengths]:
            content.update(str(len(array)).encode())
            for start in range(0, len(array), _SAMPLES_AT_ONCE):
                content.update(np.ascontiguousarray(array[start : start + _SAMPLES_AT_ONCE], dtype="<i8").data)
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
    equal_sizes: bool = False,
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
        purity: scope within which all samples share a group: an optimizer `step` or a micro-batch (`micro`).
        remainder: `keep` trains every sample once, in ceil(n / capacity) units a group whose sizes differ by at most
            one; only a unit with fewer samples than micro-batches repeats samples of its group. `drop` leaves out
            samples that do not fill a unit. (With purity `micro`, the number of micro-batches is also made a multiple
            of W, in the same way.)
        weights: `proportional` (every sample once), `uniform` or `sqrt` over groups, or a mapping of group id to
            weight; the samples drawn in the epoch stay as many as the dataset has, so a group drawn beyond its size
            repeats samples and one drawn below it leaves some out.
        equal_sizes: give all micro-batches of a step the same number of samples, for losses that ranks gather per
            sample; a group then repeats fewer samples than a step has micro-batches.
        seed: integer >= 0.
        epoch: integer >= 0. Another epoch is another shuffle of equal length.

    Raises:
        ValueError: on an argument out of range, fewer samples than W * A, or an epoch without a step.
    """
    ids = np.asarray(group_ids)
    _check_arguments(ids, micro_batch_size, world_size, accumulation_steps, purity, remainder, weights, seed, epoch)
    token_lengths = None if lengths is None else np.asarray(lengths)
    if token_lengths is not None and token_lengths.shape != ids.shape:
        raise ValueError(f"lengths has shape {token_lengths.shape}, group_ids {ids.shape}: give one for each row.")
    rng = np.random.default_rng([seed, epoch])

    rows, sizes = _rows_by_group(ids)
    _shuffle_groups(rows, sizes, rng)

    micro_batches_per_unit = {"step": accumulation_steps * world_size, "micro": 1}[purity]
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
    if remainder == "keep":
        multiple = micro_batches_per_unit if equal_sizes else 1
        unit_groups, unit_starts, unit_sizes = _cut_evenly(draws, units, micro_batches_per_unit, multiple)
    else:
        unit_groups, number_in_group = _number_units(units)
        unit_starts = number_in_group * capacity
        unit_sizes = np.full(num_units, capacity)

    order = rng.permutation(num_units)
    return EpochPlan(
        group_ids=ids,
        lengths=token_lengths if micro_batches_per_unit > 1 else None,
        group_sizes=sizes,
        group_draws=draws,
        shuffled_rows=rows,
        unit_groups=unit_groups[order],
        unit_starts=unit_starts[order],
        unit_sizes=unit_sizes[order],
        micro_batches_per_unit=micro_batches_per_unit,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        equal_sizes=equal_sizes,
    )


def plan_rest(whole: EpochPlan, rows: ArrayLike, *, seed: int, epoch: int) -> EpochPlan:
    """Plan the rest of an epoch that was begun with another plan.

    Args:
        whole: the epoch as it would be with the new arguments from its start; the rest has its geometry and purity.
        rows: (draws left,) what the begun plan's `EpochPlan.left` gave.
        seed, epoch: as in `plan_epoch`.

    Returns:
        A plan with as many steps as `whole`; the first ones, which count as done, hold no samples. Each of `rows` is
        trained once, whatever policy there is for remainders; only what has too few for a unit is repeated.

    Raises:
        ValueError: when the rest takes more steps than `whole` has.
    """
    left = np.asarray(rows)
    rng = np.random.default_rng([seed, epoch])
    places, draws = _rows_by_group(whole.group_ids[left])
    _shuffle_groups(places, draws, rng)

    units = -(-draws // (whole.micro_batch_size * whole.micro_batches_per_unit))
    # All steps but the last hold as many units: the rest must end where the whole epoch does.
    units_per_step = whole.accumulation_steps * whole.world_size // whole.micro_batches_per_unit
    _add_units(units, draws, int(len(whole.unit_sizes) - units.sum()) % units_per_step)
    multiple = whole.micro_batches_per_unit if whole.equal_sizes else 1
    unit_groups, unit_starts, unit_sizes = _cut_evenly(draws, units, whole.micro_batches_per_unit, multiple)
    done = len(whole.unit_sizes) - len(unit_sizes)
    if done < 0:
        raise ValueError(
            f"The rest of epoch {epoch} ({len(left)} samples) takes more steps than the {whole.num_steps} of a whole "
            "epoch with the new settings: resume with larger batches, or with commonit_remainder='keep' and "
            "commonit_weights='proportional'."
        )
    order, nothing = rng.permutation(len(unit_sizes)), np.zeros(done, dtype=np.int64)
    return replace(
        whole,
        group_sizes=draws,
        group_draws=draws,
        shuffled_rows=left[places],
        unit_groups=np.concatenate([nothing, unit_groups[order]]),
        unit_starts=np.concatenate([nothing, unit_starts[order]]),
        unit_sizes=np.concatenate([nothing, unit_sizes[order]]),
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
    check_choice("purity", purity, PURITIES)
    check_choice("remainder", remainder, REMAINDERS)
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


def _rows_by_group(ids: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """(samples,) row numbers, group after group, ascending in each; and (groups,) rows of each group."""
    groups = int(ids.max()) + 1
    parts = range(0, len(ids), _SAMPLES_AT_ONCE)
    sizes = np.zeros(groups, dtype=np.int64)
    for start in parts:
        part = ids[start : start + _SAMPLES_AT_ONCE].astype(np.int64, copy=False)
        sizes += np.bincount(part, minlength=groups)
    rows: NDArray[np.integer[Any]] = np.empty(
        len(ids), dtype=np.int32 if len(ids) <= np.iinfo(np.int32).max else np.int64
    )
    free = np.cumsum(sizes) - sizes  # the next free place of each group
    # A stable sort of 16-bit integers is a radix sort, many times faster than others.
    sort_type = np.int16 if groups <= np.iinfo(np.int16).max else np.int64
    for start in parts:
        part = ids[start : start + _SAMPLES_AT_ONCE].astype(sort_type)
        counts = np.bincount(part, minlength=groups)
        rows[concatenated_ranges(free, counts)] = np.argsort(part, kind="stable") + start
        free += counts
    return rows, sizes


def _shuffle_groups(rows: NDArray[np.integer[Any]], sizes: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Shuffle each group's stretch of `rows` in place."""
    for end, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
        group = rows[end - size : end].astype(np.int64)  # numpy shuffles 8 bytes at a time faster than 4
        rng.shuffle(group)
        rows[end - size : end] = group


def _number_units(units: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(units,) the group of each unit, and its number in the group; from (groups,) units of each."""
    return np.repeat(np.arange(len(units)), units), np.arange(units.sum()) - np.repeat(np.cumsum(units) - units, units)


def _cut_evenly(
    draws: NDArray[np.int64], units: NDArray[np.int64], least: int, multiple: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut each group's draws into its units: (units,) group, first draw and size of each. Sizes in a group differ by at
    most one (by `multiple`, of which all are multiples), and none is under `least`."""
    groups, number = _number_units(units)
    base, extra = np.divmod(-(-draws // multiple), np.maximum(units, 1))
    starts = number * base[groups] + np.minimum(number, extra[groups])
    return groups, starts * multiple, np.maximum((base[groups] + (number < extra[groups])) * multiple, least)


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
        _add_units(units, draws, world_size - surplus)


def _add_units(units: NDArray[np.int64], draws: NDArray[np.int64], count: int) -> None:
    """Cut the groups with the fullest units once more, `count` times, in place."""
    for _ in range(count):
        units[np.argmax(draws / np.maximum(units, 1))] += 1
