"""`Run`: the state that CommonIT adds to a trainer, in one value."""

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import Trainer

from commonit_trl.grouping.fit import Grouping
from commonit_trl.plan import EpochPlan, PlanSpec
from commonit_trl.rows import Rows
from commonit_trl.trainer.evaluation import RowLosses
from commonit_trl.trainer.metrics import GroupMetrics, TokenCounts


@dataclass(kw_only=True, eq=False)
class Run:
    """Groups, plan and metrics of one trainer."""

    grouping: Grouping
    spec: PlanSpec
    dataset: Dataset
    """The training set that was grouped, or packed group by group."""
    row_groups: NDArray[np.integer[Any]]
    """(rows of `dataset`,) group id of each."""
    rank: int
    summed_over_tokens: bool
    """Whether the loss is a sum over rows divided by the step's token count (`trainer/loss.py`)."""
    epoch: int = 0
    micro_step: int = 0
    """Micro-steps of the current optimizer step that are done."""
    first_step: int | None = None
    """Where the Trainer resumes, if not at the checkpoint's own step."""
    replanned: int = 0
    """How often the rest of an epoch was planned with other settings."""
    evaluated: tuple[Any, Any] = (None, None)
    """An evaluation dataloader and its rows."""
    eval_groups: Any = field(default_factory=weakref.WeakKeyDictionary)
    """Evaluation set -> (rows,) group ids, or None where they cannot be assigned."""
    row_losses: RowLosses | None = None
    """Of the evaluation that is under way."""

    @functools.cached_property
    def metrics(self) -> GroupMetrics:
        return GroupMetrics(self.grouping.names)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of `epoch`."""
        return self.spec.plan(epoch)

    def restart(self) -> None:
        """Forget the progress of an earlier `train`."""
        self.spec, self.epoch, self.micro_step = self.spec.whole, 0, 0
        self.first_step, self.replanned = None, 0

    def start_epoch(self, global_step: int) -> tuple[int, int]:
        """Set the epoch that optimizer step `global_step` is in.

        Returns:
            The epoch, and how many of its steps are done.
        """
        self.epoch, done = divmod(global_step, self.plan(self.epoch).num_steps)
        if self.spec.resumed_epoch is not None and self.spec.resumed_epoch < self.epoch:
            self.spec = self.spec.whole  # complete: later checkpoints need not hold its remaining rows
        return self.epoch, done

    def add_micro_batch(
        self, trainer: Any, loss: torch.Tensor, items: Any, tokens: TokenCounts | None, samples: torch.Tensor
    ) -> None:
        """Add what `training_step` returned for the next micro-batch to the metrics of its group.

        Args:
            items: `num_items_in_batch`, the step's trained tokens.
            tokens, samples: of the micro-batch.
        """
        plan = self.plan(self.epoch)
        micro_step = trainer.state.global_step % plan.num_steps * plan.accumulation_steps + self.micro_step
        self.micro_step += 1
        weight = (samples if tokens is None else tokens.trained).to(loss.device)
        if self.summed_over_tokens and items is not None:
            ranks = self.spec.world_size if trainer.args.average_tokens_across_devices else 1
            total = loss.detach() * torch.as_tensor(items).flatten()[0] / ranks  # nn.DataParallel has one per device
        else:
            total = loss.detach() * weight * _divided_by(trainer, items)
        group = int(plan.micro_batch_groups[micro_step, self.rank])
        self.metrics.add_micro_batch(group, total, weight, tokens)

    def add_step(self, global_step: int, grad_norm: Any) -> None:
        """Add the gradient norm of an optimizer step to the metrics of its group."""
        self.metrics.add_step(self.plan(self.epoch).group_of(global_step), grad_norm)

    def check_dataset(self, dataset: Any) -> None:
        """Refuse a training set that is not the one that was grouped.

        Raises:
            ValueError: when `train_dataset` was replaced.
        """
        if dataset is not self.dataset and getattr(dataset, "_fingerprint", None) != self.dataset._fingerprint:
            raise ValueError(
                f"train_dataset ({len(dataset)} rows) is not the dataset that was grouped ({len(self.dataset)} rows): "
                "give the dataset at construction and do not replace it."
            )


def row_costs(dataset: Dataset, data_collator: Any) -> NDArray[np.int64] | None:
    """Return the (rows,) tokens that each row costs; None for rows that are not tokenised.

    Args:
        data_collator: one that pads to a multiple of tokens makes rows longer.
    """
    rows = Rows(dataset)
    if not rows.tokenized:
        return None
    multiple = getattr(data_collator, "pad_to_multiple_of", None) or 1
    return -(-rows.token_counts("total") // multiple) * multiple


def _divided_by(trainer: Any, items: Any) -> int:
    """What `Trainer.training_step` has divided a mean loss by."""
    # transformers from 5.23 on reads this flag
    scaled = trainer.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return 1 if scaled else trainer.current_gradient_accumulation_steps
