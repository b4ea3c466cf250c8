"""An epoch that is begun with one plan and ended with others trains each sample once, whatever changed in between."""

import inspect
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from commonit_trl.plan import plan_epoch, plan_rest
from commonit_trl.trainer.checkpoint import first_step, last_checkpoint


@st.composite
def settings_of_a_run(draw, rows):
    """Arguments of `plan_epoch` for the same number of rows: other groups, geometry, purity, lengths and seed."""
    geometry = {"micro_batch_size": draw(st.integers(1, 4)), "world_size": draw(st.integers(1, 3))}
    geometry["accumulation_steps"] = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    group_ids = rng.integers(0, draw(st.integers(1, 6)), rows)
    lengths = rng.integers(1, 50, rows) if draw(st.booleans()) else None
    purity, seed = draw(st.sampled_from(["step", "micro"])), draw(st.integers(0, 9))
    return {"group_ids": group_ids, "lengths": lengths, "purity": purity, "seed": seed, **geometry}


def steps_of(plan):
    """The row numbers of each optimizer step, all ranks together."""
    ranks = [list(plan.batches(rank)) for rank in range(plan.world_size)]
    assert all(len(batches) == plan.num_micro_steps for batches in ranks)
    taken = range(0, plan.num_micro_steps, plan.accumulation_steps)
    return [
        [row for rank in ranks for batch in rank[start : start + plan.accumulation_steps] for row in batch]
        for start in taken
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_each_sample_is_trained_once_however_often_settings_change(data):
    """Three runs share an epoch. What one has left is what the next one trains, and repeats are only those that fill a
    unit, fewer than a step has micro-batches, in each group."""
    rows, epoch = data.draw(st.integers(9, 120)), data.draw(st.integers(0, 3))
    plan, left = None, np.arange(rows)
    for _ in range(3):
        run = data.draw(settings_of_a_run(rows))
        whole = plan_epoch(**run, epoch=epoch)
        rest = whole if plan is None else plan_rest(whole, left, seed=run["seed"], epoch=epoch)
        assert (rest.num_micro_steps, rest.num_steps) == (whole.num_micro_steps, whole.num_steps)
        steps, first = steps_of(rest), first_step(rest)
        assert not any(steps[:first]) and all(steps[first:])
        trained = Counter(row for step in steps for row in step)
        assert set(trained) == set(left.tolist())
        in_group = Counter(run["group_ids"][row] for row in left)
        repeats = Counter(run["group_ids"][row] for row in trained.elements())
        repeats.subtract(in_group)
        micro_batches = run["world_size"] * run["accumulation_steps"]
        if run["purity"] == "step":
            assert all(0 <= count < micro_batches for count in repeats.values())
            assert all(len({run["group_ids"][row] for row in step}) == 1 for step in steps[first:])
        for rank in range(rest.world_size):  # as the sampler of a resumed run reads it
            done = first * rest.accumulation_steps
            batches = list(rest.batches(rank))
            assert list(rest.batches(rank, done)) == batches[done:]
            assert not any(batches[:done]) and all(batches[done:])

        stop = data.draw(st.integers(first, rest.num_steps - 1))
        seen = {row for step in steps[:stop] for row in step}
        plan, left_now = rest, rest.left(stop)
        assert len(set(left_now.tolist())) == len(left_now)
        assert set(left_now.tolist()) | seen == set(left.tolist())
        again = set(left_now.tolist()) & seen  # drawn to fill a unit, and still owed
        assert len(again) <= sum(repeats.values())
        left = left_now
        if not len(left):
            return


def test_rows_that_drop_leaves_out_do_not_remain():
    ids = np.repeat([0, 1], [11, 7])
    plan = plan_epoch(ids, micro_batch_size=2, accumulation_steps=2, remainder="drop")
    steps = steps_of(plan)
    for done in range(plan.num_steps):
        left, ahead = plan.left(done), {row for step in steps[done:] for row in step}
        seen = {row for step in steps[:done] for row in step}
        assert len(set(left)) == len(left) and ahead - seen <= set(left) <= ahead
    assert len(plan.left(0)) == 8 + 4


def test_what_two_units_share_is_owed_until_one_of_them_is_done():
    """Seven samples in two steps of six micro-batches: draws 0 to 5, and 4 to 9, of which 7 to 9 only fill."""
    left_after = set()
    for seed in range(10):
        plan = plan_epoch(np.zeros(7, int), micro_batch_size=1, world_size=2, accumulation_steps=3, seed=seed)
        left_after.add((int(plan.unit_starts[0]), len(plan.left(1))))
    assert left_after == {(0, 1), (4, 4)}


def test_with_weights_a_row_is_owed_as_often_as_it_is_drawn():
    ids = np.repeat([0, 1], [4, 12])
    plan = plan_epoch(ids, micro_batch_size=2, weights={0: 3, 1: 1})
    assert Counter(ids[plan.left(0)].tolist()) == {0: 12, 1: 4}
    assert set(Counter(plan.left(0).tolist()).values()) == {1, 3}
    done = 3
    seen = Counter(row for step in steps_of(plan)[:done] for row in step)
    assert Counter(plan.left(done).tolist()) + seen == Counter(plan.left(0).tolist())
    rest = plan_rest(plan, plan.left(done), seed=1, epoch=0)
    assert Counter(row for step in steps_of(rest) for row in step) == Counter(plan.left(done).tolist())


def test_a_rest_of_more_steps_than_an_epoch_is_refused():
    ids = np.arange(12) % 4
    whole = plan_epoch(ids, micro_batch_size=3)
    few = plan_epoch(ids, micro_batch_size=12, weights={0: 1, 1: 0, 2: 0, 3: 0})
    with pytest.raises(ValueError) as caught:
        plan_rest(few, whole.left(0), seed=0, epoch=2)
    assert str(caught.value) == (
        "The rest of epoch 2 (12 samples) takes more steps than the 1 of a whole epoch with the new settings: resume "
        "with larger batches, or with commonit_remainder='keep' and commonit_weights='proportional'."
    )


def test_a_rest_is_read_and_saved_a_part_at_a_time(monkeypatch):
    """Stretches in which all steps are done hold nothing to arrange; a row left takes four bytes."""
    whole = plan_epoch(np.arange(40) % 3, np.arange(40), micro_batch_size=2, world_size=2, seed=1)
    left = whole.left(4)
    assert left.dtype.itemsize == 4
    rest = plan_rest(whole, left, seed=1, epoch=0)
    at_once = steps_of(rest)
    assert not any(at_once[:2]) and sorted(row for step in at_once for row in set(step)) == left.tolist()
    monkeypatch.setattr("commonit_trl.plan.epoch._SAMPLES_AT_ONCE", 1)
    assert steps_of(rest) == at_once


def test_no_checkpoint_to_go_on_from(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_init_training_state_says_where_the_trainer_goes_on():
    """`CommonITMixin` overrides it. With other arguments a resume with other settings fails; where the Trainer went on
    from something else than what it returns, such a resume would repeat samples: tests/integration/faults see that."""
    names = list(inspect.signature(Trainer._init_training_state).parameters)
    assert names[:3] == ["self", "max_steps", "num_update_steps_per_epoch"]
