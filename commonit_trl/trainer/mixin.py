"""CommonIT in any `transformers.Trainer`: `CommonITMixin`.

At construction: check the options, fit the groups to the training rows, build the `PlanSpec`. `get_train_dataloader`
rebuilds the parent's dataloader around a `CommonITBatchSampler`. With `commonit_metric="none"` every method is the
parent's.

The loader is not given to `accelerator.prepare`: the sampler knows its rank, and accelerate would shard it again
(`BatchSamplerShard` in `accelerate/data_loader.py`, which drops rounds that end in a short batch). `Trainer` moves the
batches to the device itself.
"""

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from commonit_trl.grouping import Grouper, build_grouper
from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN
from commonit_trl.grouping.fit import Grouping, data_seed, fit_grouping
from commonit_trl.grouping.tracing import TracedRows
from commonit_trl.plan import EpochPlan, PlanSpec
from commonit_trl.plan.sampler import CommonITBatchSampler, CommonITDataLoader
from commonit_trl.rows import Rows
from commonit_trl.trainer import checkpoint, reports, validate
from commonit_trl.trainer.callbacks import CommonITCallback, RunCallback
from commonit_trl.trainer.evaluation import RowLosses
from commonit_trl.trainer.loss import has_auxiliary_loss, is_summed_over_tokens, predicts_next_token
from commonit_trl.trainer.metrics import count_samples, count_tokens
from commonit_trl.trainer.run import Run, row_costs

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Mixed  # the class that the mixin extends
else:
    _Mixed = object


class CommonITMixin(_Mixed):
    """Group-pure batches for a `transformers.Trainer` subclass: `class MyTrainer(CommonITMixin, Trainer)`.

    Its `args` must be a `TrainingArguments` that also derives from `CommonITArguments`, its `train_dataset` a
    `datasets.Dataset`.

    Attributes:
        commonit: groups, plan and metrics; None with `commonit_metric="none"`.

    Raises:
        ValueError: at construction, on options or settings that do not go together, before the model is loaded where
            the arguments show it; in `train`, on a checkpoint of a different run.
    """

    args: Any
    train_dataset: Any
    eval_dataset: Any
    commonit: Run | None = None
    _commonit_raw_dataset: Any = None  # for parents that prepare the training set as they are constructed
    _commonit_prepared: tuple[Grouping, NDArray[np.integer[Any]]] | None = None
    _commonit_logger = logger  # a framework that hides other packages' messages sets its own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments, **kwargs}
        options: Any = given.get("args")
        dataset: Any = given.get("train_dataset")
        validate.check_options(options)
        if dataset is not None:
            # Before the first collective that only some metrics have: a rank without CommonIT takes part in none.
            validate.compare_ranks({"commonit_metric": options.commonit_metric})
        if options.commonit_on and dataset is not None:
            self._commonit_check(options, dataset)
            self._commonit_raw_dataset = dataset
        super().__init__(*args, **kwargs)
        if options.commonit_on and dataset is not None:
            self._commonit_start()

    def _commonit_check(self, options: Any, dataset: Any) -> None:
        """Refuse what can be refused before the model is loaded."""
        validate.check_loss_type(options)
        validate.check_settings(options)
        validate.check_class(type(self), CommonITMixin, known=())
        validate.check_dataset(dataset)
        build_grouper(options, dataset.column_names)  # a missing task column

    # --- groups and plan --------------------------------------------------------------------------------------------

    def _commonit_start(self) -> None:
        if len(self.train_dataset) == 0:
            raise ValueError(
                f"max_length={getattr(self.args, 'max_length', None)}: preparing train_dataset left no row with a "
                "token to train on: raise max_length, or look at the rows."
            )
        grouping, row_groups = self._commonit_prepared or self._commonit_group()
        world_size, rank = validate.data_parallel_rank(self)
        summed_over_tokens = self._commonit_summed_over_tokens()
        self.commonit = Run(
            grouping=grouping,
            spec=PlanSpec.from_options(
                self.args,
                grouping.names,
                row_groups,
                lengths=self._commonit_lengths(summed_over_tokens),
                micro_batch_size=self._train_batch_size,
                world_size=world_size,
                accumulation_steps=self.args.gradient_accumulation_steps,
                # TRL's preference trainers gather values of each sample, which needs as many on every rank.
                equal_sizes=world_size > 1 and not summed_over_tokens,
                seed=data_seed(self.args),
            ),
            dataset=self.train_dataset,
            row_groups=row_groups,
            rank=rank,
            summed_over_tokens=summed_over_tokens,
        )
        self._commonit_fit_spec()
        self.commonit.plan(0)  # refuses too few samples and a remainder='drop' without a step
        validate.check_best_metric(self.args, grouping.names, self._commonit_evaluated_groups())
        self.add_callback(CommonITCallback())
        self.add_callback(RunCallback(self))
        if self.is_world_process_zero():
            reports.log_summary(self)

    def _commonit_group(self) -> tuple[Grouping, NDArray[np.integer[Any]]]:
        """Group the training rows that have a token to train on; return the groups, and those of `train_dataset`."""
        rows = self._commonit_rows(self.train_dataset)
        traced: tuple[TracedRows, ...] = ()
        trained = rows.is_trained(shifted=predicts_next_token(self.model))
        if not trained.all():
            numbers = np.flatnonzero(~trained)
            traced = (TracedRows(reason=NO_TRAINED_TOKEN, numbers=numbers, rows=rows.select(numbers)),)
            self.train_dataset = self.train_dataset.select(np.flatnonzero(trained))
            rows = self._commonit_rows(self.train_dataset)
        grouping = fit_grouping(self.args, rows, traced)
        return grouping, grouping.group_ids

    def _commonit_rows(self, dataset: Dataset) -> Rows:
        """Return `dataset` as the groupers read it."""
        return Rows(dataset, self.processing_class)

    def _commonit_summed_over_tokens(self) -> bool:
        """Return whether the loss is a sum over rows divided by the step's token count."""
        return is_summed_over_tokens(self)

    def _commonit_lengths(self, summed_over_tokens: bool) -> NDArray[np.int64] | None:
        """Return the (rows,) tokens by which to balance steps; None for micro-batches of equal size."""
        if not self.args.commonit_balance_lengths:
            return None
        if not summed_over_tokens or has_auxiliary_loss(self):
            self._commonit_logger.warning(
                "commonit_balance_lengths=True: the loss of %s is not a sum over the step's tokens, so micro-batches "
                "of different sizes would change the gradient. They keep equal sizes; set "
                "commonit_balance_lengths=False to silence this.",
                type(self.model).__name__,
            )
            return None
        lengths = row_costs(self.train_dataset, self.data_collator)
        if lengths is None:
            logger.info("commonit_balance_lengths: the rows are not tokenised, so micro-batches keep equal sizes.")
        return lengths

    def _commonit_fit_spec(self) -> None:
        """Adapt the spec to the current batch size, which `auto_find_batch_size` changes."""
        assert self.commonit is not None
        if self.commonit.spec.micro_batch_size != self._train_batch_size:
            self.commonit.spec = replace(self.commonit.spec, micro_batch_size=self._train_batch_size)

    def _commonit_fingerprint(self) -> str:
        """Return a hash of the order of samples."""
        assert self.commonit is not None
        return self.commonit.spec.fingerprint

    def commonit_plan(self, epoch: int = 0) -> EpochPlan:
        """Return the plan of `epoch`, as training follows it; of a replanned epoch, the remaining steps.

        Raises:
            ValueError: with `commonit_metric="none"`, which plans nothing.
        """
        if self.commonit is None:
            raise ValueError("commonit_metric='none' (or a trainer without train_dataset) has no plan.")
        return self.commonit.plan(epoch)

    @property
    def commonit_grouper(self) -> Grouper | None:
        """The fitted grouper; None with `commonit_metric="none"`."""
        return None if self.commonit is None else self.commonit.grouping.grouper

    @property
    def commonit_group_ids(self) -> NDArray[np.integer[Any]] | None:
        """(rows of `train_dataset`,) group ids; None with `commonit_metric="none"`."""
        return None if self.commonit is None else self.commonit.row_groups

    def get_train_dataloader(self) -> Any:
        """Return the parent's dataloader, over this rank's micro-batches of the plan."""
        if self.commonit is None:
            return super().get_train_dataloader()
        self.commonit.check_dataset(self.train_dataset)
        loader = super().get_train_dataloader()
        self.commonit.dataset = self.train_dataset  # DPO adds columns as it makes its loader
        self._commonit_fit_spec()
        return CommonITDataLoader(
            loader.dataset,
            self._commonit_sampler(),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=loader.in_order,
        )

    def _commonit_sampler(self) -> CommonITBatchSampler:
        """Return this rank's batch sampler."""
        assert self.commonit is not None
        return CommonITBatchSampler(self.commonit.plan, self.commonit.rank)

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Train as the parent does; collect the micro-batch's loss for its group."""
        if self.commonit is None:
            return super().training_step(model, inputs, num_items_in_batch)
        # The parent may take values out of inputs.
        tokens, samples = count_tokens(inputs, predicts_next_token(self.model)), count_samples(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.commonit.add_micro_batch(self, loss, num_items_in_batch, tokens, samples)
        return loss

    # A private name of transformers: the only place that has the gradient norm of every step.
    # tests/unit/test_platform.py fails when it changes.
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.commonit is not None:
            self.commonit.add_step(self.state.global_step, norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the parent does; add the metrics of `commonit_trl.trainer.metrics` to the Trainer's training logs."""
        if self.commonit is not None and {"loss", "learning_rate"} <= logs.keys():
            logs = {**logs, **self.commonit.metrics.take()}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the parent's model card, with a section on the groups."""
        super().create_model_card(*args, **kwargs)
        if self.commonit is not None and self.is_world_process_zero():
            reports.extend_model_card(self)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, and the groups beside it in `commonit/`."""
        if self.commonit is not None and _internal_call and output_dir is not None and self.args.should_save:
            # An earlier run's checkpoint of the same step is incomplete while this one is written over it.
            (Path(output_dir) / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        self._commonit_save(output_dir or self.args.output_dir)

    def _commonit_save(self, output_dir: str) -> None:
        if self.commonit is not None and self.args.should_save:
            (mark,) = (entry for entry in self.callback_handler.callbacks if isinstance(entry, CommonITCallback))
            checkpoint.save(self, Path(output_dir) / checkpoint.COMMONIT_DIR, mark.run_id)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; refuse a checkpoint of other groups or another plan."""
        if self.commonit is not None and resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint.last_checkpoint(self.args.output_dir) or True
        path = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if self.commonit is not None:
            self.commonit.restart()
        if path and Path(path).exists():  # else the parent refuses it
            if self.commonit is None:
                checkpoint.check_baseline(Path(path))
            else:
                checkpoint.resume(self, Path(path))
        self._commonit_save(self.args.output_dir)  # before training, so that a failed run has its groups
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # A private name of transformers: the only place that decides at which step of which epoch the Trainer resumes.
    # tests/unit/test_rest.py fails when it changes.
    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        if self.commonit is None or self.commonit.first_step is None:
            return place
        self.state.global_step = self.commonit.first_step
        self.state.epoch = self.commonit.first_step / num_update_steps_per_epoch
        self.state.best_global_step = None  # a step of the checkpoint's own count
        epoch, step = divmod(self.commonit.first_step, num_update_steps_per_epoch)
        return epoch, step * self.args.gradient_accumulation_steps

    # --- evaluation -------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> Any:
        """Return the parent's dataloader; remember its rows for the loss of each group."""
        loader = super().get_eval_dataloader(eval_dataset)
        if self.commonit is not None:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            self.commonit.evaluated = loader, self.eval_dataset[rows] if isinstance(rows, str) else rows
        return loader

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as the parent does, and add `<prefix>_<group>_loss` to the metrics."""
        loop: Any = super().evaluation_loop
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        group_ids = None if self.commonit is None else self._commonit_eval_groups(dataloader)
        if self.commonit is None or group_ids is None:
            return loop(*arguments)
        losses = self.commonit.row_losses = RowLosses(self, dataloader, len(group_ids))
        try:
            with losses.hooks():
                output = loop(*arguments)
        finally:
            self.commonit.row_losses = None
        output.metrics.update(losses.metrics(self.commonit.grouping, group_ids, metric_key_prefix))
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Predict as the parent does; collect the loss of each row."""
        losses = None if self.commonit is None else self.commonit.row_losses
        kept = dict(inputs)  # the parent may take values out of inputs
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if losses is not None:
            losses.add(kept, result[0])
        return result

    def _commonit_is_packed(self, dataset: Dataset) -> bool:
        """Return whether the rows of an evaluation set are packs."""
        return False

    def _commonit_eval_groups(self, dataloader: Any) -> NDArray[np.int64] | None:
        """Return the (rows,) groups of the set that `dataloader` evaluates."""
        assert self.commonit is not None
        (loader, dataset), self.commonit.evaluated = self.commonit.evaluated, (None, None)
        return self._commonit_assign_eval(dataset) if dataset is not None and loader is dataloader else None

    def _commonit_assign_eval(self, dataset: Any) -> NDArray[np.int64] | None:
        """Return the (rows,) groups of an evaluation set; None, with a message, where they cannot be assigned."""
        assert self.commonit is not None
        if not isinstance(dataset, Dataset):
            logger.info("No loss per group: the evaluation set is a %s.", type(dataset).__name__)
            return None
        if self._commonit_is_packed(dataset):
            logger.info("No loss per group: the evaluation set is packed; set eval_packing=False to get it.")
            return None
        groups = self.commonit.eval_groups
        if dataset not in groups:
            try:
                groups[dataset] = self.commonit.grouping.assign(self._commonit_rows(dataset))
            except ValueError as error:
                logger.warning("No loss per group on the evaluation set: %s", error)
                groups[dataset] = None  # so that this is logged once
        return groups[dataset]

    def _commonit_evaluated_groups(self) -> dict[str, list[str]]:
        """Return the metric prefix and the names of the groups of each evaluation set."""
        assert self.commonit is not None
        if self.args.metric_for_best_model is None or self.eval_dataset is None:
            return {}
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        assigned = {name: self._commonit_assign_eval(dataset) for name, dataset in sets.items()}
        return {
            "eval" if name is None else f"eval_{name}": list(
                map(self.commonit.grouping.name_of, np.unique(group_ids).tolist())
            )
            for name, group_ids in assigned.items()
            if group_ids is not None
        }
