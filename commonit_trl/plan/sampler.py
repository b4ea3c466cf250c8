"""Yield the micro-batches of epoch plans: the torch batch sampler and its dataloader."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from commonit_trl.plan import EpochPlan


class CommonITBatchSampler(BatchSampler):
    """Yield the micro-batches of one rank.

    It is rank-aware: rank r yields `plan.batches(r)`, so it must not be sharded again, by accelerate's `prepare` for
    example. All ranks yield `len(self)` micro-batches in every epoch; together they yield exactly the samples of the
    plan.

    Args:
        plan: function from `epoch=` to the plan of that epoch, the same on every rank.
        rank: data-parallel rank.
    """

    def __init__(self, plan: Callable[..., EpochPlan], rank: int = 0) -> None:
        self.plan = plan
        self.rank = rank
        self.current = plan(epoch=0)
        self.epoch = 0
        self.skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration yields."""
        if epoch != self.epoch:
            self.epoch, self.current, self.skipped = epoch, self.plan(epoch=epoch), 0

    def skip_first(self, count: int) -> None:
        """Yield empty lists for the first `count` micro-batches of the next iteration in this epoch.

        In a resumed run, the wrapper of `accelerate.skip_first_batches` reads them and discards them.
        """
        self.skipped = count

    def __iter__(self) -> Iterator[list[int]]:
        skipped, self.skipped = self.skipped, 0
        return itertools.chain(itertools.repeat([], skipped), self.current.batches(self.rank, skipped))

    def __len__(self) -> int:
        return self.current.num_micro_steps


class CommonITDataLoader(DataLoader):
    """Load the micro-batches of a `CommonITBatchSampler`; `transformers.Trainer` calls `set_epoch`.

    Worker seeds come from a separate generator. A DataLoader draws them from torch's global generator, less often with
    persistent workers, so a resumed run would have other dropout masks than an uninterrupted one.
    """

    def __init__(self, dataset: Any, batch_sampler: CommonITBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, generator=torch.Generator(), **options)
        self.commonit_sampler = batch_sampler
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, and the seed of the workers."""
        self.commonit_sampler.set_epoch(epoch)
        self.generator.manual_seed(epoch)
