"""I1 to I6 for random epochs, from a handful of samples to the size of real data.

Everything is computed with NumPy from the arguments and from the micro-batches that the ranks read.
COMMONIT_PLAN_EXAMPLES multiplies the number of examples; `make fuzz` sets it.
"""

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.plan import plan_epoch

MOST_ROWS, MOST_GROUPS = 100_000, 10_000
TIMES = int(os.environ.get("COMMONIT_PLAN_EXAMPLES", "1"))


@st.composite
def cases(draw, most_rows, most_groups):
    """Draw arguments of `plan_epoch`: sizes and choices from hypothesis, rows from a cheap generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    geometry = {
        "micro_batch_size": draw(st.integers(1, 16)),
        "world_size": draw(st.integers(1, 8)),
        "accumulation_steps": draw(st.integers(1, 8)),
    }
    step = math.prod(geometry.values())
    if most_rows < MOST_ROWS and draw(st.booleans()):  # sizes at which the number of partitions or of repeats changes
        least = step // geometry["micro_batch_size"]
        edges = [0, 1, least - 1, least, step - 1, step, step + 1, 2 * step, 2 * step + 1]
        sizes = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=5))
        sizes += [least] * (sum(sizes) < least)
        group_ids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    else:
        rows = draw(st.integers(max(2, step), most_rows))
        groups = draw(st.integers(1, min(rows, most_groups)))
        skew = draw(st.sampled_from([0.0, 1.0, 3.0]))  # equal sizes, or a few large groups and many tiny ones
        shares = np.arange(1, groups + 1) ** -skew
        group_ids = rng.choice(groups, rows, p=shares / shares.sum())
    weights = draw(st.sampled_from(["proportional", "uniform", "sqrt", "mapping"]))
    if weights == "mapping":
        present = np.unique(group_ids)
        drawn = rng.integers(0, 4, len(present)) * 0.5
        drawn[draw(st.integers(0, len(present) - 1))] = 1  # not all of them 0
        weights = dict(zip(present.tolist(), drawn.tolist(), strict=True))
    options = {
        "purity": draw(st.sampled_from(["step", "micro"])),
        "remainder": draw(st.sampled_from(["keep", "drop"])),
        "weights": weights,
        "equal_sizes": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**63)),
        "epoch": draw(st.integers(0, 1000)),
    }
    lengths = rng.integers(0, 2000, len(group_ids)) if draw(st.booleans()) else None
    return group_ids, lengths, geometry, options


def quotas_of(sizes, weights):
    """Return the (groups,) samples that each group contributes to the epoch, as fractions."""
    if weights == "proportional":
        return sizes.astype(float)
    if isinstance(weights, str):
        shares = {"uniform": (sizes > 0) * 1.0, "sqrt": np.sqrt(sizes)}[weights]
    else:
        shares = np.array([weights.get(group, 0) for group in range(len(sizes))], dtype=float)
    return shares / shares.sum() * sizes.sum()


class Read:
    """The micro-batches that the ranks of a plan read, and what is expected of them.

    `rows` has the (samples,) row numbers in the order micro-step, rank; `sizes` the (micro-batches,) samples of each.
    """

    def __init__(self, plan, case):
        self.plan = plan
        self.group_ids, self.lengths, self.geometry, self.options = case
        self.size, self.world, self.accumulation = self.geometry.values()
        self.per_partition = self.world * self.accumulation if self.options["purity"] == "step" else 1
        self.capacity = self.size * self.per_partition
        self.multiple = self.per_partition if self.options["equal_sizes"] else 1
        self.ranks = [list(plan.batches(rank)) for rank in range(self.world)]
        batches = [batch for micro_step in zip(*self.ranks, strict=True) for batch in micro_step]
        self.rows = np.concatenate(batches)
        self.sizes = np.array([len(batch) for batch in batches])

    def extremes(self, micro_batches):
        """Return the lowest and highest group id in each run of this many micro-batches."""
        starts = (np.cumsum(self.sizes) - self.sizes)[::micro_batches]
        groups = self.group_ids[self.rows]
        return np.minimum.reduceat(groups, starts), np.maximum.reduceat(groups, starts)


def check_pure(read, rng):
    """I1: all micro-batches of a partition hold one group, which the plan names."""
    plan = read.plan
    lowest, highest = read.extremes(read.per_partition)
    assert (lowest == highest).all()
    assert (plan.micro_batch_groups.ravel() == read.extremes(1)[0]).all()
    lowest, highest = read.extremes(read.world * read.accumulation)
    assert plan.step_groups.tolist() == np.where(lowest == highest, lowest, -1).tolist()
    step = int(rng.integers(plan.num_steps))
    assert plan.group_of(step) == plan.group_of(3 * plan.num_steps + step) == plan.step_groups[step]


def check_lossless(read):
    """I2: each group trains its quota, in partitions whose number and sizes follow from it."""
    group_ids, rows, capacity = read.group_ids, read.rows, read.capacity
    sizes = np.bincount(group_ids)
    quotas = quotas_of(sizes, read.options["weights"])
    keep = read.options["remainder"] == "keep"
    trained = np.bincount(group_ids[rows], minlength=len(sizes))
    partition_groups = read.extremes(read.per_partition)[0]
    partition_sizes = read.sizes.reshape(-1, read.per_partition).sum(axis=1)
    partitions = np.bincount(partition_groups, minlength=len(sizes))
    assert partition_sizes.max() <= capacity
    assert trained[quotas == 0].sum() == 0
    # With purity `micro`, the number of partitions is made a multiple of the ranks.
    slack = read.world - 1 if read.options["purity"] == "micro" else 0
    if keep:
        least, most = np.ceil(np.floor(quotas) / capacity), np.ceil(np.ceil(quotas) / capacity)
        assert (partitions >= least).all() and (partitions <= most + slack).all()
        assert partitions.sum() <= most.sum() + slack
        assert (trained >= np.floor(quotas - 1e-6)).all() and trained.sum() >= len(group_ids)
        repeats = trained - np.ceil(quotas + 1e-6)
        assert (repeats < np.where(partitions > 0, read.per_partition + slack, 1)).all()
        largest, smallest = np.zeros_like(sizes), np.full_like(sizes, capacity + 1)
        np.maximum.at(largest, partition_groups, partition_sizes)
        np.minimum.at(smallest, partition_groups, partition_sizes)
        assert (largest - smallest <= read.multiple).all()
        assert read.multiple > 1 or (largest[repeats > 0] <= read.per_partition).all()
        if read.options["weights"] == "proportional":
            assert len(np.unique(rows)) == len(group_ids)
    else:
        assert (partition_sizes == capacity).all()
        assert (trained <= np.ceil(quotas + 1e-6)).all()
        full = np.floor(np.floor(quotas + 1e-6) / capacity)
        assert partitions.sum() >= full.sum() - slack and (slack or (partitions >= full).all())
    # A group trains its rows in turn: none a second time before each was trained once, except to fill a partition.
    times = np.bincount(rows, minlength=len(group_ids))
    fewest, most = np.full_like(sizes, len(rows)), np.zeros_like(sizes)
    np.minimum.at(fewest, group_ids, times)
    np.maximum.at(most, group_ids, times)
    fill = np.maximum(trained - np.floor(quotas + 1e-6), 0) if keep else 0
    assert ((most - fewest <= 1 + fill) | (sizes == 0)).all()
    check_summary(read, times)


def check_summary(read, times):
    """The summary counts the epoch as its micro-batches do; `times` is how often each row was read."""
    summary, sizes = read.plan.summary(), np.bincount(read.group_ids)
    assert (summary.group_samples == sizes).all() and summary.num_samples == len(read.group_ids)
    for by_group, total, expected in (
        (summary.group_left_out, summary.left_out, times == 0),
        (summary.group_repeated, summary.repeated, np.maximum(times - 1, 0)),
    ):
        assert by_group.tolist() == np.bincount(read.group_ids, expected, len(sizes)).tolist()
        assert total == expected.sum()
    assert summary.baseline_steps == math.ceil(len(read.group_ids) / (read.size * read.world * read.accumulation))
    assert summary.num_steps == read.plan.num_steps and summary.num_groups == (sizes > 0).sum()


def check_reproducible(read, rng):
    """I3, I4: another rank plans the same epoch, a resumed one reads the rest of it, other epochs differ."""
    plan, arguments = read.plan, {**read.geometry, **read.options}
    again = plan_epoch(read.group_ids.astype(np.int32), read.lengths, **arguments)
    assert again.fingerprint() == plan.fingerprint()
    assert (plan.indices == read.rows).all() and (np.diff(plan.offsets) == read.sizes).all()
    for _ in range(3):
        rank, start = int(rng.integers(read.world)), int(rng.integers(plan.num_micro_steps + 1))
        assert list(again.batches(rank, start)) == read.ranks[rank][start:]
    for change in ({"epoch": 1001}, {"seed": arguments["seed"] + 1}):
        other = plan_epoch(read.group_ids, read.lengths, **arguments | change)
        assert other.num_micro_steps == plan.num_micro_steps
        if len(read.group_ids) > 20:
            assert other.fingerprint() != plan.fingerprint()


def check_length(read):
    """I5: every rank reads the number of micro-batches that the plan promises, none of them empty."""
    assert {len(batches) for batches in read.ranks} == {read.plan.num_micro_steps}
    assert read.sizes.min() >= 1
    assert read.plan.num_steps == math.ceil(read.plan.num_micro_steps / read.accumulation)


def check_balance(read):
    """I6: lengths move samples only within their partition; without lengths, micro-batch sizes differ by at most one.

    With `equal_sizes` and without lengths they do not differ.
    """
    case = read.group_ids, None, read.geometry, read.options
    without = Read(plan_epoch(read.group_ids, **read.geometry, **read.options), case)
    sizes = without.sizes.reshape(-1, read.per_partition)
    assert (np.ptp(sizes, axis=1) <= (not read.options["equal_sizes"])).all()
    assert (sizes.sum(axis=1) == read.sizes.reshape(-1, read.per_partition).sum(axis=1)).all()
    partition = np.repeat(np.arange(len(sizes)), sizes.sum(axis=1))
    ours, theirs = (rows[np.lexsort((rows, partition))] for rows in (read.rows, without.rows))
    assert (ours == theirs).all()


def check(case):
    group_ids, lengths, geometry, options = case
    try:
        plan = plan_epoch(group_ids, lengths, **geometry, **options)
    except ValueError as error:
        assert options["remainder"] == "drop" and "remainder='drop' leaves no step" in str(error)
        size, world, accumulation = geometry.values()
        least, capacity = (1, size * world * accumulation) if options["purity"] == "step" else (world, size)
        assert (np.floor(quotas_of(np.bincount(group_ids), options["weights"])) // capacity).sum() < least
        return
    read, rng = Read(plan, case), np.random.default_rng(len(group_ids))
    check_length(read)
    check_pure(read, rng)
    check_lossless(read)
    check_reproducible(read, rng)
    check_balance(read)


@settings(max_examples=200 * TIMES, deadline=None)
@given(cases(3_000, 100))
def test_invariants(case):
    check(case)


@settings(max_examples=20 * TIMES, deadline=None)
@given(cases(MOST_ROWS, MOST_GROUPS))
def test_invariants_at_the_size_of_real_data(case):
    check(case)


@pytest.mark.parametrize("purity", ["step", "micro"])
@pytest.mark.parametrize("weights", ["proportional", "uniform"])
def test_invariants_of_most_rows_in_most_groups(purity, weights):
    """The corner that random sizes rarely reach."""
    rng = np.random.default_rng(0)
    group_ids = np.concatenate([np.arange(MOST_GROUPS), rng.integers(0, MOST_GROUPS, MOST_ROWS - MOST_GROUPS)])
    geometry = {"micro_batch_size": 2, "world_size": 2, "accumulation_steps": 1}
    options = {"purity": purity, "remainder": "keep", "weights": weights, "equal_sizes": False, "seed": 0, "epoch": 0}
    check((group_ids, rng.integers(1, 500, MOST_ROWS), geometry, options))
