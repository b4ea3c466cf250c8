"""Compose an epoch from groups: which samples share a partition, and in which order partitions train. NumPy only.

A partition is a run of micro-batches that train one after another; a pure one holds samples of one group. A group of n
samples and partitions of S samples make floor(n / S) full partitions, and a remainder. `remainder` says what becomes of
it: `keep` cuts the group into ceil(n / S) partitions of nearly equal size, `drop` leaves it out, and `mix` puts the
remainders of all groups end to end, groups of near positions side by side, and cuts mixed partitions from them. With a
pure fraction under 1, only that share of the full partitions stays pure; the samples of the others are mixed too, in
random order.

Source: pure batches are CommonIT's (arXiv 2410.03077, section 3); even cuts, mixed partitions and orders are this
project's. A step of nearby groups resembles the semi-homogeneous batches of arXiv 2501.01028.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import ORDERS, REMAINDERS, check_choice
from commonit_trl.plan.balance import concatenated_ranges

CHUNK = 1 << 16
"""Samples to sort, balance or read at once: they fit into the processor's cache, and amortise NumPy's overhead."""
_BUCKET = 1 << 15
MIXED = -1
"""Group id of mixed partitions; as an index, it takes the last section of `EpochPlan.rows`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Hold the samples of an epoch in sections, and the partitions that are cut from them."""

    rows: NDArray[np.integer[Any]]
    """(samples + mixed samples,) row numbers in sections: each group in random order, and last the mixed samples."""
    section_sizes: NDArray[np.int64]
    """(groups + 1,) rows of each section."""
    section_quotas: NDArray[np.int64]
    """(groups + 1,) samples of each section that partitions hold, from its first on."""
    partition_groups: NDArray[np.int64]
    """(partitions,) group of each partition, in training order; -1 for mixed ones."""
    partition_starts: NDArray[np.int64]
    """(partitions,) index of the first sample in the section: sample `i` is its row `i` modulo the section's size."""
    partition_sizes: NDArray[np.int64]
    """(partitions,) samples of each partition."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Composition:
    """Hold how the partitions of an epoch are made from groups; `plan_epoch` documents the fields."""

    remainder: str = "keep"
    pure_fraction: float = 1.0
    order: str = "random"
    positions: NDArray[np.float64] | None = None
    mixed_groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("remainder", self.remainder, REMAINDERS)
        check_choice("order", self.order, ORDERS)
        if not 0 <= self.pure_fraction <= 1:
            raise ValueError(f"pure_fraction={self.pure_fraction!r} must be a number from 0 to 1.")
        if self.pure_fraction < 1 and self.remainder == "keep":
            raise ValueError(f"pure_fraction={self.pure_fraction:g} mixes samples: set remainder='mix' or 'drop'.")
        if self.mixed_groups and self.remainder != "mix":
            raise ValueError(f"mixed_groups with remainder={self.remainder!r}: set remainder='mix'.")

    @property
    def mixes(self) -> bool:
        """Whether the epoch may have mixed partitions."""
        return self.remainder == "mix" or self.pure_fraction < 1

    def full_partitions(self, quotas: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
        """Return the (groups,) full partitions that each group's quota could make."""
        full = quotas // capacity
        full[[group for group in self.mixed_groups if group < len(full)]] = 0
        return full

    def lay_out(
        self,
        rows: NDArray[np.integer[Any]],
        sizes: NDArray[np.int64],
        quotas: NDArray[np.int64],
        pure: NDArray[np.int64],
        *,
        group_ids: NDArray[np.integer[Any]],
        capacity: int,
        micro_batches: int,
        equal_sizes: bool,
        multiple: int,
        total: int = 0,
        rng: np.random.Generator,
    ) -> Layout:
        """Cut the quotas of the groups into partitions, and put them in training order.

        Args:
            rows, sizes: of `rows_by_group`; `group_ids[rows]` is sorted.
            quotas: (groups,) samples that each group contributes.
            pure: (groups,) full partitions that stay pure, where samples are mixed.
            capacity: samples of a full partition.
            micro_batches, equal_sizes: as in `cut_evenly`.
            multiple, total: the number of partitions is made congruent to `total` modulo `multiple`.
        """
        if self.mixes:
            pure_quotas, partitions = pure * capacity, pure
            groups = rng.permutation(len(sizes))
            if self.positions is not None:
                groups = groups[np.argsort(self.positions[groups], kind="stable")]
            all_rows = self.pure_fraction == 0 and (quotas == sizes).all()
            mixed = (
                rows
                if all_rows
                else take_rows(rows, sizes, groups, pure_quotas[groups], (quotas - pure_quotas)[groups])
            )
            if self.pure_fraction < 1:
                mixed = shuffled(mixed, rng)
            rows = np.concatenate([rows, mixed], dtype=rows.dtype, casting="same_kind")
        else:
            pure_quotas, partitions, mixed = quotas, -(-quotas // capacity), rows[:0]
        section_quotas = np.append(pure_quotas, len(mixed))
        partitions = np.append(partitions, -(-len(mixed) // capacity))
        surplus = (total - int(partitions.sum())) % multiple
        if len(mixed):  # pure partitions stay full
            partitions[-1] += surplus
        else:
            add_partitions(partitions, section_quotas, surplus)
        sections, starts, counts = cut_evenly(section_quotas, partitions, micro_batches, equal_sizes)
        sections[sections == len(sizes)] = MIXED
        order = self._order(sections, starts, counts, group_ids, mixed, rng)
        return Layout(
            rows=rows,
            section_sizes=np.append(sizes, len(mixed)),
            section_quotas=section_quotas,
            partition_groups=sections[order],
            partition_starts=starts[order],
            partition_sizes=counts[order],
        )

    def _order(
        self,
        groups: NDArray[np.int64],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
        group_ids: NDArray[np.integer[Any]],
        mixed_rows: NDArray[np.integer[Any]],
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Return the (partitions,) indices of the partitions of `cut_evenly` in training order."""
        order = rng.permutation(len(groups))
        mixed = groups == MIXED
        if self.order == "random":
            return order
        if self.order == "pure_first":
            keys = mixed.astype(np.float64)
        elif self.order == "mixed_first":
            keys = -mixed.astype(np.float64)
        else:
            positions = np.arange(group_ids.max() + 1.0) if self.positions is None else self.positions
            keys = positions[groups]
            sums = np.concatenate([[0.0], np.cumsum(positions[group_ids[mixed_rows]])])
            begins = starts[mixed] % max(len(mixed_rows), 1)
            ends = np.minimum(begins + sizes[mixed], len(mixed_rows))
            keys[mixed] = (sums[ends] - sums[begins]) / (ends - begins)
            if self.order == "descending":
                keys = -keys
        return order[np.argsort(keys[order], kind="stable")]


def take_rows(
    rows: NDArray[np.integer[Any]],
    sizes: NDArray[np.int64],
    sections: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> NDArray[np.integer[Any]]:
    """Return the row numbers of (runs,) runs of samples, one run after another.

    Args:
        rows, sizes: row numbers, one section after another, and (sections,) sizes.
        sections, starts, counts: (runs,) section of each run, index of its first sample in the section, and samples;
            a run past the end of its section wraps around.
    """
    section_sizes = sizes[sections]
    indices = concatenated_ranges(starts, counts)
    if np.any(starts + counts > section_sizes):  # repeats
        indices %= np.repeat(np.maximum(section_sizes, 1), counts)
    indices += np.repeat((np.cumsum(sizes) - sizes)[sections], counts)
    return rows[indices]


def spread(counts: NDArray[np.int64], total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return numbers that sum to `total`, each within one of its share of `counts`; chance decides on the fractions."""
    order = rng.permutation(len(counts))
    ends = np.cumsum(counts[order]) * total // max(int(counts.sum()), 1)
    numbers = np.empty_like(counts)
    numbers[order] = np.diff(ends, prepend=0)
    return numbers


def rows_by_group(ids: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """Return (samples,) row numbers sorted by group, ascending within each, and (groups,) rows of each group."""
    groups = int(ids.max()) + 1
    chunks = range(0, len(ids), CHUNK)
    sizes = np.zeros(groups, dtype=np.int64)
    for start in chunks:
        chunk = ids[start : start + CHUNK].astype(np.int64, copy=False)
        sizes += np.bincount(chunk, minlength=groups)
    rows: NDArray[np.integer[Any]] = np.empty(
        len(ids), dtype=np.int32 if len(ids) <= np.iinfo(np.int32).max else np.int64
    )
    next_indices = np.cumsum(sizes) - sizes
    # A stable sort of 16-bit integers is a radix sort, many times faster than others.
    sort_type = np.int16 if groups <= np.iinfo(np.int16).max else np.int64
    for start in chunks:
        chunk = ids[start : start + CHUNK].astype(sort_type)
        counts = np.bincount(chunk, minlength=groups)
        rows[concatenated_ranges(next_indices, counts)] = np.argsort(chunk, kind="stable") + start
        next_indices += counts
    return rows, sizes


def shuffle_groups(rows: NDArray[np.integer[Any]], sizes: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Shuffle `rows` within each group, in place."""
    for end, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
        group = rows[end - size : end].astype(np.int64)  # NumPy shuffles 8 bytes at a time faster than 4
        rng.shuffle(group)
        rows[end - size : end] = group


def shuffled(rows: NDArray[np.integer[Any]], rng: np.random.Generator) -> NDArray[np.integer[Any]]:
    """Return `rows` in random order.

    Dealing them to random buckets, and shuffling each bucket in the processor's cache, is faster than one shuffle of
    many rows.
    """
    if not len(rows):
        return rows
    buckets = rng.integers(1 + len(rows) // _BUCKET, size=len(rows), dtype=np.int32)
    order, sizes = rows_by_group(buckets)
    dealt = rows[order]
    shuffle_groups(dealt, sizes, rng)
    return dealt


def cut_evenly(
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


def share_out(sizes: NDArray[np.int64], weights: Mapping[int, float] | str) -> NDArray[np.int64]:
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


def add_partitions(partitions: NDArray[np.int64], quotas: NDArray[np.int64], count: int) -> None:
    """Add `count` partitions, one at a time, to the group with the fullest partitions; in place."""
    for _ in range(count):
        partitions[np.argmax(quotas / np.maximum(partitions, 1))] += 1
