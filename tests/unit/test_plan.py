"""The invariants of an epoch plan, as properties over random shapes.

I1 pure, I2 lossless, I3 agreed, I4 reproducible, I5 honest length, I6 same samples in a step however arranged.
"""

import collections
import functools
import math
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.plan import plan_epoch
from commonit_trl.plan.sampler import CommonITBatchSampler

PURITIES = ("step", "micro")
REMAINDERS = ("keep", "drop")


@st.composite
def cases(draw, remainders=REMAINDERS, purities=PURITIES):
    """Arguments of `plan_epoch`: group ids with gaps and crumbs, a geometry, lengths or none."""
    geometry = {
        "micro_batch_size": draw(st.integers(1, 5)),
        "world_size": draw(st.integers(1, 4)),
        "accumulation_steps": draw(st.integers(1, 4)),
    }
    least = geometry["world_size"] * geometry["accumulation_steps"]
    step = least * geometry["micro_batch_size"]
    near_edges = st.sampled_from([0, 1, least - 1, least, step - 1, step, step + 1, 2 * step, 2 * step + 1])
    sizes = draw(st.lists(st.one_of(near_edges, st.integers(0, 60)), min_size=1, max_size=8))
    if sum(sizes) < step:  # so that `drop` can keep a step and no plan is refused
        sizes.append(step)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    group_ids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    lengths = rng.integers(0, draw(st.integers(1, 3000)), len(group_ids)) if draw(st.booleans()) else None
    options = {
        "purity": draw(st.sampled_from(purities)),
        "remainder": draw(st.sampled_from(remainders)),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 5)),
    }
    return group_ids, lengths, geometry, options


def plan_or_none(group_ids, lengths, geometry, options):
    """The plan; None where `drop` rightly leaves nothing."""
    try:
        return plan_epoch(group_ids, lengths, **geometry, **options)
    except ValueError as error:
        assert "remainder='drop' leaves no step" in str(error)
        return None


def walk(plan):
    """micro-step -> rank -> row numbers, through the public iterator."""
    by_rank = [list(plan.batches(rank)) for rank in range(plan.world_size)]
    assert len({len(batches) for batches in by_rank}) == 1
    return [list(batches) for batches in zip(*by_rank, strict=True)]


def capacity_of(geometry, purity):
    per_micro_step = geometry["micro_batch_size"] * (1 if purity == "micro" else geometry["world_size"])
    return per_micro_step * (geometry["accumulation_steps"] if purity == "step" else 1)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_i1_pure(case):
    """I1: a step, a micro-step of all ranks or a micro-batch holds one group, the one that the plan names."""
    group_ids, _, geometry, options = case
    plan = plan_or_none(*case)
    if plan is None:
        return
    accumulation = geometry["accumulation_steps"]
    for number, micro_step in enumerate(walk(plan)):
        for rank, batch in enumerate(micro_step):
            assert set(group_ids[batch]) == {plan.micro_batch_groups[number, rank]}
    groups = plan.micro_batch_groups
    if options["purity"] == "step":
        assert (groups == groups[:, :1]).all()
    if options["purity"] == "step":
        assert len(groups) % accumulation == 0
        assert (groups.reshape(-1, accumulation * geometry["world_size"]) == plan.step_groups[:, None]).all()
    for step, group in enumerate(plan.step_groups):
        inside = set(groups[step * accumulation : (step + 1) * accumulation].ravel())
        assert inside == {group} if len(inside) == 1 else group == -1


@settings(max_examples=300, deadline=None)
@given(cases(remainders=("keep",)))
def test_i2_lossless(case):
    """I2 (`keep`): every sample is seen; ceil(n / capacity) units a group, of sizes that differ by at most one; repeats
    only where a unit has fewer samples than micro-batches, and fewer of them than micro-batches."""
    group_ids, lengths, geometry, options = case
    plan = plan_epoch(group_ids, lengths, **geometry, **options)
    seen = Counter(index for micro_step in walk(plan) for batch in micro_step for index in batch)
    assert set(seen) == set(range(len(group_ids)))

    purity, world = options["purity"], geometry["world_size"]
    micro_batches = {"micro": 1, "step": world * geometry["accumulation_steps"]}[purity]
    capacity = capacity_of(geometry, purity)
    per_unit = plan.micro_batch_groups.ravel()[::micro_batches]
    unit_sizes = np.diff(plan.offsets).reshape(-1, micro_batches).sum(axis=1)
    extra_units = 0
    for group, size in Counter(group_ids.tolist()).items():
        sizes = unit_sizes[per_unit == group]
        least = math.ceil(size / capacity)
        extra_units += len(sizes) - least
        assert len(sizes) == least if purity != "micro" else len(sizes) >= least
        assert sizes.max() - sizes.min() <= 1
        assert sizes.max() <= max(capacity, micro_batches)
        repeats = sum(seen[index] - 1 for index in np.flatnonzero(group_ids == group))
        assert repeats == max(0, sizes.sum() - size)
        if repeats:
            assert repeats < micro_batches or purity == "micro"
            assert (sizes <= micro_batches).all()
    assert extra_units < world  # purity `micro`: only as many as the last round of ranks lacks


@settings(max_examples=200, deadline=None)
@given(cases(remainders=("drop",)))
def test_i2_drop_leaves_out_less_than_a_partition_per_group(case):
    """`drop` repeats nothing and leaves out less than a partition per group; the summary is right."""
    group_ids, _, geometry, options = case
    plan = plan_or_none(*case)
    if plan is None:
        return
    seen = Counter(index for micro_step in walk(plan) for batch in micro_step for index in batch)
    capacity = capacity_of(geometry, options["purity"])
    summary = plan.summary()
    assert summary.lost == len(group_ids) - len(seen)
    assert summary.repeated == sum(seen.values()) - len(seen)
    for group, size in Counter(group_ids.tolist()).items():
        rows = np.flatnonzero(group_ids == group)
        assert summary.group_lost[group] == sum(index not in seen for index in rows.tolist())
        assert summary.group_repeated[group] == sum(max(0, seen[index] - 1) for index in rows.tolist())
        if options["purity"] != "micro":
            assert summary.group_lost[group] == size % capacity
    assert summary.repeated == 0
    assert summary.group_lost.sum() == summary.lost and summary.group_repeated.sum() == summary.repeated
    assert summary.num_steps == plan.num_steps


@settings(max_examples=200, deadline=None)
@given(cases())
def test_i5_honest_length_and_no_empty_micro_batch(case):
    """I5: each rank gets `num_micro_steps` micro-batches, none of them empty; epochs have equal length."""
    plan = plan_or_none(*case)
    if plan is None:
        return
    micro_steps = walk(plan)
    assert len(micro_steps) == plan.num_micro_steps
    assert plan.num_steps == math.ceil(plan.num_micro_steps / plan.accumulation_steps)
    assert all(batch for micro_step in micro_steps for batch in micro_step)
    options = {**case[3], "epoch": case[3]["epoch"] + 1}
    assert plan_epoch(*case[:2], **case[2], **options).num_micro_steps == plan.num_micro_steps


@settings(max_examples=100, deadline=None)
@given(cases())
def test_i4_reproducible_and_epochs_differ(case):
    """I4: the same arguments give the same plan; another epoch or seed another order of the same length."""
    plan = plan_or_none(*case)
    if plan is None:
        return
    again = plan_or_none(*case)
    assert again.digest() == plan.digest()
    assert [list(b) for b in again.batches(0)] == [list(b) for b in plan.batches(0)]
    # Arranged by length, a plan of one step can come out the same; so can one of a few samples.
    if case[1] is None and len(set(plan.indices.tolist())) > 12:
        for name in ("seed", "epoch"):
            other = plan_epoch(*case[:2], **case[2], **{**case[3], name: case[3][name] + 1})
            assert other.digest() != plan.digest()


def test_i3_another_process_plans_the_same():
    """I3, I4: no state of the process (hash seed, numpy's global generator) gets into a plan."""
    code = (
        "import numpy as np; from commonit_trl.plan import plan_epoch; np.random.seed({seed}); np.random.rand(3);"
        "print(plan_epoch(np.arange(500) % 7, np.arange(500) % 91, micro_batch_size=3, world_size=2, "
        "accumulation_steps=2, seed=5, epoch=3).digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.format(seed=seed)], capture_output=True, text=True, check=True
        ).stdout
        for seed in (1, 2)
    }
    here = plan_epoch(
        np.arange(500) % 7,
        np.arange(500) % 91,
        micro_batch_size=3,
        world_size=2,
        accumulation_steps=2,
        seed=5,
        epoch=3,
    ).digest()
    assert digests == {here + "\n"}


def test_known_plan_stays():
    """I4 across versions: a checkpoint written today must find the same order tomorrow."""
    plan = plan_epoch(np.arange(11) % 2, micro_batch_size=2, world_size=2, seed=3, epoch=1)
    assert list(plan.batches(0)) == [[1, 9], [8, 10], [2, 4], [3]]
    assert list(plan.batches(1)) == [[7], [6], [0], [5]]
    assert plan.digest() == "116589a82b987d6167e3a7f2671881ee"
    lengths = np.arange(20) * 7 % 31
    arranged = plan_epoch(np.arange(20) % 2, lengths, micro_batch_size=3, world_size=2, accumulation_steps=2, seed=3)
    assert list(arranged.batches(0)) == [[7, 11, 15], [13], [4, 8], [2, 6]]
    assert list(arranged.batches(1)) == [[17, 3], [19, 1, 5, 9], [12, 16], [10, 14, 18, 0]]
    assert arranged.digest() == "59cee687c3ea4a0c25e68391a82ba9ac"


def test_seed_and_epoch_are_0_by_default():
    ids = np.arange(50) % 3
    assert plan_epoch(ids, micro_batch_size=2).digest() == plan_epoch(ids, micro_batch_size=2, seed=0, epoch=0).digest()


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_i4_read_from_anywhere(case, data):
    """I4, I5: all micro-batches at once, each alone, and a rank's from any micro-step on are the same ones."""
    plan = plan_or_none(*case)
    if plan is None:
        return
    world = plan.world_size
    micro_batches = np.split(plan.indices, plan.offsets[1:-1])
    assert [batch.tolist() for batch in micro_batches] == [batch for micro_step in walk(plan) for batch in micro_step]
    start = data.draw(st.integers(0, plan.num_micro_steps))
    for rank in range(world):
        left = [batch.tolist() for batch in micro_batches[start * world + rank :: world]]
        assert list(plan.batches(rank, start)) == left
        if left:
            assert plan.micro_batch(start, rank).tolist() == left[0]


@pytest.mark.parametrize("lengths", [None, np.arange(900) * 7 % 331], ids=["plain", "arranged"])
def test_i4_how_much_is_read_at_once_makes_no_difference(lengths, monkeypatch):
    plans = []
    for samples_at_once in (1, 50, 1 << 16):
        monkeypatch.setattr("commonit_trl.plan.epoch._SAMPLES_AT_ONCE", samples_at_once)
        plan = plan_epoch(np.arange(900) % 7, lengths, micro_batch_size=3, world_size=2, accumulation_steps=2)
        plans.append((walk(plan), plan.digest(), list(plan.batches(1, 21))))
    assert plans[0] == plans[1] == plans[2]


def test_a_resumed_run_reads_what_was_left():
    """I4: the sampler yields nothing for what a wrapper will skip, then what was left, and later whole epochs."""
    plan = functools.partial(plan_epoch, np.arange(70) % 3, np.arange(70), micro_batch_size=2, world_size=2)
    sampler = CommonITBatchSampler(plan, rank=1)
    whole = list(sampler)
    sampler.skip_first(5)
    assert list(SkipBatchSampler(sampler, skip_batches=5)) == whole[5:]
    assert list(sampler) == whole
    sampler.skip_first(5)
    assert list(sampler) == [[]] * 5 + whole[5:]
    sampler.skip_first(5)
    sampler.set_epoch(0)  # the Trainer says again which epoch it is
    assert list(sampler) == [[]] * 5 + whole[5:]
    sampler.skip_first(5)
    sampler.set_epoch(1)  # another epoch has nothing to skip
    assert list(sampler) == list(plan(epoch=1).batches(1))


@pytest.mark.parametrize("lengths", [None, np.arange(400_000) % 997], ids=["plain", "arranged"])
def test_memory(lengths):
    """A plan and a walk through it take at most 16 bytes a row at the peak, beside the arguments."""
    group_ids = np.arange(400_000) % 64
    tracemalloc.start()
    try:
        plan = plan_epoch(group_ids, lengths, micro_batch_size=8, world_size=8, accumulation_steps=4)
        collections.deque(plan.batches(3), maxlen=0)
        assert tracemalloc.get_traced_memory()[1] <= 16 * len(group_ids)
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_i6_arrangement_moves_samples_only_inside_their_unit(case):
    """I6: with lengths, each unit holds the same samples as without, so a step's gradient is the same."""
    group_ids, _, geometry, options = case
    lengths = np.random.default_rng(0).integers(0, 500, len(group_ids))
    plain, arranged = (plan_or_none(group_ids, given, geometry, options) for given in (None, lengths))
    if plain is None:
        return
    assert (plain.micro_batch_groups == arranged.micro_batch_groups).all()
    per_unit = geometry["world_size"] * (geometry["accumulation_steps"] if options["purity"] == "step" else 1)
    if options["purity"] == "micro":
        per_unit = 1
    for start in range(0, len(plain.offsets) - 1, per_unit):
        rows = [plan.indices[plan.offsets[start] : plan.offsets[start + per_unit]] for plan in (plain, arranged)]
        assert sorted(rows[0]) == sorted(rows[1])


def padded_tokens(plan, lengths):
    return np.array([[lengths[batch].max() * len(batch) for batch in micro_step] for micro_step in walk(plan)])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 1), (4, 2)])
def test_arrangement_lowers_padding_cost_and_peak(world, accumulation):
    """The padded cost of the slowest rank and the largest micro-batch are about half the plain order's, or less."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.8, 4000), 2000).astype(int)
    geometry = {"micro_batch_size": 8, "world_size": world, "accumulation_steps": accumulation}
    cost, peak = [], []
    for given_lengths in (None, lengths):
        plan = plan_epoch(np.arange(4000) % 3, given_lengths, **geometry)
        padded = padded_tokens(plan, lengths)
        by_rank = padded.reshape(-1, accumulation, world).sum(axis=1)
        cost.append(by_rank.max(axis=1).sum() * world / lengths.sum())
        peak.append(padded.max())
    assert cost[1] <= 0.55 * cost[0]
    assert peak[1] <= 0.4 * peak[0]


def test_equal_lengths_share_micro_batches_evenly():
    """With equal lengths the arrangement has nothing to gain: micro-batches hold equal counts."""
    plan = plan_epoch(np.zeros(64, int), np.full(64, 7), micro_batch_size=4, world_size=4, accumulation_steps=4)
    assert set(np.diff(plan.offsets)) == {4}


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(["uniform", "sqrt", "mapping"]))
def test_weights_change_shares_not_the_epochs_size(case, kind):
    """The epoch draws as many samples as the dataset has, in the shares that the weights say, to the nearest sample;
    the summary counts what that loses and repeats as an outside count does."""
    group_ids, lengths, geometry, options = case
    options = {**options, "remainder": "keep", "purity": "step"}
    sizes = np.bincount(group_ids)
    present = np.flatnonzero(sizes).tolist()
    mapping = {group: place % 3 + 0.5 for place, group in enumerate(present)}
    weights = mapping if kind == "mapping" else kind
    shares = {"uniform": (sizes > 0) * 1.0, "sqrt": np.sqrt(sizes)}.get(
        kind, np.array([mapping.get(group, 0.0) for group in range(len(sizes))])
    )
    expected = shares / shares.sum() * len(group_ids)
    plan = plan_epoch(group_ids, lengths, **geometry, weights=weights, **options)
    micro_batches = geometry["world_size"] * geometry["accumulation_steps"]
    drawn = np.bincount(group_ids[plan.indices], minlength=len(sizes))
    for group in present:
        assert abs(drawn[group] - expected[group]) <= 1 or drawn[group] - expected[group] < micro_batches + 1
        assert drawn[group] >= expected[group] - 1
    seen = np.bincount(plan.indices, minlength=len(group_ids))
    summary = plan.summary()
    assert summary.group_lost.tolist() == [(seen[group_ids == group] == 0).sum() for group in range(len(sizes))]
    assert summary.group_repeated.tolist() == [
        np.maximum(seen[group_ids == group] - 1, 0).sum() for group in range(len(sizes))
    ]


def test_weights_epochs_draw_different_samples():
    """A group drawn below its size does not leave out the same samples each epoch."""
    group_ids = np.repeat([0, 1], [900, 100])
    seen = [
        set(plan_epoch(group_ids, micro_batch_size=4, weights="uniform", epoch=epoch).indices.tolist())
        for epoch in range(12)
    ]
    assert len(seen[0]) < 700
    assert len(set.union(*seen)) > 990


@pytest.mark.parametrize("sizes, units", [((9, 8), [3, 3]), ((3, 5), [2, 2])])
def test_the_group_with_the_fullest_units_is_cut_once_more(sizes, units):
    """Purity `micro` on two ranks, where there would be an odd number of micro-batches: 3 of 3 samples and 2 of 4, or
    1 of 3 and 2 of 2 or 3, of at most 4 or 3."""
    plan = plan_epoch(np.repeat([0, 1], sizes), micro_batch_size=max(3, sizes[0] // 2), world_size=2, purity="micro")
    assert np.bincount(plan.unit_groups).tolist() == units


def test_group_of_ten_thousand_groups():
    """Many groups of one or a few samples: still lossless and pure."""
    group_ids = np.random.default_rng(0).integers(0, 40_000, 100_000)
    plan = plan_epoch(group_ids, micro_batch_size=2, world_size=2)
    assert set(plan.indices.tolist()) == set(range(100_000))
    assert (group_ids[plan.indices] == np.repeat(plan.micro_batch_groups.ravel(), np.diff(plan.offsets))).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"purity": "steps"}, "purity='steps' is not one of step, micro: did you mean 'step'?"),
        ({"remainder": "dorp"}, "remainder='dorp' is not one of keep, drop: did you mean 'drop'?"),
        ({"weights": "unifrom"}, "did you mean 'uniform'?"),
        ({"weights": {0: 1.0}}, "weights must name every group that has samples: missing [1], without samples []."),
        ({"weights": {0: 1.0, 1: 1.0, 2: 1.0}}, "missing [], without samples [2]."),
        ({"weights": {0: 1.0, 1: 1.0, 2: 1.0}, "group_ids": [0, 2] * 5}, "missing [], without samples [1]."),
        ({"weights": {0: 1.0, 1: -1.0}}, "must be a number >= 0"),
        ({"weights": {0: 0.0, 1: 0.0}}, "gives no group a weight above 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be a whole number >= 1."),
        ({"world_size": 0}, "world_size=0"),
        ({"accumulation_steps": 1.5}, "accumulation_steps=1.5"),
        ({"seed": -1}, "seed=-1 must be a whole number >= 0."),
        ({"epoch": -1}, "epoch=-1"),
        ({"world_size": 64}, "The dataset has 10 samples, fewer than the 64 micro-batches of one step"),
        (
            {"accumulation_steps": 11},
            "fewer than the 11 micro-batches of one step (world_size=1 x accumulation_steps=11): use fewer ranks, less "
            "gradient accumulation or more data.",
        ),
        ({"remainder": "drop", "micro_batch_size": 8}, "remainder='drop' leaves no step: the largest group has 5"),
        ({"group_ids": [0.5] * 10}, "group_ids must be one-dimensional integers >= 0"),
        ({"group_ids": [-1] * 10}, "group_ids must be one-dimensional integers >= 0"),
        ({"group_ids": []}, "The dataset has 0 samples"),
        ({"lengths": [3] * 9, "world_size": 2}, "lengths has shape (9,), group_ids (10,)"),
    ],
)
def test_bad_arguments_are_named(change, said):
    arguments = {"group_ids": np.arange(10) % 2, "micro_batch_size": 2, **change}
    with pytest.raises(ValueError) as error:
        plan_epoch(**arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(cases(remainders=("keep",)))
def test_i2_equal_sizes_repeat_less_than_a_step_has_micro_batches(case):
    """With `equal_sizes` the micro-batches of a step have as many samples each; every sample is seen, and a group
    repeats fewer samples than a step has micro-batches, except where a step has fewer samples than micro-batches."""
    group_ids, _, geometry, options = case
    options = {**options, "purity": "step"}
    plan = plan_epoch(group_ids, **geometry, **options, equal_sizes=True)
    seen = Counter(index for micro_step in walk(plan) for batch in micro_step for index in batch)
    micro_batches = geometry["world_size"] * geometry["accumulation_steps"]
    sizes = np.diff(plan.offsets).reshape(-1, micro_batches)
    assert (sizes == sizes[:, :1]).all()
    assert set(seen) == set(range(len(group_ids)))
    assert plan.num_steps == plan_epoch(group_ids, **geometry, **options).num_steps
    for group in set(group_ids.tolist()):
        members = np.flatnonzero(group_ids == group)
        assert sum(seen[index] for index in members.tolist()) - len(members) < micro_batches
