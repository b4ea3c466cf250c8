"""Each row is in one bin of its own group, within capacity; groups have enough bins for their steps."""

import numpy as np
import pytest
from axolotl.utils.samplers import MultipackBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_plugin.packing import Bins, PackedBatchSampler, pack_groups, split_bins
from commonit_trl import plan_epoch

CAPACITY = 64
OPTIONS = {"group_size": 100_000, "bin_size": 200, "sequential": False, "num_processes": 1, "mp_start_method": "fork"}

datasets = st.lists(st.tuples(st.integers(0, 3), st.integers(1, CAPACITY)), min_size=1, max_size=60)


def pack(rows, **options):
    group_ids, lengths = (np.array(values, dtype=np.int64) for values in zip(*rows))
    options = {
        "bins_per_micro_batch": 1,
        "micro_batches_per_partition": 1,
        "remainder": "keep",
        "seed": 0,
        **OPTIONS,
        **options,
    }
    return pack_groups(group_ids, lengths, capacity=CAPACITY, **options), group_ids, lengths


@settings(max_examples=200, deadline=None)
@given(
    rows=datasets,
    per_micro_batch=st.integers(1, 4),
    per_partition=st.integers(1, 8),
    sequential=st.booleans(),
    bin_size=st.integers(1, 5),
)
def test_bins_hold_each_row_once_and_one_group(rows, per_micro_batch, per_partition, sequential, bin_size):
    bins, group_ids, lengths = pack(
        rows,
        bins_per_micro_batch=per_micro_batch,
        micro_batches_per_partition=per_partition,
        sequential=sequential,
        bin_size=bin_size,
    )
    assert sorted(row for bin_rows in bins.rows for row in bin_rows) == list(range(len(rows)))
    for bin_rows, group, tokens in zip(bins.rows, bins.group_ids, bins.lengths, strict=True):
        assert set(group_ids[bin_rows]) == {group}
        assert lengths[bin_rows].sum() == tokens <= CAPACITY
        assert sequential or len(bin_rows) <= bin_size
    for group in set(group_ids.tolist()):
        count, size = np.sum(bins.group_ids == group), np.sum(group_ids == group)
        partitions = -(-count // (per_micro_batch * per_partition))
        assert count >= min(size, partitions * per_partition)


@settings(max_examples=100, deadline=None)
@given(
    rows=datasets,
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    per_micro_batch=st.integers(1, 3),
)
def test_plan_repeats_only_rows_of_small_groups(rows, world_size, accumulation, per_micro_batch):
    per_partition = world_size * accumulation
    bins, group_ids, _ = pack(rows, bins_per_micro_batch=per_micro_batch, micro_batches_per_partition=per_partition)
    if len(bins.rows) < world_size * accumulation:
        return  # refused by the plan
    plan = plan_epoch(
        bins.group_ids,
        bins.lengths,
        micro_batch_size=per_micro_batch,
        world_size=world_size,
        accumulation_steps=accumulation,
    )
    sampled = [list(PackedBatchSampler(bins, lambda epoch: plan, rank)) for rank in range(world_size)]
    seen = [row for batches in sampled for batch in batches for bin_rows in batch for row in bin_rows]
    assert set(seen) == set(range(len(rows)))
    counts = np.bincount(seen)
    for group in set(group_ids.tolist()):
        size, count = np.sum(group_ids == group), np.sum(bins.group_ids == group)
        partitions = -(-count // (per_micro_batch * per_partition))
        repeats = counts[group_ids == group].sum() - size
        assert repeats == 0 if size >= partitions * per_partition else repeats < per_partition


@settings(max_examples=200, deadline=None)
@given(
    rows=datasets,
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    per_micro_batch=st.integers(1, 3),
    small_groups=st.sampled_from(["merge", "mix", "drop"]),
    fraction=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_mixed_steps_repeat_no_bin(rows, world_size, accumulation, per_micro_batch, small_groups, fraction):
    """With `mix`, rows repeat only where all bins of the epoch have one row."""
    micro_batches = world_size * accumulation
    small = tuple(group for group in range(4) if 0 < sum(row[0] == group for row in rows) < 5)
    small_options = {"mixed_groups": small if small_groups == "mix" else ()}
    small_options |= {"left_out_groups": small if small_groups == "drop" else ()}
    options = {"remainder": "mix", **small_options}
    bins, group_ids, _ = pack(
        rows, bins_per_micro_batch=per_micro_batch, micro_batches_per_partition=micro_batches, **options
    )
    trained = ~np.isin(group_ids, small_options["left_out_groups"])
    if trained.sum() < micro_batches:
        return  # too few rows
    plan = plan_epoch(
        bins.group_ids,
        bins.lengths,
        micro_batch_size=per_micro_batch,
        world_size=world_size,
        accumulation_steps=accumulation,
        pure_fraction=fraction,
        **options,
    )
    sampled = [list(PackedBatchSampler(bins, lambda epoch: plan, rank)) for rank in range(world_size)]
    counts = np.bincount(
        [row for batches in sampled for batch in batches for bin_rows in batch for row in bin_rows],
        minlength=len(rows),
    )
    assert (counts[trained] > 0).all() and not counts[~trained].any()
    trained_bins = [bin_rows for bin_rows in bins.rows if trained[bin_rows[0]]]
    assert (counts[trained] == 1).all() or max(map(len, trained_bins)) == 1
    assert plan.num_steps == -(-len(trained_bins) // (per_micro_batch * micro_batches))


def test_large_group_is_packed_in_chunks_like_axolotl():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 500)
    ours, _, _ = pack([(0, int(length)) for length in lengths], remainder="drop", group_size=100)
    order = np.random.default_rng(0).permutation(500).tolist()
    sampler = MultipackBatchSampler(
        order, batch_size=1, batch_max_len=CAPACITY, lengths=lengths, bin_size=200, group_size=100, num_processes=1
    )
    assert ours.rows == [bin_rows for batch in sampler.generate_batches(set_stats=True) for bin_rows in batch]
    assert ours.efficiency == pytest.approx(sampler.efficiency())


def test_split_stops_at_single_row_bins():
    assert split_bins([[1, 2, 3], [4]], 3) == [[1], [4], [2, 3]]
    assert sorted(split_bins([[1, 2, 3], [4]], 9)) == [[1], [2], [3], [4]]


def test_fingerprint_depends_on_bins():
    def bins(rows):
        return Bins(rows=rows, group_ids=np.zeros(2, int), lengths=np.ones(2, int), capacity=4).fingerprint()

    assert bins([[1], [2, 3]]) == bins([[1], [2, 3]]) != bins([[1, 2], [3]])
