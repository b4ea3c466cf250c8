"""Plan an epoch: the samples of every micro-batch, for every rank and step. NumPy only.

Steps: (1) sort the rows by group and shuffle them within each group; (2) compute the quota of each group, the samples
that it contributes to the epoch, and cut it into partitions, the runs of micro-batches that hold one group: the
micro-batches of an optimizer step (purity `step`) or a single one (`micro`); (3) cut mixed partitions from the samples
that stay, and put all partitions in order (compose.py); (4) cut a partition into micro-batches when it is read,
balanced by token length where lengths are given (balance.py). `plan_epoch` is a pure function of its arguments, so
ranks agree on a plan without communication. `EpochPlan.remaining` and `plan_remaining` continue an epoch with other
arguments.

Source: CommonIT (arXiv 2410.03077), section 3: batches of one group each, in random order. This project adds purity
over accumulated micro-batches, the compositions and the balance by length.

Cost for N samples: about the time of one random permutation of N, and 4 bytes per sample (8 from 2^31 samples on)
besides the arguments, twice that where samples are mixed; reading micro-batches takes memory for 2^16 samples.
benchmarks/plan_speed.py measures both.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from commonit_trl.config import PURITIES, check_choice, check_weights
from commonit_trl.plan.balance import balance, concatenated_ranges
from commonit_trl.plan.compose import (
    CHUNK,
    MIXED,
    Composition,
    Layout,
    rows_by_group,
    share_out,
    shuffle_groups,
    spread,
    take_rows,
)

_OF_PARTITIONS = ("partition_groups", "partition_starts", "partition_sizes")


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """Hold the counts of samples that an epoch leaves out and repeats."""

    num_groups: int
    """Groups that have at least one sample."""
    num_steps: int
    """Optimizer steps of the epoch."""
    pure_steps: int
    """Steps whose partitions are all of one group; a mixed partition counts as mixed whatever it holds."""
    mixed_samples: int
    """Samples in mixed partitions, with repeats."""
    baseline_steps: int
    """Steps of random batches with the same geometry."""
    num_samples: int
    """Samples in the dataset."""
    left_out: int
    """Samples that remainder, weights or `left_out_groups` leave out of the epoch."""
    repeated: int
    """Repeats of samples: a sample that is trained three times counts twice."""
    group_samples: NDArray[np.int64]
    """(groups,) samples of each group in the dataset."""
    group_left_out: NDArray[np.int64]
    """(groups,) samples of each group that they leave out."""
    group_repeated: NDArray[np.int64]
    """(groups,) repeats in each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan(Layout):
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
    micro_batches_per_partition: int
    micro_batch_size: int
    world_size: int
    accumulation_steps: int
    equal_sizes: bool = False
    """Whether all micro-batches of a partition have the same number of samples."""
    composition: Composition = field(default_factory=Composition)
    """How the partitions were made."""

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
        """(micro-steps, ranks) group id of each micro-batch, -1 for mixed ones."""
        return np.repeat(self.partition_groups, self.micro_batches_per_partition).reshape(-1, self.world_size)

    @cached_property
    def step_groups(self) -> NDArray[np.int64]:
        """(steps,) group id of each optimizer step, -1 for a mixed step or one of several groups."""
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
        length = max(1, CHUNK // (self.micro_batch_size * self.world_size * size)) * size
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
            return self._take(self.partition_groups[partitions].ravel(), starts.ravel(), sizes.ravel()), sizes
        here = slice(first // self._micro_steps_per_partition, end // self._micro_steps_per_partition)
        partition_sizes = self.partition_sizes[here]
        rows = self._take(self.partition_groups[here], self.partition_starts[here], partition_sizes)
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

    def _take(self, *runs: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """Return the row numbers of runs of samples, which `take_rows` documents."""
        return take_rows(self.rows, self.section_sizes, *runs)

    def remaining(self, steps: int) -> NDArray[np.integer[Any]]:
        """Return the samples of all quotas that the first `steps` optimizer steps do not train.

        Returns:
            (remaining samples,) row numbers, ascending; with weights, a row may be there several times.
        """
        done = slice(steps * self.accumulation_steps * self.world_size // self.micro_batches_per_partition)
        groups, starts = self.partition_groups[done], self.partition_starts[done]
        sizes = np.minimum(self.partition_sizes[done], self.section_quotas[groups] - starts)
        quota_starts = np.cumsum(self.section_quotas) - self.section_quotas
        remain = np.ones(int(self.section_quotas.sum()), dtype=bool)
        remain[concatenated_ranges(quota_starts[groups] + starts, sizes)] = False
        sections = np.arange(len(self.section_quotas))
        return np.sort(self._take(sections, np.zeros_like(sections), self.section_quotas)[remain])

    def remaining_pure(self, steps: int) -> int:
        """Count the samples in pure partitions after the first `steps` optimizer steps."""
        done = slice(steps * self.accumulation_steps * self.world_size // self.micro_batches_per_partition, None)
        return int(self.partition_sizes[done][self.partition_groups[done] != MIXED].sum())

    def heaviest_first(self, tokens: NDArray[Any]) -> "EpochPlan":
        """Return the plan with the step of the costliest micro-batch in front.

        Args:
            tokens: (samples,) tokens of each row; a micro-batch costs its longest row times its number of rows.
        """
        costs = []
        for first, end in self._chunks():
            rows, sizes = self._read(first, end)
            counts = sizes.ravel()
            costs.append(np.maximum.reduceat(tokens[rows], np.cumsum(counts) - counts) * counts)
        size = self.world_size * self.accumulation_steps
        by_step = np.concatenate(costs)
        by_step = by_step[: len(by_step) // size * size].reshape(-1, size).max(axis=1)  # without a last, shorter step
        partitions = size // self.micro_batches_per_partition
        start = partitions * int(by_step.argmax()) if len(by_step) else 0
        order = np.arange(len(self.partition_sizes))
        order = np.concatenate([order[start : start + partitions], order[:start], order[start + partitions :]])
        return replace(self, **{name: getattr(self, name)[order] for name in _OF_PARTITIONS})

    def summary(self) -> PlanSummary:
        """Count the samples that the epoch leaves out and repeats, by group and in total."""
        pure = self.partition_groups != MIXED
        groups, starts, sizes = self.partition_groups[pure], self.partition_starts[pure], self.partition_sizes[pure]
        mixed = self._take(self.partition_groups[~pure], self.partition_starts[~pure], self.partition_sizes[~pure])
        trained = np.bincount(self.group_ids[mixed], minlength=len(self.group_sizes))
        np.add.at(trained, groups, sizes)
        # A group trains its quota and, where a partition has more samples, those that follow.
        reached = self.group_quotas.copy()
        np.maximum.at(reached, groups, starts + sizes)
        seen = np.minimum(reached, self.group_sizes)
        capacity = self.micro_batch_size * self.world_size * self.accumulation_steps
        return PlanSummary(
            num_groups=int(np.count_nonzero(self.group_sizes)),
            num_steps=self.num_steps,
            pure_steps=int(np.count_nonzero(self.step_groups != MIXED)),
            mixed_samples=len(mixed),
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
        arrays = [geometry, np.trim_zeros(self.section_sizes, "b"), *partitions, self.rows]
        content = hashlib.blake2b(digest_size=16)
        for array in arrays if self.lengths is None else [*arrays, self.lengths]:
            content.update(str(len(array)).encode())
            for start in range(0, len(array), CHUNK):
                content.update(np.ascontiguousarray(array[start : start + CHUNK], dtype="<i8").data)
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
    pure_fraction: float = 1.0,
    order: str = "random",
    positions: ArrayLike | None = None,
    mixed_groups: Sequence[int] = (),
    left_out_groups: Sequence[int] = (),
    heaviest_first: ArrayLike | None = None,
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
            `drop` leaves out the samples that do not fill a partition. `mix` trains every sample once, those that do
            not fill a partition in mixed partitions whose sizes differ by at most one: ceil(samples / capacity)
            partitions in all. With purity `micro`, the number of micro-batches is also made a multiple of W.
        pure_fraction: share of the full partitions that stay pure; the samples of the others are mixed, in random
            order. Below 1 it needs the remainder `mix` or `drop`, so that all epochs have the same number of steps.
        order: of partitions: `random`, `ascending` or `descending` by position (a mixed one by the mean of its
            samples), `pure_first` or `mixed_first`.
        positions: (groups,) numbers that order the groups: near numbers are alike, and their remainders are mixed with
            each other. None: remainders are mixed in random order of the groups, and group ids order partitions.
        mixed_groups: groups whose samples are all mixed; they need the remainder `mix`.
        left_out_groups: groups that do not train.
        heaviest_first: (samples,) tokens of each row. When given, the step with the costliest micro-batch comes first.
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
    _check_arguments(ids, micro_batch_size, world_size, accumulation_steps, purity, weights, seed, epoch)
    composition = Composition(
        remainder=remainder,
        pure_fraction=pure_fraction,
        order=order,
        positions=_checked_positions(ids, positions),
        mixed_groups=tuple(mixed_groups),
    )
    token_lengths = _one_per_row(ids, "lengths", lengths)
    tokens = _one_per_row(ids, "heaviest_first", heaviest_first)
    rng = np.random.default_rng([seed, epoch])

    rows, sizes = rows_by_group(ids)
    if pure_fraction > 0:  # else all samples are shuffled together
        shuffle_groups(rows, sizes, rng)
    micro_batches_per_partition = world_size * accumulation_steps if purity == "step" else 1
    capacity = micro_batch_size * micro_batches_per_partition
    trained = sizes.copy()
    trained[[group for group in left_out_groups if group < len(sizes)]] = 0
    if not trained.any():
        raise ValueError(
            "commonit_small_groups='drop' leaves no group: all are smaller than commonit_min_group_size. Lower it."
        )
    if isinstance(weights, Mapping):
        weights = {group: weight for group, weight in weights.items() if group not in left_out_groups}
    quotas = share_out(trained, weights)
    full = composition.full_partitions(quotas, capacity)
    if remainder == "drop":
        if purity == "micro":  # every rank needs as many micro-batches
            for _ in range(int(full.sum()) % world_size):
                full[np.argmax(full)] -= 1
        if not full.any():
            raise ValueError(
                f"commonit_remainder='drop' leaves no step: the largest group has {sizes.max()} samples, and a "
                f"partition of purity {purity!r} takes {capacity}. Use remainder='keep', smaller batches or fewer "
                "groups."
            )
        quotas = full * capacity
    layout = composition.lay_out(
        rows,
        sizes,
        quotas,
        full if pure_fraction == 1 else spread(full, round(pure_fraction * int(full.sum())), rng),
        group_ids=ids,
        capacity=capacity,
        micro_batches=micro_batches_per_partition,
        equal_sizes=equal_sizes,
        multiple=world_size if purity == "micro" else 1,
        rng=rng,
    )
    plan = EpochPlan(
        group_ids=ids,
        lengths=token_lengths if micro_batches_per_partition > 1 else None,
        group_sizes=sizes,
        group_quotas=quotas,
        **vars(layout),
        micro_batches_per_partition=micro_batches_per_partition,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        equal_sizes=equal_sizes,
        composition=composition,
    )
    return plan if tokens is None else plan.heaviest_first(tokens)


def plan_remaining(whole: EpochPlan, rows: ArrayLike, *, pure_samples: int, seed: int, epoch: int) -> EpochPlan:
    """Plan the remaining samples of an epoch that started with another plan.

    Args:
        whole: the plan of the complete epoch with the new arguments; its geometry and composition are used.
        rows: (remaining samples,) row numbers, as `EpochPlan.remaining` of the other plan returns them.
        pure_samples: how many of them it had in pure partitions; with a pure fraction under 1, as many stay pure.
        seed, epoch: as in `plan_epoch`.

    Returns:
        A plan with as many steps as `whole`; those before `first_step` count as done and hold no samples. Each of
        `rows` is trained once, whatever `remainder` is; a partition with fewer samples than micro-batches repeats some.

    Raises:
        ValueError: when the remaining samples take more steps than `whole` has.
    """
    remaining = np.asarray(rows)
    rng = np.random.default_rng([seed, epoch])
    group_ids = whole.group_ids[remaining]
    indices, sizes = rows_by_group(group_ids)
    shuffle_groups(indices, sizes, rng)

    composition, capacity = whole.composition, whole.micro_batch_size * whole.micro_batches_per_partition
    pure = composition.full_partitions(sizes, capacity)
    if composition.pure_fraction < 1:
        pure = spread(pure, min(round(pure_samples / capacity), int(pure.sum())), rng)
    layout = composition.lay_out(
        indices,
        sizes,
        sizes,
        pure,
        group_ids=group_ids,
        capacity=capacity,
        micro_batches=whole.micro_batches_per_partition,
        equal_sizes=whole.equal_sizes,
        # All steps but the last have as many partitions: the remaining steps must end where the complete epoch does.
        multiple=whole.accumulation_steps * whole.world_size // whole.micro_batches_per_partition,
        total=len(whole.partition_sizes),
        rng=rng,
    )
    done = len(whole.partition_sizes) - len(layout.partition_sizes)
    if done < 0:
        raise ValueError(
            f"commonit_resume='replan': the {len(remaining)} remaining samples of epoch {epoch} take more steps than "
            f"the {whole.num_steps} of a complete epoch. Use larger batches, or commonit_remainder='keep' with "
            "commonit_weights='proportional'."
        )
    before = {name: np.concatenate([np.zeros(done, dtype=np.int64), vars(layout)[name]]) for name in _OF_PARTITIONS}
    return replace(
        whole, group_sizes=sizes, group_quotas=sizes, **{**vars(layout), **before, "rows": remaining[layout.rows]}
    )


def _check_arguments(
    ids: NDArray[Any],
    micro_batch_size: int,
    world_size: int,
    accumulation_steps: int,
    purity: str,
    weights: Mapping[int, float] | str,
    seed: int,
    epoch: int,
) -> None:
    check_choice("purity", purity, PURITIES)
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


def _checked_positions(ids: NDArray[Any], positions: ArrayLike | None) -> NDArray[np.float64] | None:
    values = None if positions is None else np.asarray(positions, dtype=np.float64)
    if values is not None and (values.ndim != 1 or len(values) <= ids.max() or not np.isfinite(values).all()):
        raise ValueError(f"positions={positions!r}: give a finite number for each group from 0 to {ids.max()}.")
    return values


def _one_per_row(ids: NDArray[Any], name: str, given: ArrayLike | None) -> NDArray[Any] | None:
    values = None if given is None else np.asarray(given)
    if values is not None and values.shape != ids.shape:
        raise ValueError(f"{name} has shape {values.shape}, group_ids {ids.shape}: give one for each row.")
    return values
