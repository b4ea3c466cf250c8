"""Plan one epoch: order, memory, weights and errors. test_plan_properties.py checks the invariants on random epochs."""

import collections
import hashlib
import tracemalloc

import numpy as np
import pytest

from commonit_trl.plan import plan_epoch


def test_i4_known_plans_stay():
    """I3, I4: every process, machine and version plans the same, so a checkpoint of today resumes tomorrow."""
    plan = plan_epoch(np.arange(11) % 2, micro_batch_size=2, world_size=2, seed=3, epoch=1)
    assert list(plan.batches(0)) == [[1, 9], [8, 10], [2, 4], [3]]
    assert list(plan.batches(1)) == [[7], [6], [0], [5]]
    assert plan.fingerprint() == "116589a82b987d6167e3a7f2671881ee"
    balanced = plan_epoch(np.arange(20) % 2, np.arange(20) * 7 % 31, micro_batch_size=3, world_size=2, seed=3)
    assert balanced.fingerprint() == "45c92271acaa1f8a047f04931336c1ce"


@pytest.mark.parametrize(("purity", "expected"), [("step", "6414dd8760c0cb15"), ("micro", "9ff08938fec0d11a")])
def test_i4_known_batches_stay(purity, expected):
    """I4 with steps balanced by length: a fingerprint does not cover the cut into micro-batches."""
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
    assert hashlib.blake2b(repr(read).encode(), digest_size=8).hexdigest() == expected


def test_seed_and_epoch_are_0_by_default():
    ids = np.arange(50) % 3
    default, zeros = plan_epoch(ids, micro_batch_size=2), plan_epoch(ids, micro_batch_size=2, seed=0, epoch=0)
    assert default.fingerprint() == zeros.fingerprint()


@pytest.mark.parametrize("lengths", [None, np.arange(900) * 7 % 331], ids=["equal sizes", "balanced"])
def test_i4_the_chunk_size_does_not_change_the_plan(lengths, monkeypatch):
    plans = []
    for samples in (1, 50, 1 << 16):
        for module in ("compose", "epoch"):
            monkeypatch.setattr(f"commonit_trl.plan.{module}.CHUNK", samples)
        plan = plan_epoch(np.arange(900) % 7, lengths, micro_batch_size=3, world_size=2, accumulation_steps=2)
        plans.append((plan.fingerprint(), plan.indices.tolist(), list(plan.batches(0)), list(plan.batches(1, 21))))
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("lengths", [None, np.arange(400_000) % 997], ids=["equal sizes", "balanced"])
def test_memory(lengths):
    """Building a plan and reading all its batches takes at most 16 bytes per row besides the arguments."""
    group_ids = np.arange(400_000) % 64
    tracemalloc.start()
    try:
        plan = plan_epoch(group_ids, lengths, micro_batch_size=8, world_size=8, accumulation_steps=4)
        collections.deque(plan.batches(3), maxlen=0)
        assert tracemalloc.get_traced_memory()[1] <= 16 * len(group_ids)
    finally:
        tracemalloc.stop()


def test_equal_lengths_share_micro_batches_evenly():
    """With equal lengths, micro-batches have equal sizes: no other cut is cheaper."""
    plan = plan_epoch(np.zeros(64, int), np.full(64, 7), micro_batch_size=4, world_size=4, accumulation_steps=4)
    assert set(np.diff(plan.offsets)) == {4}


def test_epochs_leave_out_different_samples():
    """A group with a quota below its size leaves out other samples in each epoch."""
    group_ids = np.repeat([0, 1], [900, 100])
    seen = [
        set(plan_epoch(group_ids, micro_batch_size=4, weights="uniform", epoch=epoch).indices.tolist())
        for epoch in range(12)
    ]
    assert len(seen[0]) < 700
    assert len(set.union(*seen)) > 990


@pytest.mark.parametrize("sizes, partitions", [((9, 8), [3, 3]), ((3, 5), [2, 2])])
def test_the_group_with_the_fullest_partitions_gets_one_more(sizes, partitions):
    """Purity `micro` on two ranks needs an even number of micro-batches.

    Micro-batches of at most 4: 3 of 3 samples and 2 of 4; of at most 3: 1 of 3 and 2 of 2 or 3.
    """
    plan = plan_epoch(np.repeat([0, 1], sizes), micro_batch_size=max(3, sizes[0] // 2), world_size=2, purity="micro")
    assert np.bincount(plan.partition_groups).tolist() == partitions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"purity": "steps"}, "purity='steps' is not one of step, micro: did you mean 'step'?"),
        ({"remainder": "dorp"}, "did you mean 'drop'?"),
        ({"weights": "unifrom"}, "did you mean 'uniform'?"),
        ({"weights": {0: 1.0}}, "missing [1], without samples []."),
        ({"weights": {0: 1.0, 1: 1.0, 2: 1.0}, "group_ids": [0, 2] * 5}, "missing [], without samples [1]."),
        ({"weights": {0: 1.0, 1: 1.0, 2: 1.0}}, "missing [], without samples [2]."),
        ({"weights": {0: 1.0, 1: -1.0}}, "must be a number >= 0"),
        ({"weights": {0: 0.0, 1: 0.0}}, "gives no group a weight above 0"),
        *(({name: 0}, f"{name}=0 ") for name in ("micro_batch_size", "world_size", "accumulation_steps")),
        ({"accumulation_steps": 1.5}, "accumulation_steps=1.5 must be a whole number >= 1."),
        *(({name: -1}, f"{name}=-1 must be a whole number >= 0.") for name in ("seed", "epoch")),
        ({"accumulation_steps": 11}, "10 samples, fewer than the 11 micro-batches of one step"),
        ({"remainder": "drop", "micro_batch_size": 8}, "remainder='drop' leaves no step: the largest group has 5"),
        ({"group_ids": [0.5] * 10}, "group_ids must be one-dimensional integers >= 0"),
        ({"group_ids": [-1] * 10}, "group_ids must be one-dimensional integers >= 0"),
        ({"group_ids": [[0, 1]] * 10}, "group_ids must be one-dimensional integers >= 0"),
        ({"group_ids": []}, "The dataset has 0 samples"),
        ({"lengths": [3] * 9, "world_size": 2}, "lengths has shape (9,), group_ids (10,)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError) as error:
        plan_epoch(**{"group_ids": np.arange(10) % 2, "micro_batch_size": 2, **change})
    assert message in str(error.value) and "\n" not in str(error.value)
