"""Compositions of an epoch: mixed steps, pure fraction, order, heaviest first (I1 to I5, for what the ranks read)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.config import CommonITArguments
from commonit_trl.plan import PlanSpec, plan_epoch
from commonit_trl.plan.spec import small_groups, weights_by_id

SIZES = np.array([5, 40, 0, 17, 3, 64, 16, 1])
GROUP_IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
GEOMETRY = {"micro_batch_size": 2, "world_size": 2, "accumulation_steps": 2}
STEP = 8


def read(plan):
    """Return the (micro-batches,) lists of rows that the ranks read, in training order."""
    ranks = [list(plan.batches(rank)) for rank in range(plan.world_size)]
    return [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]


def read_partitions(plan):
    """Return the (partitions,) lists of rows that the ranks read, in training order."""
    batches, count = read(plan), plan.micro_batches_per_partition
    return [np.concatenate(batches[start : start + count]) for start in range(0, len(batches), count)]


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    geometry = {name: draw(st.integers(1, most)) for name, most in zip(GEOMETRY, (6, 4, 4), strict=True)}
    step = math.prod(geometry.values())
    groups = draw(st.integers(1, 30))
    shares = np.arange(1, groups + 1) ** -draw(st.sampled_from([0.0, 1.0, 3.0]))
    group_ids = rng.choice(groups, draw(st.integers(step, 1500)), p=shares / shares.sum())
    options = {
        "remainder": draw(st.sampled_from(["mix", "drop"])),
        "pure_fraction": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "order": draw(st.sampled_from(["random", "ascending", "descending", "pure_first", "mixed_first"])),
        "purity": draw(st.sampled_from(["step", "micro"])),
        "positions": draw(st.sampled_from([None, rng.permutation(groups)])),
        "seed": draw(st.integers(0, 99)),
        "epoch": draw(st.integers(0, 3)),
    }
    lengths = rng.integers(1, 500, len(group_ids))
    options["heaviest_first"] = draw(st.sampled_from([None, lengths]))
    return group_ids, draw(st.sampled_from([None, lengths])), geometry, options


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_compositions_keep_their_promises(case):
    group_ids, lengths, geometry, options = case
    sizes = np.bincount(group_ids)
    micro_batches = geometry["world_size"] * geometry["accumulation_steps"] if options["purity"] == "step" else 1
    ranks = geometry["world_size"] if options["purity"] == "micro" else 1
    capacity = geometry["micro_batch_size"] * micro_batches
    full = int((sizes // capacity).sum())
    if options["remainder"] == "drop":
        full -= full % ranks
        if not full:
            with pytest.raises(ValueError, match="drop"):
                plan_epoch(group_ids, lengths, **geometry, **options)
            return
    plan = plan_epoch(group_ids, lengths, **geometry, **options)
    partitions = read_partitions(plan)
    groups = plan.partition_groups

    # Exactly the promised share of the full partitions is pure, and each holds one group.
    pure = [set(group_ids[rows].tolist()) for rows, group in zip(partitions, groups, strict=True) if group >= 0]
    assert pure == [{group} for group in groups.tolist() if group >= 0]
    promised = options["pure_fraction"] * full
    if len(pure) == len(partitions):  # none is mixed: ranks divide a pure one where they need as many
        assert len(pure) - promised in range(ranks)
    else:
        assert abs(len(pure) - promised) <= 0.5
    # Each row trains once; only a last, short partition repeats some.
    rows = np.concatenate(partitions)
    times = np.bincount(rows, minlength=len(group_ids))
    if options["remainder"] == "mix":
        repeats = int((times - 1).sum())
        assert times.min() == 1 and repeats < micro_batches + ranks
        assert len(partitions) - math.ceil(len(group_ids) / capacity) in range(ranks)  # as many as plain batches
    else:
        assert times.max() == 1 and len(partitions) == full and {len(part) for part in partitions} == {capacity}
    mixed = [len(part) for part, group in zip(partitions, groups, strict=True) if group < 0]
    assert not mixed or max(mixed) - min(mixed) <= 1
    summary = plan.summary()
    assert summary.repeated == np.maximum(times - 1, 0).sum() and summary.left_out == (times == 0).sum()
    assert summary.mixed_samples == sum(mixed)
    # Another rank reads the same; another epoch has as many micro-steps.
    again = plan_epoch(group_ids, lengths, **geometry, **options)
    assert again.fingerprint() == plan.fingerprint()
    assert plan_epoch(group_ids, **geometry, **{**options, "epoch": 9}).num_micro_steps == plan.num_micro_steps
    check_order(group_ids, partitions, groups, options, geometry)


def check_order(group_ids, partitions, groups, options, geometry):
    """Partitions come in the promised order; the heaviest step of an epoch comes first."""
    if options["heaviest_first"] is not None:
        count = geometry["world_size"] * geometry["accumulation_steps"]
        plan = plan_epoch(group_ids, **geometry, **{**options, "heaviest_first": None})
        first = plan_epoch(group_ids, **geometry, **options)
        tokens = options["heaviest_first"]
        costs = [max(tokens[batch]) * len(batch) for batch in read(first)]
        complete = max(1, len(costs) // count) * count
        assert max(costs[:count]) == max(costs[:complete])
        assert sorted(map(tuple, read(first))) == sorted(map(tuple, read(plan)))
        return
    positions = np.arange(group_ids.max() + 1) if options["positions"] is None else options["positions"]
    means = np.array([positions[group_ids[rows]].mean() for rows in partitions])
    if options["order"] == "pure_first":
        assert (np.diff(groups < 0) == 0).sum() >= len(groups) - 2 and (groups[0] >= 0 or (groups < 0).all())
    elif options["order"] == "mixed_first":
        assert (np.diff(groups < 0) == 0).sum() >= len(groups) - 2 and (groups[-1] >= 0 or (groups < 0).all())
    elif options["order"] != "random" and not np.any(np.bincount(np.concatenate(partitions)) > 1):
        steps = np.diff(means) * (1 if options["order"] == "ascending" else -1)
        assert steps.min(initial=0) > -1e-9


def test_the_remainders_of_near_groups_share_steps():
    positions = np.array([3.0, 0, 9, 1, 2, 8, 4, 7])
    for seed in range(9):
        plan = plan_epoch(GROUP_IDS, **GEOMETRY, remainder="mix", positions=positions, seed=seed)
        read_groups = zip(read_partitions(plan), plan.partition_groups, strict=True)
        mixed = [positions[GROUP_IDS[rows]] for rows, group in read_groups if group < 0]
        mixed.sort(key=np.mean)
        assert len(mixed) > 1 and all(low.max() <= high.min() for low, high in itertools.pairwise(mixed))
    without = {
        tuple(plan_epoch(GROUP_IDS, **GEOMETRY, remainder="mix", epoch=epoch).rows[-2:].tolist()) for epoch in range(9)
    }
    assert len({int(GROUP_IDS[rows[0]]) for rows in without}) > 1  # in random order of the groups


def test_no_pure_step_is_random_batches():
    """A pure fraction of 0 draws steps that hold the groups as chance would have it."""
    group_ids = np.repeat([0, 1], 4000)
    plan = plan_epoch(group_ids, micro_batch_size=10, remainder="mix", pure_fraction=0)
    shares = [group_ids[rows].mean() for rows in read_partitions(plan)]
    assert np.std(shares) == pytest.approx(math.sqrt(0.25 / 10), rel=0.1)
    assert (plan.step_groups == -1).all()
    assert not set(plan.batches(0).__next__()) & set(
        plan_epoch(group_ids, micro_batch_size=10, remainder="mix", pure_fraction=0, epoch=1).batches(0).__next__()
    )


def test_the_pure_fraction_may_change_by_epoch():
    spec = PlanSpec(group_ids=GROUP_IDS, **GEOMETRY, remainder="mix", pure_fraction=(1.0, 0.5, 0.0))
    full = (SIZES // STEP).sum()
    assert [spec.plan(epoch).summary().pure_steps for epoch in range(5)] == [full, round(full / 2), 0, 0, 0]
    assert len({spec.plan(epoch).num_steps for epoch in range(4)}) == 1


def test_the_heaviest_step_opens_the_first_epoch_alone():
    tokens = np.arange(len(GROUP_IDS))
    plain = PlanSpec(group_ids=GROUP_IDS, **GEOMETRY)
    heavy = PlanSpec(group_ids=GROUP_IDS, **GEOMETRY, heaviest_first=tokens)
    same = [heavy.plan(epoch).fingerprint() == plain.plan(epoch).fingerprint() for epoch in range(4)]
    assert same == [False, True, True, True]


def test_chance_decides_which_groups_round_up():
    """Over the epochs, each group has its share of the pure steps, also groups with one full step."""
    ids = np.repeat(np.arange(10), STEP)
    counts = np.zeros(10)
    for epoch in range(200):
        plan = plan_epoch(ids, **GEOMETRY, remainder="mix", pure_fraction=0.5, epoch=epoch)
        pure = plan.partition_groups[plan.partition_groups >= 0]
        assert len(pure) == 5
        counts += np.bincount(pure, minlength=10)
    assert counts.min() > 70 and counts.max() < 130  # 100 of 200, six standard deviations


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_groups_may_be_mixed_or_left_out_whole(fraction):
    options = {"remainder": "mix", "mixed_groups": (1, 90), "left_out_groups": (5, 3), "pure_fraction": fraction}
    plan = plan_epoch(GROUP_IDS, **GEOMETRY, **options)
    trained = np.bincount(GROUP_IDS[np.concatenate(read_partitions(plan))], minlength=len(SIZES))
    kept = np.where(np.isin(np.arange(len(SIZES)), [3, 5]), 0, SIZES)
    assert (trained >= kept).all() and trained[[3, 5]].tolist() == [0, 0]
    assert 1 not in plan.partition_groups and set(plan.partition_groups) >= {-1, 6}
    assert plan.summary().group_left_out.tolist() == (SIZES - kept).tolist()


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_chance_decides_which_rows_of_a_group_stay_pure(fraction):
    ids, seen = np.zeros(10 * STEP + 1, dtype=int), set()
    for epoch in range(3):
        plan = plan_epoch(ids, **GEOMETRY, remainder="mix", pure_fraction=fraction, epoch=epoch)
        read_groups = zip(read_partitions(plan), plan.partition_groups, strict=True)
        seen.add(frozenset(np.concatenate([rows for rows, group in read_groups if group == 0]).tolist()))
    assert len(seen) == 3


def test_weights_may_name_groups_that_are_left_out():
    weights = {group: 1.0 for group in range(len(SIZES)) if SIZES[group]}
    plan = plan_epoch(GROUP_IDS, **GEOMETRY, remainder="mix", weights=weights, left_out_groups=(5,))
    trained = np.bincount(GROUP_IDS[np.concatenate(read_partitions(plan))], minlength=len(SIZES))
    assert trained[5] == 0 and np.ptp(trained[[0, 1, 3, 4, 6, 7]]) <= 1


def test_weights_and_mixed_steps_go_together():
    plan = plan_epoch(GROUP_IDS, **GEOMETRY, remainder="mix", weights="uniform")
    trained = np.bincount(GROUP_IDS[np.concatenate(read_partitions(plan))], minlength=len(SIZES))
    quota = SIZES.sum() / (SIZES > 0).sum()
    assert np.abs(trained[SIZES > 0] - quota).max() <= 1
    assert plan.num_steps == math.ceil(SIZES.sum() / STEP)
    assert plan.summary().repeated == np.maximum(trained - SIZES, 0).sum()


@settings(max_examples=100, deadline=None)
@given(
    fraction=st.sampled_from([0.0, 0.5, 1.0]),
    order=st.sampled_from(["random", "pure_first", "ascending"]),
    steps=st.integers(1, 17),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_a_replanned_epoch_trains_the_rest_once_and_keeps_its_pure_share(fraction, order, steps, world_size):
    shared = {"group_ids": GROUP_IDS, "remainder": "mix", "pure_fraction": (fraction,), "order": order}
    started = PlanSpec(**shared, **GEOMETRY)
    resumed = PlanSpec(**shared, micro_batch_size=4 // world_size, world_size=world_size, accumulation_steps=2, seed=7)
    rest = started.remaining(0, steps, then=resumed)
    before, after = read_partitions(started.plan(0))[:steps], read_partitions(rest.plan(0))
    times = np.bincount(np.concatenate([*before, *after]).astype(int), minlength=len(GROUP_IDS))
    assert times.min() == 1 and times.sum() - len(times) < STEP
    promised = round(fraction * (SIZES // STEP).sum())
    pure = (started.plan(0).partition_groups[:steps] >= 0).sum()
    pure += sum(1 for rows, group in zip(after, rest.plan(0).partition_groups) if len(rows) and group >= 0)
    assert pure <= promised
    if fraction < 1:  # groups whose rest fills no step cannot be pure
        assert pure >= promised - np.count_nonzero(SIZES)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pure_fraction": 0.5}, "pure_fraction=0.5.*remainder='mix'"),
        ({"pure_fraction": 1.5, "remainder": "mix"}, "pure_fraction=1.5.*from 0 to 1"),
        ({"mixed_groups": (1,)}, "mixed_groups.*remainder='mix'"),
        ({"left_out_groups": range(8)}, "leaves no group.*commonit_min_group_size"),
        ({"order": "up"}, "order='up'"),
        ({"positions": np.arange(GROUP_IDS.max())}, "positions.*each group"),
        ({"positions": np.full(9, np.nan)}, "positions.*finite"),
        ({"heaviest_first": [1, 2]}, "heaviest_first has shape"),
    ],
)
def test_bad_compositions_are_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        plan_epoch(GROUP_IDS, **GEOMETRY, **options)


def test_a_spec_takes_what_the_options_say():
    tokens, positions, rows = np.arange(len(GROUP_IDS)), np.arange(8.0), np.bincount(GROUP_IDS)
    options = CommonITArguments(
        commonit_metric="task",
        commonit_purity="micro",
        commonit_remainder="mix",
        commonit_pure_fraction=[1.0, 0.25],
        commonit_order="ascending",
        commonit_heaviest_first=True,
        commonit_weights={name: 2.0 for name in "abdefgh"},
    )
    given = {"names": list("abcdefgh"), "group_ids": GROUP_IDS, "positions": positions, "row_counts": rows}
    spec = PlanSpec.from_options(options, **given, tokens=tokens, **GEOMETRY)
    assert (spec.purity, spec.remainder, spec.pure_fraction, spec.order) == ("micro", "mix", (1.0, 0.25), "ascending")
    assert spec.weights == {group: 2.0 for group in range(8) if SIZES[group]}
    assert spec.positions is positions and spec.heaviest_first is tokens
    with pytest.raises(ValueError, match=r"commonit_heaviest_first=True.*Set it to False"):
        PlanSpec.from_options(options, **given, tokens=None, **GEOMETRY)


@pytest.mark.parametrize(
    ("small", "expected"),
    [("merge", ((), ())), ("mix", ((1,), ())), ("drop", ((), (1,)))],
    ids=["merge", "mix", "drop"],
)
def test_small_groups_are_those_under_the_minimum(small, expected):
    options = CommonITArguments(
        commonit_metric="task", commonit_remainder="mix", commonit_min_group_size=5, commonit_small_groups=small
    )
    assert small_groups(options, np.array([5, 4, 0, 9])) == expected


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"a": 1.0, "bb": 1.0}, r"commonit_weights: 'bb' is not a group; did you mean 'b'"),
        ({"b": 1.0}, r"commonit_weights: no weight for 'a'"),
    ],
)
def test_weights_name_every_group(weights, problem):
    with pytest.raises(ValueError, match=problem):
        weights_by_id(weights, ["a", "b"], np.array([0, 1, 1]))
