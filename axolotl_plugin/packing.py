"""Pack each group alone, with the packing functions of Axolotl's `MultipackBatchSampler`.

Steps: (1) shuffle each group's rows and pack them into bins; (2) split bins of groups that have fewer bins than their
steps have micro-batches, so that no bin is repeated, or with `commonit_remainder: mix` bins of any group, if the mixed
steps lack some; (3) plan epochs over bins instead of rows. Bins stay pure in mixed steps. Axolotl's collators get their
usual input: a micro-batch is a list of bins, a bin a list of row numbers.

Bins are packed once, so that all epochs have the same number of steps. The bins that share a step, and the order of
steps, differ between epochs.

Cost: that of Axolotl's packing (first-fit, compiled by numba) on up to `sample_packing_group_size` rows at a time.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from axolotl.utils.samplers.multipack import allocate_sequentially, pack_parallel
from numpy.typing import NDArray

from commonit_trl.plan.sampler import CommonITBatchSampler
from commonit_trl.plan.spec import small_groups
from commonit_trl.rows import Rows
from commonit_trl.trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Rows packed into bins, each of one group."""

    rows: list[list[int]]
    """(bins,) row numbers of each bin."""
    group_ids: NDArray[np.int64]
    """(bins,) group ids."""
    lengths: NDArray[np.int64]
    """(bins,) tokens."""
    capacity: int
    """Tokens that fit into a bin."""

    @property
    def efficiency(self) -> float:
        """Return the share of the bins' capacity that holds tokens."""
        return float(self.lengths.sum() / (len(self.rows) * self.capacity))

    def fingerprint(self) -> str:
        """Return a hash of the rows of each bin."""
        return hashlib.blake2b(json.dumps(self.rows).encode(), digest_size=8).hexdigest()


def bin_shape(args: Any, micro_batch_size: int) -> tuple[int, int]:
    """Return the tokens of a bin and the bins of a micro-batch, as in `AxolotlTrainer._create_multipack_sampler`.

    Args:
        args: Axolotl's training arguments.
        micro_batch_size: rows of a micro-batch without packing.
    """
    bins = micro_batch_size if args.multipack_real_batches else 1
    return micro_batch_size // bins * args.max_seq_length, bins


def pack_for_training(
    args: Any, group_ids: NDArray[np.integer[Any]], lengths: NDArray[np.int64], micro_batch_size: int, world_size: int
) -> Bins:
    """Pack the rows of each group for a run with these training arguments.

    Args:
        args: Axolotl's training arguments, with the `commonit_*` options.
        group_ids, lengths: (rows,) group and tokens of each row. Every row must have a token to train on.
        micro_batch_size: rows of a micro-batch without packing.
        world_size: data-parallel ranks.
    """
    capacity, bins = bin_shape(args, micro_batch_size)
    micro_batches = {"step": world_size * args.gradient_accumulation_steps, "micro": 1}
    mixed_groups, left_out_groups = small_groups(args, np.bincount(group_ids))
    return pack_groups(
        group_ids,
        lengths,
        capacity=capacity,
        bins_per_micro_batch=bins,
        micro_batches_per_partition=micro_batches[args.commonit_purity],
        remainder=args.commonit_remainder,
        mixed_groups=mixed_groups,
        left_out_groups=left_out_groups,
        seed=args.seed,
        group_size=args.sample_packing_group_size,
        bin_size=args.sample_packing_bin_size,
        sequential=args.sample_packing_sequentially,
        num_processes=args.dataset_num_proc,
        mp_start_method=args.sample_packing_mp_start_method or "fork",
    )


def pack_groups(
    group_ids: NDArray[np.integer[Any]],
    lengths: NDArray[np.int64],
    *,
    capacity: int,
    bins_per_micro_batch: int,
    micro_batches_per_partition: int,
    remainder: str,
    mixed_groups: Sequence[int] = (),
    left_out_groups: Sequence[int] = (),
    seed: int,
    **options: Any,
) -> Bins:
    """Pack the rows of each group.

    Args:
        group_ids, lengths: (rows,) group and tokens of each row.
        capacity: tokens of a bin.
        bins_per_micro_batch: bins that a micro-batch holds on average.
        micro_batches_per_partition: micro-batches of a partition.
        remainder, mixed_groups, left_out_groups: as `plan_epoch` takes them; bins are split so that partitions have as
            many bins as micro-batches.
        seed: of the order of the packer's input.
        options: of `pack_rows`.
    """
    order = np.random.default_rng(seed).permutation(len(group_ids))
    by_group = order[np.argsort(group_ids[order], kind="stable")]
    groups, counts = np.unique(group_ids, return_counts=True)
    partition_size = bins_per_micro_batch * micro_batches_per_partition
    packed: list[list[int]] = []
    left_out: list[list[int]] = []
    mixed = 0
    for group, rows in zip(groups.tolist(), np.split(by_group, np.cumsum(counts)[:-1]), strict=True):
        bins = pack_rows(rows, lengths[rows], capacity, **options)
        if group in left_out_groups:
            left_out += bins
            continue
        if remainder == "keep":
            bins = split_bins(bins, -(-len(bins) // partition_size) * micro_batches_per_partition)
        mixed += len(bins) if group in mixed_groups else len(bins) % partition_size
        packed += bins
    if remainder == "mix":
        packed = split_bins(packed, len(packed) - mixed + -(-mixed // partition_size) * micro_batches_per_partition)
    packed += left_out
    return Bins(
        rows=packed,
        group_ids=np.array([group_ids[rows[0]] for rows in packed], dtype=np.int64),
        lengths=np.array([lengths[rows].sum() for rows in packed], dtype=np.int64),
        capacity=capacity,
    )


def pack_rows(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    capacity: int,
    *,
    sequential: bool,
    group_size: int,
    bin_size: int,
    num_processes: int | None,
    mp_start_method: str,
) -> list[list[int]]:
    """Pack rows as `MultipackBatchSampler.generate_batches` does; the options are Axolotl's.

    Args:
        rows, lengths: (rows,) row numbers and tokens, in the order of the packer's input.
    """
    lengths = lengths.astype(np.int32)
    if sequential:
        bins, _, _ = allocate_sequentially(lengths, rank=0, bin_capacity=capacity, num_ranks=1)
    else:
        bins = pack_parallel(
            lengths,
            bin_capacity=capacity,
            group_size=group_size,
            bin_size=bin_size,
            num_processes=min(4, num_processes or 4) if len(rows) > group_size else 1,
            mp_start_method=mp_start_method,
        )
    return [[int(rows[index]) for index in indices] for indices in bins]


def split_bins(bins: list[list[int]], least: int) -> list[list[int]]:
    """Halve the bins with most rows until there are at least `least`, or all bins have one row."""
    queue = [(-len(rows), index, rows) for index, rows in enumerate(bins)]
    heapq.heapify(queue)
    while len(queue) < least and queue[0][0] < -1:
        _, index, rows = heapq.heappop(queue)
        half = len(rows) // 2
        heapq.heappush(queue, (-half, index, rows[:half]))
        heapq.heappush(queue, (half - len(rows), len(bins) + len(queue), rows[half:]))
    return [rows for _, _, rows in sorted(queue, key=lambda entry: entry[1])]


@dataclass(kw_only=True, eq=False)
class PackedRun(Run):
    """A run that plans over bins with `sample_packing`, and over rows without."""

    bins: Bins | None = None

    def fit_spec(self, trainer: Any) -> None:
        """Plan over bins of the current batch size, which `auto_find_batch_size` changes."""
        args, micro_batch_size = trainer.args, trainer._train_batch_size
        if not args.sample_packing:
            return super().fit_spec(trainer)
        capacity, bins_per_micro_batch = bin_shape(args, micro_batch_size)
        if self.bins is None or (self.bins.capacity, self.spec.micro_batch_size) != (capacity, bins_per_micro_batch):
            lengths = Rows(trainer.train_dataset).token_counts("total")
            self.bins = pack_for_training(args, self.row_groups, lengths, micro_batch_size, self.spec.world_size)
            self.spec = replace(
                self.spec,
                group_ids=self.bins.group_ids,
                lengths=None if self.spec.lengths is None else self.bins.lengths,
                heaviest_first=None if self.spec.heaviest_first is None else self.bins.lengths,
                micro_batch_size=bins_per_micro_batch,
            )

    def sampler(self) -> CommonITBatchSampler:
        return super().sampler() if self.bins is None else PackedBatchSampler(self.bins, self.plan, self.rank)

    @property
    def fingerprint(self) -> str:
        return super().fingerprint if self.bins is None else f"{super().fingerprint}, bins {self.bins.fingerprint()}"


class PackedBatchSampler(CommonITBatchSampler):
    """Yields the micro-batches of one rank from a plan over bins: lists of bins, which are lists of row numbers.

    Args:
        bins: the samples of the plan.
        plan, rank: as `CommonITBatchSampler` takes them.
    """

    def __init__(self, bins: Bins, plan: Any, rank: int = 0) -> None:
        super().__init__(plan, rank)
        self.bins = bins

    def __iter__(self) -> Iterator[Any]:
        for micro_batch in super().__iter__():
            yield [self.bins.rows[index] for index in micro_batch]
