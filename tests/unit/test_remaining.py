"""I2, I4: an epoch that starts with one plan and ends with others trains each sample once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.plan import plan_epoch, plan_remaining


@st.composite
def settings_of_a_run(draw, rows):
    """Draw arguments of `plan_epoch` for this many rows: groups, geometry, purity, lengths and seed."""
    geometry = {"micro_batch_size": draw(st.integers(1, 4)), "world_size": draw(st.integers(1, 3))}
    geometry["accumulation_steps"] = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    group_ids = rng.integers(0, draw(st.integers(1, 6)), rows)
    lengths = rng.integers(1, 50, rows) if draw(st.booleans()) else None
    purity, seed = draw(st.sampled_from(["step", "micro"])), draw(st.integers(0, 9))
    return {"group_ids": group_ids, "lengths": lengths, "purity": purity, "seed": seed, **geometry}


def steps_of(plan):
    """Return lists of the row numbers of each optimizer step, all ranks together."""
    ranks = [list(plan.batches(rank)) for rank in range(plan.world_size)]
    assert all(len(batches) == plan.num_micro_steps for batches in ranks)
    starts = range(0, plan.num_micro_steps, plan.accumulation_steps)
    return [
        [row for rank in ranks for batch in rank[start : start + plan.accumulation_steps] for row in batch]
        for start in starts
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_i2_each_sample_is_trained_once_however_often_settings_change(data):
    """Three runs share an epoch: each one trains the samples that remain of the run before.

    Repeats only fill partitions: in each group, fewer than a step has micro-batches.
    """
    rows, epoch = data.draw(st.integers(9, 120)), data.draw(st.integers(0, 3))
    plan, remaining = None, np.arange(rows)
    for _ in range(3):
        run = data.draw(settings_of_a_run(rows))
        whole = plan_epoch(**run, epoch=epoch)
        plan = (
            whole if plan is None else plan_remaining(whole, remaining, pure_samples=0, seed=run["seed"], epoch=epoch)
        )
        assert (plan.num_micro_steps, plan.num_steps) == (whole.num_micro_steps, whole.num_steps)
        steps, first = steps_of(plan), plan.first_step
        assert not any(steps[:first]) and all(steps[first:])
        trained = Counter(row for step in steps for row in step)
        assert set(trained) == set(remaining.tolist())
        repeats = Counter(run["group_ids"][row] for row in trained.elements())
        repeats.subtract(run["group_ids"][row] for row in remaining)
        micro_batches = run["world_size"] * run["accumulation_steps"]
        if run["purity"] == "step":
            assert all(0 <= count < micro_batches for count in repeats.values())
            assert all(len({run["group_ids"][row] for row in step}) == 1 for step in steps[first:])
        for rank in range(plan.world_size):  # as the sampler of a resumed run reads it
            done = first * plan.accumulation_steps
            batches = list(plan.batches(rank))
            assert list(plan.batches(rank, done)) == batches[done:]
            assert not any(batches[:done]) and all(batches[done:])

        stop = data.draw(st.integers(first, plan.num_steps - 1))
        seen = {row for step in steps[:stop] for row in step}
        before, remaining = set(remaining.tolist()), plan.remaining(stop)
        after = set(remaining.tolist())
        assert len(after) == len(remaining)
        assert after | seen == before
        assert len(after & seen) <= sum(repeats.values())  # they filled a partition before their own turn
        if not len(remaining):
            return


def test_rows_that_drop_leaves_out_do_not_remain():
    ids = np.repeat([0, 1], [11, 7])
    plan = plan_epoch(ids, micro_batch_size=2, accumulation_steps=2, remainder="drop")
    steps = steps_of(plan)
    for done in range(plan.num_steps):
        remaining = plan.remaining(done).tolist()
        assert len(set(remaining)) == len(remaining)
        assert set(remaining) == {row for step in steps[done:] for row in step}
    assert len(plan.remaining(0)) == 8 + 4


def test_samples_of_two_partitions_remain_until_one_of_them_is_trained():
    """Seven samples in two steps of six micro-batches: 0 to 5, and 4 to 9, of which 7 to 9 are repeats."""
    found = set()
    for seed in range(10):
        plan = plan_epoch(np.zeros(7, int), micro_batch_size=1, world_size=2, accumulation_steps=3, seed=seed)
        found.add((int(plan.partition_starts[0]), len(plan.remaining(1))))
    assert found == {(0, 1), (4, 4)}


def test_with_weights_a_row_remains_as_often_as_its_quota_repeats_it():
    ids = np.repeat([0, 1], [4, 12])
    plan = plan_epoch(ids, micro_batch_size=2, weights={0: 3, 1: 1})
    quota = Counter(plan.remaining(0).tolist())
    assert Counter(ids[[*quota.elements()]].tolist()) == {0: 12, 1: 4}
    assert set(quota.values()) == {1, 3}
    done = 3
    seen = Counter(row for step in steps_of(plan)[:done] for row in step)
    remaining = plan.remaining(done)
    assert Counter(remaining.tolist()) + seen == quota
    replanned = plan_remaining(plan, remaining, pure_samples=0, seed=1, epoch=0)
    assert Counter(row for step in steps_of(replanned) for row in step) == Counter(remaining.tolist())


def test_more_steps_than_a_complete_epoch_are_an_error():
    ids = np.arange(12) % 4
    whole = plan_epoch(ids, micro_batch_size=3)
    few = plan_epoch(ids, micro_batch_size=12, weights={0: 1, 1: 0, 2: 0, 3: 0})
    with pytest.raises(ValueError) as caught:
        plan_remaining(few, whole.remaining(0), pure_samples=0, seed=0, epoch=2)
    message = str(caught.value)
    assert all(part in message for part in ("commonit_resume='replan'", "12 remaining", "epoch 2", "larger batches"))
    assert "\n" not in message


def test_remaining_samples_are_read_and_saved_in_parts(monkeypatch):
    """Chunks in which all steps are done hold nothing to balance; a remaining row takes four bytes."""
    whole = plan_epoch(np.arange(40) % 3, np.arange(40), micro_batch_size=2, world_size=2, seed=1)
    remaining = whole.remaining(4)
    assert remaining.dtype.itemsize == 4
    plan = plan_remaining(whole, remaining, pure_samples=0, seed=1, epoch=0)
    at_once = steps_of(plan)
    assert not any(at_once[:2]) and sorted(row for step in at_once for row in set(step)) == remaining.tolist()
    monkeypatch.setattr("commonit_trl.plan.epoch.CHUNK", 1)
    assert steps_of(plan) == at_once


def test_i3_ranks_plan_the_same_remaining_epoch():
    group_ids = np.arange(400) % 3
    whole = plan_epoch(group_ids, micro_batch_size=2, world_size=2, seed=1)
    first, again, *others = (
        plan_remaining(whole, np.arange(100, 400), pure_samples=0, seed=seed, epoch=epoch).fingerprint()
        for seed, epoch in [(1, 2), (1, 2), (2, 2), (1, 3)]
    )
    assert first == again
    assert len({first, *others}) == 3
