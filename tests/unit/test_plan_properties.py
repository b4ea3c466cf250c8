"""The invariants of an epoch plan at sizes of real data: up to 10^5 rows in up to 10^4 groups, all options at once.

test_plan.py looks at small plans sample by sample. Here everything is counted with numpy, from what the ranks read and
from the arguments alone. COMMONIT_PLAN_EXAMPLES says how many times as many examples to try; `make fuzz` sets it.
"""

import hashlib
import math
import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from commonit_trl.plan import plan_epoch, plan_rest

MOST_ROWS, MOST_GROUPS = 100_000, 10_000
TIMES = int(os.environ.get("COMMONIT_PLAN_EXAMPLES", "1"))


@st.composite
def cases(draw, most_rows, most_groups):
    """Arguments of `plan_epoch`. Only sizes and choices are drawn; rows come from a generator, which is cheap."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    geometry = {
        "micro_batch_size": draw(st.integers(1, 16)),
        "world_size": draw(st.integers(1, 8)),
        "accumulation_steps": draw(st.integers(1, 8)),
    }
    rows = draw(st.integers(max(2, math.prod(geometry.values())), most_rows))
    groups = draw(st.integers(1, min(rows, most_groups)))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))  # equal sizes, or a few large groups and many crumbs
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
        "seed": draw(st.integers(0, 2**63)),
        "epoch": draw(st.integers(0, 1000)),
    }
    lengths = rng.integers(1, 2000, rows) if draw(st.booleans()) else None
    return group_ids, lengths, geometry, options


def shares_of(sizes, weights):
    """(groups,) samples that each group owes the epoch, as a fraction."""
    if weights == "proportional":
        return sizes.astype(float)
    if isinstance(weights, str):
        shares = {"uniform": (sizes > 0) * 1.0, "sqrt": np.sqrt(sizes)}[weights]
    else:
        shares = np.array([weights.get(group, 0) for group in range(len(sizes))], dtype=float)
    return shares / shares.sum() * sizes.sum()


def check(case, data):
    group_ids, lengths, geometry, options = case
    try:
        plan = plan_epoch(group_ids, lengths, **geometry, **options)
    except ValueError as error:
        assert options["remainder"] == "drop" and "remainder='drop' leaves no step" in str(error)
        assume(False)
    size, world, accumulation = geometry.values()
    ranks = [list(plan.batches(rank)) for rank in range(world)]

    # I5: every rank reads as many micro-batches as the plan says, and none is empty.
    assert {len(batches) for batches in ranks} == {plan.num_micro_steps}
    counts = np.array([[len(batch) for batch in batches] for batches in ranks])
    assert counts.min() >= 1
    assert plan.num_steps == math.ceil(plan.num_micro_steps / accumulation)

    # I1: (micro-steps, ranks) lowest and highest group; the two are one wherever the purity says so.
    rows = np.concatenate([np.concatenate(batches) for batches in ranks])
    starts = np.cumsum(counts) - counts.ravel()
    lowest, highest = (
        extreme.reduceat(group_ids[rows], starts).reshape(world, -1).T for extreme in (np.minimum, np.maximum)
    )
    if options["purity"] == "step":
        lowest, highest = (one.reshape(-1, accumulation * world) for one in (lowest, highest))
    if options["purity"] == "micro":
        lowest, highest = (one.reshape(-1, 1) for one in (lowest, highest))
    assert (lowest.min(axis=1) == highest.max(axis=1)).all()
    unit_groups = lowest[:, 0]

    # I2: what each group gives the epoch, in units of what capacity.
    per_unit = {"micro": 1, "step": world * accumulation}[options["purity"]]
    capacity = per_unit * size
    by_step = counts.T.reshape(-1, accumulation * world) if options["purity"] == "step" else counts.T
    unit_sizes = by_step.sum(axis=1) if options["purity"] != "micro" else counts.T.ravel()
    sizes = np.bincount(group_ids)
    owed = shares_of(sizes, options["weights"])
    given_by = np.bincount(group_ids[rows], minlength=len(sizes))
    units = np.bincount(unit_groups, minlength=len(sizes))
    assert unit_sizes.max() <= capacity
    assert given_by[owed == 0].sum() == 0
    assert (owed[given_by > 0] > 0).all()
    # Cut once more, or less, where the units of one micro-batch are made a multiple of the ranks.
    slack = world - 1 if options["purity"] == "micro" else 0
    if options["remainder"] == "keep":
        least, most = np.ceil(np.floor(owed) / capacity), np.ceil(np.ceil(owed) / capacity)
        assert (units >= least).all() and (units <= most + slack).all() and units.sum() <= most.sum() + slack
        assert (given_by >= np.floor(owed - 1e-6)).all()
        repeats = given_by - np.ceil(owed + 1e-6)
        assert (repeats < np.where(units > 0, per_unit + slack, 1)).all()
        largest, smallest = np.zeros_like(sizes), np.full_like(sizes, capacity + 1)
        np.maximum.at(largest, unit_groups, unit_sizes)
        np.minimum.at(smallest, unit_groups, unit_sizes)
        assert (largest - smallest <= 1).all()
        if options["weights"] == "proportional":
            assert len(np.unique(rows)) == len(group_ids)
    else:
        assert (unit_sizes == capacity).all()
        assert (given_by == units * capacity).all()
        if options["remainder"] == "drop":
            assert (given_by <= np.ceil(owed + 1e-6)).all()
        else:
            assert (given_by >= np.floor(owed - 1e-6)).all()
    # A group trains its rows in turn: none a second time before each had its first, but for those that fill a unit.
    times = np.bincount(rows, minlength=len(group_ids))
    fewest, most = np.full_like(sizes, len(rows)), np.zeros_like(sizes)
    np.minimum.at(fewest, group_ids, times)
    np.maximum.at(most, group_ids, times)
    fill = np.maximum(given_by - np.floor(owed + 1e-6), 0) if options["remainder"] == "keep" else 0
    assert ((most - fewest <= 1 + fill) | (sizes == 0)).all()
    summary = plan.summary()
    assert summary.lost == (times == 0).sum() and summary.repeated == np.maximum(times - 1, 0).sum()
    assert (summary.group_samples == sizes).all() and summary.num_samples == len(group_ids)
    assert summary.vanilla_steps == math.ceil(len(group_ids) / (size * world * accumulation))
    assert summary.num_steps == plan.num_steps and summary.num_groups == (sizes > 0).sum()

    # I3, I4: made again it is the same, and a rank that begins anywhere reads the tail of what it would have read.
    again = plan_epoch(group_ids.astype(np.int32), lengths, **geometry, **options)
    assert again.digest() == plan.digest()
    for _ in range(3):
        rank, start = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, plan.num_micro_steps))
        assert list(again.batches(rank, start)) == ranks[rank][start:]
    assert plan_epoch(group_ids, lengths, **geometry, **options | {"epoch": 1001}).num_micro_steps == len(ranks[0])


@settings(max_examples=200 * TIMES, deadline=None)
@given(case=cases(3_000, 100), data=st.data())
def test_invariants(case, data):
    check(case, data)


@settings(max_examples=20 * TIMES, deadline=None)
@given(case=cases(MOST_ROWS, MOST_GROUPS), data=st.data())
def test_invariants_at_the_size_of_real_data(case, data):
    check(case, data)


@pytest.mark.parametrize("purity", ["step", "micro"])
@pytest.mark.parametrize("weights", ["proportional", "uniform"])
def test_the_most_rows_in_the_most_groups(purity, weights):
    """The corner that random sizes rarely meet."""
    rng = np.random.default_rng(0)
    group_ids = np.concatenate([np.arange(MOST_GROUPS), rng.integers(0, MOST_GROUPS, MOST_ROWS - MOST_GROUPS)])
    geometry = {"micro_batch_size": 2, "world_size": 2}
    plan = plan_epoch(group_ids, rng.integers(1, 500, MOST_ROWS), **geometry, purity=purity, weights=weights)
    rows = np.concatenate([np.concatenate(list(plan.batches(rank))) for rank in range(2)])
    drawn = np.bincount(group_ids[rows], minlength=MOST_GROUPS)
    if weights == "proportional":
        assert len(np.unique(rows)) == MOST_ROWS
    else:
        assert drawn.min() >= MOST_ROWS // MOST_GROUPS
        assert drawn.max() <= MOST_ROWS // MOST_GROUPS + 4


@pytest.mark.parametrize(("purity", "digest"), [("step", "ecb98a6625703e36"), ("micro", "9ff08938fec0d11a")])
def test_a_known_plan_stays_row_for_row(purity, digest):
    """I4 across versions and machines, arranged by length: the digest of a plan does not see how units are cut."""
    rows = np.arange(5_000)
    plan = plan_epoch(
        rows * rows % 7,
        rows * rows * 31 % 997 + 1,
        micro_batch_size=6,
        world_size=3,
        accumulation_steps=2,
        purity=purity,
        weights="sqrt",
        seed=1,
    )
    read = [list(plan.batches(rank)) for rank in range(3)]
    assert hashlib.blake2b(repr(read).encode(), digest_size=8).hexdigest() == digest


def test_a_rest_is_the_same_when_it_is_made_again():
    """I3, I4: the ranks plan the rest of an epoch each for itself."""
    group_ids = np.arange(400) % 3
    whole = plan_epoch(group_ids, micro_batch_size=2, world_size=2, seed=1)
    rests = [plan_rest(whole, np.arange(100, 400), seed=seed, epoch=epoch) for seed, epoch in [(1, 2)] * 2 + [(2, 2)]]
    rests.append(plan_rest(whole, np.arange(100, 400), seed=1, epoch=3))
    assert rests[0].digest() == rests[1].digest()
    assert len({rest.digest() for rest in rests}) == 3
