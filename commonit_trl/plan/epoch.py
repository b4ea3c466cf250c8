"""Plan an epoch: the samples of every micro-batch, for every rank and step. NumPy only.

Steps: (1) sort the rows by group and shuffle them within each group; (2) compute the quota of each group, the samples
that it contributes to the epoch, and cut it into partitions, the runs of micro-batches that hold one group: the
micro-batches of an optimizer step (purity `step`) or a single one (`micro`); (3) shuffle the partitions of all groups;
(4) cut a partition into micro-batches when it is read, balanced by token length where lengths are given (balance.py).
`plan_epoch` is a pure function of its arguments, so ranks agree on a plan without communication. `EpochPlan.remaining`
and `plan_remaining` continue an epoch with other arguments.

Source: CommonIT (arXiv 2410.03077), section 3: batches of one group each, in random order. This project adds the even
cut of a quota, purity over accumulated micro-batches, and the balance by length.

Cost for N samples: about the time of one random permutation of N, and 4 bytes per sample (8 from 2^31 samples on)
besides the arguments; reading micro-batches takes memory for 2^16 samples. benchmarks/plan_speed.py measures both.
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

_CHUNK = 1 << 16
"""Samples to sort, balance or read at once: they fit into the processor's cache, and amortise NumPy's overhead."""


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """Hold the counts of samples that an epoch leaves out and repeats."""

    num_groups: int
    """Groups that have at least one sample."""
    num_steps: int
    """Optimizer steps of the epoch."""
    baseline_steps: int
    """Steps of random batches with the same geometry."""
    num_samples: int
    """Samples in the dataset."""
    left_out: int
    """Samples that remainder or weights leave out of the epoch."""
    repeated: int
    """Repeats of samples: a sample that is trained three times counts twice."""
    group_samples: NDArray[np.int64]
    """(groups,) samples of each group in the dataset."""
    group_left_out: NDArray[np.int64]
    """(groups,) samples of each group that remainder or weights leave out."""
    group_repeated: NDArray[np.int64]
    """(groups,) repeats in each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """Hold all micro-batches of one epoch.

    Micro-step `m` belongs to optimizer step `m // accumulation_steps`, and every rank has exactly one micro-batch in
    each micro-step. Micro-batches are computed when they are read: `batches` yields those of a rank, from any
    micro-step on; `indices` and `offsets` hold all of them.
    """

    group_ids: NDArray[np.integer[Any]]
    """(samples,) group id of each row of the dataset."""
    lengths: NDArray[Any] | None
    """(samples,) tokens of each row, by which steps are balanced; None: micro-batches of equal size."""
    group_sizes: NDArray[np.int64]
    """(groups,) rows of each group."""
    group_quotas: NDArray[np.int64]
    """(groups,) samples that each group contributes to the epoch; partitions may repeat rows beyond it."""
    shuffled_rows: NDArray[np.integer[Any]]
    """(samples,) row numbers, sorted by group, in random order within each group."""
    partition_groups: NDArray[np.int64]
    """(partitions,) group of each partition, in training order."""
    partition_starts: NDArray[np.int64]
    """(partitions,) index of the first sample within the group: sample `i` is its shuffled row `i` modulo its size."""
    partition_sizes: NDArray[np.int64]
    """(partitions,) samples of each partition."""
    micro_batches_per_partition: int
    micro_batch_size: int
    world_size: int
    accumulation_steps: int
    equal_sizes: bool = False
    """Whether all micro-batches of a partition have the same number of samples."""

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches per rank: the length of its dataloader."""
        return len(self.partition_sizes) * self.micro_batches_per_partition // self.world_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps; with purity `micro` the last one may have fewer micro-steps."""
        return -(-self.num_micro_steps // self.accumulation_steps)

    @property
    def first_step(self) -> int:
        """First optimizer step that holds samples; above 0 only in plans of `plan_remaining`."""
        first = int(np.argmax(self.partition_sizes > 0)) * self.micro_batches_per_partition
        return first // (self.world_size * self.accumulation_steps)

    @cached_property
    def micro_batch_groups(self) -> NDArray[np.int64]:
        """(micro-steps, ranks) group id of each micro-batch."""
        return np.repeat(self.partition_groups, self.micro_batches_per_partition).reshape(-1, self.world_size)

    @cached_property
    def step_groups(self) -> NDArray[np.int64]:
        """(steps,) group id of each optimizer step, -1 for a step of several groups."""
        groups = self.micro_batch_groups
        starts = np.arange(0, self.num_micro_steps, self.accumulation_steps)
        lowest = np.minimum.reduceat(groups.min(axis=1), starts)
        highest = np.maximum.reduceat(groups.max(axis=1), starts)
        return np.where(lowest == highest, lowest, -1)

    def group_of(self, step: int) -> int:
        """Return the group id of optimizer step `step` of a run, -1 for a step of several groups."""
        return int(self.step_groups[step % self.num_steps])

    @property
    def indices(self) -> NDArray[np.int64]:
        """(samples seen,) row numbers, in the order micro-step, rank, position in the micro-batch."""
        return self._all[0]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(micro-steps * ranks + 1,) edges of the micro-batches in `indices`.

        Rank `r` of W has `indices[offsets[m * W + r] : offsets[m * W + r + 1]]` in micro-step `m`.
        """
        return self._all[1]

    @cached_property
    def _all(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows, sizes = zip(*(self._read(first, end) for first, end in self._chunks()), strict=True)
        return np.concatenate(rows, dtype=np.int64), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])

    def batches(self, rank: int, start: int = 0) -> Iterator[list[int]]:
        """Yield the micro-batches of a rank in training order, as lists of row numbers.

        Args:
            rank: data-parallel rank.
            start: the first micro-step.
        """
        for first, end in self._chunks(start):
            rows, sizes = self._read(first, end, rank)
            ends = np.cumsum(sizes).tolist()
            batches = map(rows.tolist().__getitem__, map(slice, [0, *ends], ends))
            yield from itertools.islice(batches, max(0, start - first), None)

    def _chunks(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield first micro-step and end of runs of whole partitions, from that of micro-step `start` on."""
        size = self._micro_steps_per_partition
        length = max(1, _CHUNK // (self.micro_batch_size * self.world_size * size)) * size
        for first in range(start - start % size, self.num_micro_steps, length):
            yield first, min(first + length, self.num_micro_steps)

    @property
    def _micro_steps_per_partition(self) -> int:
        return max(1, self.micro_batches_per_partition // self.world_size)

    def _read(
        self, first: int, end: int, rank: int | None = None
    ) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """Compute the micro-batches of one rank or all, from micro-step `first` to `end`, both edges of partitions.

        Returns:
            (samples,) row numbers, one micro-batch after another, and (micro-steps, ranks) sizes of the micro-batches.
        """
        ranks = slice(None) if rank is None else slice(rank, rank + 1)
        if self.lengths is None:  # the samples of a partition are in random order: cut it into equal sizes
            micro_batches = np.arange(first, end)[:, None] * self.world_size + np.arange(self.world_size)[ranks]
            partitions, blocks = np.divmod(micro_batches, self.micro_batches_per_partition)
            base, extra = np.divmod(self.partition_sizes[partitions], self.micro_batches_per_partition)
            sizes = base + (blocks < extra)
            starts = self.partition_starts[partitions] + blocks * base + np.minimum(blocks, extra)
            return self._rows(self.partition_groups[partitions].ravel(), starts.ravel(), sizes.ravel()), sizes
        here = slice(first // self._micro_steps_per_partition, end // self._micro_steps_per_partition)
        partition_sizes = self.partition_sizes[here]
        rows = self._rows(self.partition_groups[here], self.partition_starts[here], partition_sizes)
        sizes = np.zeros((len(partition_sizes), self.micro_batches_per_partition), dtype=np.int64)
        filled = partition_sizes > 0
        if filled.any():
            order, sizes[filled] = balance(
                self.lengths[rows], partition_sizes[filled], self._micro_steps_per_partition, self.world_size
            )
            rows = rows[order]
        sizes = sizes.reshape(-1, self.world_size)
        starts = (np.cumsum(sizes).reshape(sizes.shape) - sizes)[:, ranks]
        return rows[concatenated_ranges(starts.ravel(), sizes[:, ranks].ravel())], sizes[:, ranks]

    def _rows(
        self, groups: NDArray[np.int64], starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.integer[Any]]:
        """Return the row numbers of (runs,) runs of samples, one run after another.

        Args:
            groups, starts, sizes: (runs,) group of each run, index of its first sample in the group, and samples.
        """
        group_sizes = self.group_sizes[groups]
        indices = concatenated_ranges(starts, sizes)
        if np.any(starts + sizes > group_sizes):  # repeats
            indices %= np.repeat(group_sizes, sizes)
        group_starts = np.cumsum(self.group_sizes) - self.group_sizes
        indices += np.repeat(group_starts[groups], sizes)
        return self.shuffled_rows[indices]

    def remaining(self, steps: int) -> NDArray[np.integer[Any]]:
        """Return the samples of all quotas that the first `steps` optimizer steps do not train.

        Returns:
            (remaining samples,) row numbers, ascending; with weights, a row may be there several times.
        """
        done = slice(steps * self.accumulation_steps * self.world_size // self.micro_batches_per_partition)
        groups, starts = self.partition_groups[done], self.partition_starts[done]
        sizes = np.minimum(self.partition_sizes[done], self.group_quotas[groups] - starts)
        quota_starts = np.cumsum(self.group_quotas) - self.group_quotas
        remain = np.ones(int(self.group_quotas.sum()), dtype=bool)
        remain[concatenated_ranges(quota_starts[groups] + starts, sizes)] = False
        every_group = np.arange(len(self.group_quotas))
        rows = self._rows(every_group, np.zeros_like(every_group), self.group_quotas)
        return np.sort(rows[remain])

    def summary(self) -> PlanSummary:
        """Count the samples that the epoch leaves out and repeats, by group and in total."""
        trained, reached = np.zeros_like(self.group_sizes), np.zeros_like(self.group_sizes)
        np.add.at(trained, self.partition_groups, self.partition_sizes)
        # The partitions of a group adjoin or overlap, from its first sample on.
        np.maximum.at(reached, self.partition_groups, self.partition_starts + self.partition_sizes)
        seen = np.minimum(reached, self.group_sizes)
        capacity = self.micro_batch_size * self.world_size * self.accumulation_steps
        return PlanSummary(
            num_groups=int(np.count_nonzero(self.group_sizes)),
            num_steps=self.num_steps,
            baseline_steps=-(-len(self.group_ids) // capacity),
            num_samples=len(self.group_ids),
            left_out=int((self.group_sizes - seen).sum()),
            repeated=int((trained - seen).sum()),
            group_samples=self.group_sizes,
            group_left_out=self.group_sizes - seen,
            group_repeated=trained - seen,
        )

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the micro-batches."""
        geometry = np.array([self.micro_batches_per_partition, self.world_size, self.accumulation_steps])
        partitions = [self.partition_groups, self.partition_starts, self.partition_sizes]
        arrays = [geometry, self.group_sizes, *partitions, self.shuffled_rows]
        content = hashlib.blake2b(digest_size=16)
        for array in arrays if self.lengths is None else [*arrays, self.lengths]:
            content.update(str(len(array)).encode())
            for start in range(0, len(array), _CHUNK):
                content.update(np.ascontiguousarray(array[start : start + _CHUNK], dtype="<i8").data)
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
        lengths: (samples,) tokens of each row. When given, each step is balanced: similar lengths share a micro-batch,
            and all ranks cost the same. The samples of a step do not depend on them.
        micro_batch_size: average number of samples in a micro-batch (B).
        world_size: data-parallel ranks (W).
        accumulation_steps: micro-batches that a rank accumulates in one optimizer step (A).
        purity: scope within which all samples share a group: an optimizer `step` or a micro-batch (`micro`).
        remainder: `keep` trains every sample once. A group of n samples gets ceil(n / capacity) partitions, whose sizes
            differ by at most one; a partition with fewer samples than micro-batches repeats samples of its group.
            `drop` leaves out the samples that do not fill a partition. With purity `micro`, the number of micro-batches
            is also made a multiple of W.
        weights: `proportional` (every sample once), `uniform` or `sqrt` over groups, or a mapping of group id to
            weight. The quotas add up to the number of samples in the dataset, so a group with a quota above its size
            repeats samples, and one with a quota below it leaves some out.
        equal_sizes: give all micro-batches of a step the same number of samples, for losses that ranks gather per
            sample; only without `lengths`. A group then repeats fewer samples than a step has micro-batches.
        seed: integer >= 0.
        epoch: integer >= 0. Epochs differ in order, not in length.

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

    micro_batches_per_partition = world_size * accumulation_steps if purity == "step" else 1
    capacity = micro_batch_size * micro_batches_per_partition
    quotas = _quotas(sizes, weights)
    partitions = quotas // capacity if remainder == "drop" else -(-quotas // capacity)
    if purity == "micro":  # every rank needs as many micro-batches
        surplus = int(partitions.sum()) % world_size
        if remainder == "drop":
            for _ in range(surplus):
                partitions[np.argmax(partitions)] -= 1
        else:
            _add_partitions(partitions, quotas, -surplus % world_size)
    if not partitions.any():
        raise ValueError(
            f"commonit_remainder='drop' leaves no step: the largest group has {sizes.max()} samples, and a partition "
            f"of purity {purity!r} takes {capacity}. Use remainder='keep', smaller batches or fewer groups."
        )
    if remainder == "drop":
        quotas = partitions * capacity

    partition_groups, partition_starts, partition_sizes = _cut_evenly(
        quotas, partitions, micro_batches_per_partition, equal_sizes
    )
    order = rng.permutation(len(partition_groups))
    return EpochPlan(
        group_ids=ids,
        lengths=token_lengths if micro_batches_per_partition > 1 else None,
        group_sizes=sizes,
        group_quotas=quotas,
        shuffled_rows=rows,
        partition_groups=partition_groups[order],
        partition_starts=partition_starts[order],
        partition_sizes=partition_sizes[order],
        micro_batches_per_partition=micro_batches_per_partition,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        equal_sizes=equal_sizes,
    )


def plan_remaining(whole: EpochPlan, rows: ArrayLike, *, seed: int, epoch: int) -> EpochPlan:
    """Plan the remaining samples of an epoch that started with another plan.

    Args:
        whole: the plan of the complete epoch with the new arguments; its geometry and purity are used.
        rows: (remaining samples,) row numbers, as `EpochPlan.remaining` of the other plan returns them.
        seed, epoch: as in `plan_epoch`.

    Returns:
        A plan with as many steps as `whole`; those before `first_step` count as done and hold no samples. Each of
        `rows` is trained once, whatever `remainder` is; a partition with fewer samples than micro-batches repeats some.

    Raises:
        ValueError: when the remaining samples take more steps than `whole` has.
    """
    remaining = np.asarray(rows)
    rng = np.random.default_rng([seed, epoch])
    indices, sizes = _rows_by_group(whole.group_ids[remaining])
    _shuffle_groups(indices, sizes, rng)

    partitions = -(-sizes // (whole.micro_batch_size * whole.micro_batches_per_partition))
    # All steps but the last have as many partitions: the remaining steps must end where the complete epoch does.
    partitions_per_step = whole.accumulation_steps * whole.world_size // whole.micro_batches_per_partition
    _add_partitions(partitions, sizes, int(len(whole.partition_sizes) - partitions.sum()) % partitions_per_step)
    groups, starts, partition_sizes = _cut_evenly(
        sizes, partitions, whole.micro_batches_per_partition, whole.equal_sizes
    )
    done = len(whole.partition_sizes) - len(groups)
    if done < 0:
        raise ValueError(
            f"commonit_resume='replan': the {len(remaining)} remaining samples of epoch {epoch} take more steps than "
            f"the {whole.num_steps} of a complete epoch. Use larger batches, or commonit_remainder='keep' with "
            "commonit_weights='proportional'."
        )
    order, empty = rng.permutation(len(groups)), np.zeros(done, dtype=np.int64)
    return replace(
        whole,
        group_sizes=sizes,
        group_quotas=sizes,
        shuffled_rows=remaining[indices],
        partition_groups=np.concatenate([empty, groups[order]]),
        partition_starts=np.concatenate([empty, starts[order]]),
        partition_sizes=np.concatenate([empty, partition_sizes[order]]),
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
    """Return (samples,) row numbers sorted by group, ascending within each, and (groups,) rows of each group."""
    groups = int(ids.max()) + 1
    chunks = range(0, len(ids), _CHUNK)
    sizes = np.zeros(groups, dtype=np.int64)
    for start in chunks:
        chunk = ids[start : start + _CHUNK].astype(np.int64, copy=False)
        sizes += np.bincount(chunk, minlength=groups)
    rows: NDArray[np.integer[Any]] = np.empty(
        len(ids), dtype=np.int32 if len(ids) <= np.iinfo(np.int32).max else np.int64
    )
    next_indices = np.cumsum(sizes) - sizes
    # A stable sort of 16-bit integers is a radix sort, many times faster than others.
    sort_type = np.int16 if groups <= np.iinfo(np.int16).max else np.int64
    for start in chunks:
        chunk = ids[start : start + _CHUNK].astype(sort_type)
        counts = np.bincount(chunk, minlength=groups)
        rows[concatenated_ranges(next_indices, counts)] = np.argsort(chunk, kind="stable") + start
        next_indices += counts
    return rows, sizes


def _shuffle_groups(rows: NDArray[np.integer[Any]], sizes: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Shuffle `rows` within each group, in place."""
    for end, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
        group = rows[end - size : end].astype(np.int64)  # NumPy shuffles 8 bytes at a time faster than 4
        rng.shuffle(group)
        rows[end - size : end] = group


def _cut_evenly(
    quotas: NDArray[np.int64], partitions: NDArray[np.int64], micro_batches: int, equal_sizes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut each group's quota into partitions whose sizes differ by at most one.

    Args:
        quotas, partitions: (groups,) samples and partitions of each group.
        micro_batches: per partition; each gets a sample.
        equal_sizes: make all sizes multiples of `micro_batches`; they differ by at most `micro_batches`.

    Returns:
        (partitions,) group, index of the first sample in the group, and size of each partition.
    """
    groups = np.repeat(np.arange(len(partitions)), partitions)
    number = np.arange(len(groups)) - np.repeat(np.cumsum(partitions) - partitions, partitions)
    multiple = micro_batches if equal_sizes else 1
    base, extra = np.divmod(-(-quotas // multiple), np.maximum(partitions, 1))
    starts = number * base[groups] + np.minimum(number, extra[groups])
    sizes = base[groups] + (number < extra[groups])
    return groups, starts * multiple, np.maximum(sizes * multiple, micro_batches)


def _quotas(sizes: NDArray[np.int64], weights: Mapping[int, float] | str) -> NDArray[np.int64]:
    """Return the (groups,) samples that each group contributes; the sum is the number of samples in the dataset."""
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
    quotas = np.floor(exact).astype(np.int64)
    missing_samples = int(sizes.sum() - quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing_samples]] += 1  # the largest fractions
    return quotas


def _add_partitions(partitions: NDArray[np.int64], quotas: NDArray[np.int64], count: int) -> None:
    """Add `count` partitions, one at a time, to the group with the fullest partitions; in place."""
    for _ in range(count):
        partitions[np.argmax(quotas / np.maximum(partitions, 1))] += 1
