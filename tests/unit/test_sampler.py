"""The batch sampler and its dataloader yield the plan: lengths, ranks, epochs, resume, pickling, workers."""

import functools
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import SkipBatchSampler
from torch.utils.data import DataLoader

from commonit_trl import CommonITBatchSampler
from commonit_trl.plan import plan_epoch
from commonit_trl.plan.sampler import CommonITDataLoader
from commonit_trl.trainer.validate import data_parallel_rank

GROUP_IDS = np.repeat([0, 1, 2, 3], [13, 7, 2, 31])
LENGTHS = np.random.default_rng(0).integers(1, 90, len(GROUP_IDS))
GEOMETRIES = [(1, 1), (1, 3), (2, 1), (4, 2)]


def plan_of(epoch, **arguments):
    return plan_epoch(GROUP_IDS, LENGTHS, micro_batch_size=2, seed=5, epoch=epoch, **arguments)


def samplers(world_size, accumulation, **options):
    plan = functools.partial(plan_of, world_size=world_size, accumulation_steps=accumulation, **options)
    return [CommonITBatchSampler(plan, rank) for rank in range(world_size)]


@pytest.mark.parametrize("remainder", ["keep", "drop"])
@pytest.mark.parametrize("purity", ["step", "micro"])
@pytest.mark.parametrize(("world_size", "accumulation"), GEOMETRIES)
def test_length_is_what_each_rank_yields(world_size, accumulation, purity, remainder):
    """I5: `len()` is the number of yielded batches on every rank, in every epoch, before and after iterating."""
    ranks = samplers(world_size, accumulation, purity=purity, remainder=remainder)
    lengths = set()
    for epoch in (0, 1, 2, 0):
        for sampler in ranks:
            sampler.set_epoch(epoch)
            before = len(sampler)
            assert len(list(sampler)) == before == len(sampler)
            lengths.add(before)
    assert len(lengths) == 1


@pytest.mark.parametrize(("world_size", "accumulation"), GEOMETRIES)
def test_ranks_together_cover_the_plan(world_size, accumulation):
    """I2, I3: each rank yields one micro-batch of the plan per micro-step; together they yield all rows."""
    ranks = samplers(world_size, accumulation)
    for epoch in (0, 1):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        plan = plan_of(epoch, world_size=world_size, accumulation_steps=accumulation)
        yielded = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
        assert yielded == [batch.tolist() for batch in np.split(plan.indices, plan.offsets[1:-1])]
        assert set(Counter(row for batch in yielded for row in batch)) == set(range(len(GROUP_IDS)))


def test_epochs():
    """I4: an epoch is the same each time; `set_epoch` changes it, also back."""
    (sampler,) = samplers(1, 2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_iterations_do_not_disturb_each_other():
    """The Trainer and a skip wrapper may hold two iterators of one sampler."""
    (sampler,) = samplers(1, 2)
    whole = list(sampler)
    ahead, behind = iter(sampler), iter(sampler)
    assert [next(ahead) for _ in range(5)] == whole[:5]
    assert list(behind) == whole
    assert list(ahead) == whole[5:]


def test_a_resumed_run_reads_the_remaining_batches():
    """I4: the sampler yields empty lists for batches that a wrapper skips; later epochs are complete."""
    plan = functools.partial(plan_epoch, np.arange(70) % 3, np.arange(70), micro_batch_size=2, world_size=2)
    sampler = CommonITBatchSampler(plan, rank=1)
    whole = list(sampler)
    sampler.skip_first(5)
    assert list(SkipBatchSampler(sampler, skip_batches=5)) == whole[5:]
    assert list(sampler) == whole
    sampler.skip_first(5)
    sampler.set_epoch(0)  # the Trainer sets the same epoch again
    assert list(sampler) == [[]] * 5 + whole[5:]
    sampler.skip_first(5)
    sampler.set_epoch(1)  # another epoch has nothing to skip
    assert list(sampler) == list(plan(epoch=1).batches(1))


@pytest.mark.parametrize("epoch", [0, 2])
def test_pickled(epoch):
    """An unpickled copy yields the same batches, in this epoch and in later ones."""
    sampler = samplers(2, 2)[1]
    sampler.set_epoch(epoch)
    copy = pickle.loads(pickle.dumps(sampler))
    assert list(copy) == list(sampler) and len(copy) == len(sampler)
    for one in (copy, sampler):
        one.set_epoch(5)
    assert list(copy) == list(sampler)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 1, "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
    ids=str,
)
def test_loader(options):
    """I4: the loader yields the sampler's batches in order, with any workers, in every epoch."""
    (sampler,) = samplers(1, 3)
    loader = CommonITDataLoader(range(len(GROUP_IDS)), sampler, collate_fn=list, **options)
    assert len(loader) == len(sampler)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        assert list(loader) == list(plan_of(epoch, world_size=1, accumulation_steps=3).batches(0))


def test_rank_and_epoch_are_0_by_default():
    sampler = CommonITBatchSampler(functools.partial(plan_of, world_size=2, accumulation_steps=2))
    loader = CommonITDataLoader(range(len(GROUP_IDS)), sampler, collate_fn=list)
    assert list(loader) == list(plan_of(0, world_size=2, accumulation_steps=2).batches(0))


def test_loader_pickled():
    (sampler,) = samplers(1, 3)
    loader = CommonITDataLoader(range(len(GROUP_IDS)), sampler, collate_fn=list)
    loader.set_epoch(1)
    assert list(pickle.loads(pickle.dumps(loader))) == list(loader)


def test_plain_dataloader_takes_the_sampler():
    """The sampler is public: any DataLoader takes it as `batch_sampler`."""
    (sampler,) = samplers(1, 1)
    loader = DataLoader(range(len(GROUP_IDS)), batch_sampler=sampler, collate_fn=list)
    assert list(loader) == list(sampler)


@pytest.mark.parametrize(
    ("tensor", "context", "ranks"),
    [(1, 1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, 1, [0, 0, 1, 1, 2, 2, 3, 3]), (2, 2, [0, 0, 0, 0, 1, 1, 1, 1])],
)
def test_tensor_and_context_parallel_ranks_share_batches(tensor, context, ranks):
    """The layout is that of accelerate's `prepare_data_loader`; sequence parallelism is an error."""
    for rank, expected in enumerate(ranks):
        args = SimpleNamespace(world_size=8, process_index=rank)
        trainer = SimpleNamespace(
            args=args, get_tp_size=lambda: tensor, get_cp_size=lambda: context, get_sp_size=lambda: 1
        )
        assert data_parallel_rank(trainer) == (8 // (tensor * context), expected)
    trainer.get_sp_size = lambda: 2
    with pytest.raises(ValueError, match=r"sp_size=2: .*set sp_size to 1"):
        data_parallel_rank(trainer)
