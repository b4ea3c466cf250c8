"""`Run`: the state that CommonIT adds to a trainer, in one value; `start_run` makes it."""

import functools
import inspect
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import Trainer

from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN
from commonit_trl.grouping.fit import Grouping, data_seed, fit_grouping
from commonit_trl.grouping.tracing import TracedRows
from commonit_trl.plan import EpochPlan, PlanSpec
from commonit_trl.plan.sampler import CommonITBatchSampler, CommonITDataLoader
from commonit_trl.report import epoch_summary
from commonit_trl.rows import Rows
from commonit_trl.trainer import validate
from commonit_trl.trainer.evaluation import EvalSets, RowLosses
from commonit_trl.trainer.loss import has_auxiliary_loss, predicts_next_token
from commonit_trl.trainer.metrics import GroupMetrics, TokenCounts

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_OWN_LOADER_OPTIONS = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator"}


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
    eval_sets: EvalSets
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    epoch: int = 0
    micro_step: int = 0
    """Micro-steps of the current optimizer step that are done."""
    first_step: int | None = None
    """Where the Trainer resumes, if not at the checkpoint's own step."""
    replanned: int = 0
    """How often the rest of an epoch was planned with other settings."""
    row_losses: RowLosses | None = None
    """Of the evaluation that is under way."""
    _of_spec: WeakKeyDictionary[PlanSpec, dict[Any, Any]] = field(default_factory=WeakKeyDictionary)

    @functools.cached_property
    def metrics(self) -> GroupMetrics:
        return GroupMetrics(self.grouping.names)

    def of_spec(self, compute: Callable[["Run"], Value]) -> Value:
        """Return `compute(self)`, computed once for the current spec."""
        values = self._of_spec.setdefault(self.spec, {})
        if compute not in values:
            values[compute] = compute(self)
        return values[compute]

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of `epoch`."""
        return self.spec.plan(epoch)

    def summary(self) -> dict[str, Any]:
        """Return what a complete first epoch trains, leaves out and repeats, as JSON values."""
        return self.of_spec(_summary)

    # --- the samples of the plan: rows, or bins of several rows in a subclass ---------------------------------------

    def fit_spec(self, trainer: Any) -> None:
        """Adapt the spec to the current batch size, which `auto_find_batch_size` changes."""
        if self.spec.micro_batch_size != trainer._train_batch_size:
            self.spec = replace(self.spec, micro_batch_size=trainer._train_batch_size)

    def sampler(self) -> CommonITBatchSampler:
        """Return this rank's batch sampler."""
        return CommonITBatchSampler(self.plan, self.rank)

    @property
    def fingerprint(self) -> str:
        """Hash of the order of samples."""
        return self.spec.fingerprint

    def dataloader(self, trainer: Any, loader: Any) -> CommonITDataLoader:
        """Return `loader`, the parent's, over this rank's micro-batches."""
        self.dataset = trainer.train_dataset  # DPO adds columns as it makes its loader
        self.fit_spec(trainer)
        copied = inspect.signature(DataLoader).parameters.keys() - _OWN_LOADER_OPTIONS
        options = {name: getattr(loader, name) for name in copied}
        return CommonITDataLoader(loader.dataset, self.sampler(), **options)

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

    # --- progress ---------------------------------------------------------------------------------------------------

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
        self, trainer: Any, loss: torch.Tensor, items: Any, weight: torch.Tensor, tokens: TokenCounts | None
    ) -> None:
        """Add what `training_step` returned for the next micro-batch to the metrics of its group.

        Args:
            items: `num_items_in_batch`, the step's trained tokens.
            weight, tokens: of the micro-batch, as `count_micro_batch` returns them.
        """
        plan = self.plan(self.epoch)
        micro_step = trainer.state.global_step % plan.num_steps * plan.accumulation_steps + self.micro_step
        self.micro_step += 1
        weight = weight.to(loss.device)
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


def _summary(run: Run) -> dict[str, Any]:
    return epoch_summary(run.spec.whole.plan(0), run.grouping.names, run.grouping.dropped)


def start_run(trainer: Any) -> Run:
    """Group the training rows of a constructed trainer and plan its run.

    Raises:
        ValueError: when no row can be trained, and when options, settings or groups do not go together.
    """
    args = trainer.args
    if len(trainer.train_dataset) == 0:
        raise ValueError(
            f"max_length={getattr(args, 'max_length', None)}: preparing train_dataset left no row with a token to "
            "train on: raise max_length, or look at the rows."
        )
    grouping, row_groups = trainer.commonit_group()
    world_size, rank = validate.data_parallel_rank(trainer)
    summed = trainer.commonit_loss_is_summed()
    tokens = row_costs(trainer.train_dataset, trainer.data_collator)
    run = trainer.commonit_run_class(
        grouping=grouping,
        spec=PlanSpec.from_options(
            args,
            grouping.names,
            row_groups,
            positions=grouping.grouper.positions(),
            row_counts=np.bincount(grouping.group_ids, minlength=len(grouping.names)),
            tokens=tokens,
            lengths=tokens if _is_balanced(trainer, summed, tokens) else None,
            micro_batch_size=trainer._train_batch_size,
            world_size=world_size,
            accumulation_steps=args.gradient_accumulation_steps,
            # TRL's preference trainers gather values of each sample, which needs as many on every rank.
            equal_sizes=world_size > 1 and not summed,
            seed=data_seed(args),
        ),
        dataset=trainer.train_dataset,
        row_groups=row_groups,
        rank=rank,
        summed_over_tokens=summed,
        eval_sets=EvalSets(trainer, grouping),
    )
    run.fit_spec(trainer)
    run.plan(0)  # refuses too few samples and a remainder='drop' without a step
    if args.metric_for_best_model is not None and trainer.compute_metrics is None:  # which may log any loss
        validate.check_best_metric(args.metric_for_best_model, grouping.names, run.eval_sets.groups())
    return run


def group_rows(trainer: Any) -> tuple[Grouping, NDArray[np.integer[Any]]]:
    """Group the training rows that have a token to train on; remove the others from `train_dataset`."""
    rows = trainer.commonit_rows(trainer.train_dataset)
    traced: tuple[TracedRows, ...] = ()
    trained = rows.is_trained(shifted=predicts_next_token(trainer.model))
    if not trained.all():
        numbers = np.flatnonzero(~trained)
        traced = (TracedRows(reason=NO_TRAINED_TOKEN, numbers=numbers, rows=rows.select(numbers)),)
        trainer.train_dataset = trainer.train_dataset.select(np.flatnonzero(trained))
        rows = trainer.commonit_rows(trainer.train_dataset)
    grouping = fit_grouping(trainer.args, rows, traced)
    return grouping, grouping.group_ids


def _is_balanced(trainer: Any, summed_over_tokens: bool, tokens: NDArray[np.int64] | None) -> bool:
    """Whether steps are balanced by the tokens of rows, rather than of micro-batches of equal size."""
    if not trainer.args.commonit_balance_lengths:
        return False
    if not summed_over_tokens or has_auxiliary_loss(trainer):
        trainer.commonit_logger.warning(
            "commonit_balance_lengths=True: the loss of %s is not a sum over the step's tokens, so micro-batches of "
            "different sizes would change the gradient. They keep equal sizes; set commonit_balance_lengths=False to "
            "silence this.",
            type(trainer.model).__name__,
        )
        return False
    if tokens is None:
        logger.info("commonit_balance_lengths: the rows are not tokenised, so micro-batches keep equal sizes.")
    return tokens is not None


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
