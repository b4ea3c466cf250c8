"""Collectives over the ranks of a run that cannot leave a rank waiting.

An exception on one rank is raised on every rank. Work is split into items, one per rank and round, with a collective
after each round: no rank waits longer than one item takes, so the process-group timeout is never reached.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Self, TypeVar

from datasets.utils import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that group the same rows; one process by default, without torch.distributed."""

    rank: int = 0
    """Index of this process."""
    size: int = 1
    """Number of processes."""

    @classmethod
    def of_run(cls) -> Self:
        """Return the processes that the launcher started, connected by accelerate."""
        if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            atexit.register(_disconnect)
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(rank=state.process_index, size=state.num_processes)

    def gather(self, compute: Callable[[], Result]) -> list[Result]:
        """Return the results of `compute` on all ranks, in rank order.

        Raises:
            Exception: when `compute` fails on any rank; on the other ranks a ValueError where the cause is one, else a
                RuntimeError, with the message of the first failure.
        """
        if self.size == 1:
            return [compute()]
        from accelerate.utils import gather_object

        result, error = None, None
        try:
            result = compute()
        except Exception as caught:
            error = caught
        message = None if error is None else (isinstance(error, ValueError), type(error).__name__, str(error))
        by_rank: list[Any] = gather_object([(result, message)])
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(by_rank):
            if message is not None:
                is_value_error, name, text = message
                raise ValueError(text) if is_value_error else RuntimeError(f"rank {rank}: {name}: {text}")
        return [result for result, _ in by_rank]

    def run(self, compute: Callable[[], Result]) -> Result:
        """Return the result of `compute` on this rank; raise as `gather` does."""
        results: list[Result] = []
        self.gather(lambda: results.append(compute()))
        return results[0]

    def broadcast(self, compute: Callable[[], Result]) -> Result:
        """Return the result of `compute` on rank 0, where alone it runs; raise as `gather` does."""
        result: Any = self.run(lambda: compute() if self.rank == 0 else None)
        if self.size == 1:
            return result
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([result])[0]

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], progress: str | None = None
    ) -> list[Result]:
        """Return the result of `function` for each of `items`, each computed by one rank; raise as `gather` does.

        Args:
            function: applied to every W-th of `items` on each of W ranks.
            items: the same on all ranks.
            progress: title of a progress bar on rank 0; no bar by default.
        """
        results: list[Result] = []
        with tqdm(total=len(items), desc=progress, disable=progress is None or self.rank != 0) as bar:
            for start in range(0, len(items), self.size):
                of_round = items[start : start + self.size]
                mine = of_round[self.rank : self.rank + 1]  # empty where the last round has fewer items than ranks
                results += chain.from_iterable(self.gather(partial(list, map(function, mine))))
                bar.update(len(of_round))
        return results


def _disconnect() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


ALONE = Ranks()
