"""The batch sampler and its dataloader yield the plan: lengths, ranks, epochs, resume, pickling, workers."""

import functools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import SkipBatchSampler

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


@pytest.mark.parametrize("options", [{}, {"remainder": "drop"}, {"purity": "micro"}], ids=str)
@pytest.mark.parametrize(("world_size", "accumulation"), GEOMETRIES)
def test_each_rank_yields_its_batches_of_the_plan(world_size, accumulation, options):
    """I4, I5: in every epoch, also going back; `len()` is the number of yielded batches, before and after."""
    lengths = set()
    for epoch in (0, 1, 1, 0):
        plan = plan_of(epoch, world_size=world_size, accumulation_steps=accumulation, **options)
        for rank, sampler in enumerate(samplers(world_size, accumulation, **options)):
            sampler.set_epoch(2)
            sampler.set_epoch(epoch)
            lengths.add(len(sampler))
            assert list(sampler) == list(plan.batches(rank))
            assert len(sampler) == plan.num_micro_steps == len(list(sampler))
    assert len(lengths) == 1


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


def worker_seed(batch):
    return torch.initial_seed()


def test_worker_seeds_depend_on_the_epoch_alone():
    """I4: a resumed run has the seeds of an uninterrupted one, whatever its process drew before."""
    seeds = []
    for epochs in ((0, 1), (1,)):
        (sampler,) = samplers(1, 3)
        loader = CommonITDataLoader(range(len(GROUP_IDS)), sampler, collate_fn=worker_seed, num_workers=1)
        for epoch in epochs:
            loader.set_epoch(epoch)
            seeds.append(set(loader))
    assert seeds[0] != seeds[1] == seeds[2]


def test_defaults_and_pickling():
    """Rank and epoch are 0 by default; an unpickled loader yields the same batches, in this and later epochs."""
    sampler = CommonITBatchSampler(functools.partial(plan_of, world_size=2, accumulation_steps=2))
    loader = CommonITDataLoader(range(len(GROUP_IDS)), sampler, collate_fn=list)
    assert list(loader) == list(plan_of(0, world_size=2, accumulation_steps=2).batches(0))
    loader.set_epoch(1)
    copy = pickle.loads(pickle.dumps(loader))
    assert list(copy) == list(loader)
    for one in (copy, loader):
        one.set_epoch(5)
    assert list(copy) == list(loader)


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
