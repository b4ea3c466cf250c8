"""The torch batch sampler over epoch plans, and the dataloader that carries the epoch to it."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from commonit_trl.plan import EpochPlan


class CommonITBatchSampler(BatchSampler):
    """Yields the micro-batches of one rank, as the epoch's plan has them.

    It is rank-aware: rank r of W yields `plan.micro_batch(m, r)` for m = 0, 1, ..., so it must not be sharded again (by
    accelerate's `prepare`, say). All ranks yield `len(self)` micro-batches, in every epoch; together they yield all
    samples that the plan holds, and no other.

    Args:
        plan: a function from `epoch=` to the plan of that epoch; the same on every rank.
        rank: data-parallel rank.
    """

    def __init__(self, plan: Callable[..., EpochPlan], rank: int = 0) -> None:
        self.plan = plan
        self.rank = rank
        self.current = plan(epoch=0)
        self.epoch = 0
        self.skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the next iteration's micro-batches from the plan of `epoch`."""
        if epoch != self.epoch:
            self.epoch, self.current, self.skipped = epoch, self.plan(epoch=epoch), 0

    def skip_first(self, count: int) -> None:
        """Do not work out the first `count` micro-batches of the next iteration in this epoch; yield empty lists for
        them. For a resumed run: the wrapper of `accelerate.skip_first_batches` asks for them and throws them away."""
        self.skipped = count

    def __iter__(self) -> Iterator[list[int]]:
        skipped, self.skipped = self.skipped, 0
        return itertools.chain(itertools.repeat([], skipped), self.current.batches(self.rank, skipped))

    def __len__(self) -> int:
        return self.current.num_micro_steps


class CommonITDataLoader(DataLoader):
    """A dataloader over a `CommonITBatchSampler`, with the `set_epoch` that `transformers.Trainer` calls each epoch.

    The seeds of its workers come from a generator of its own. A plain DataLoader draws them from torch's global one,
    less often when workers persist, so that a resumed run would go on with other dropout masks than the run it
    continues.
    """

    def __init__(self, dataset: Any, batch_sampler: CommonITBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, generator=torch.Generator(), **options)
        self.commonit_sampler = batch_sampler
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.commonit_sampler.set_epoch(epoch)
        self.generator.manual_seed(epoch)
