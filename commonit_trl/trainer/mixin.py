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
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers.trainer_utils import EvalLoopOutput

from commonit_trl.grouping import Grouper, build_grouper
from commonit_trl.grouping.fit import Grouping
from commonit_trl.grouping.task import with_task_file
from commonit_trl.plan import EpochPlan
from commonit_trl.rows import Rows
from commonit_trl.trainer import checkpoint, reports, resume, validate
from commonit_trl.trainer.callbacks import RunCallback
from commonit_trl.trainer.evaluation import RowLosses
from commonit_trl.trainer.loss import is_summed_over_tokens, predicts_next_token
from commonit_trl.trainer.metrics import count_micro_batch
from commonit_trl.trainer.run import Run, group_rows, start_run

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
    commonit_run_class: type[Run] = Run
    commonit_logger = logging.getLogger(__name__)  # a framework that hides other packages' messages sets its own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**inspect.signature(super().__init__).bind_partial(*args).arguments, **kwargs}
        options: Any = given.get("args")
        dataset: Any = given.get("train_dataset")
        validate.check_options(options)
        if dataset is not None:
            # Before the first collective that only some metrics have: a rank without CommonIT takes part in none.
            validate.compare_ranks({"commonit_metric": options.commonit_metric})
        groups_rows = options.commonit_on and dataset is not None
        if groups_rows:
            if options.commonit_task_file is not None:
                validate.check_dataset(dataset)
                dataset = with_task_file(dataset, options.commonit_task_file)
                args, kwargs = (), {**given, "train_dataset": dataset}
            self.commonit_check(options, dataset)
        super().__init__(*args, **kwargs)
        if groups_rows:
            self.commonit_start()

    # --- hooks, for trainers that prepare, pack or sample in another way -------------------------------------------

    def commonit_check(self, options: Any, dataset: Any) -> None:
        """Refuse what can be refused before the model is loaded."""
        validate.check_loss_type(options)
        validate.check_settings(options)
        validate.check_class(type(self), CommonITMixin, known=())
        validate.check_dataset(dataset)
        validate.check_images(options, dataset)
        build_grouper(options, dataset.column_names)  # a missing task column

    def commonit_start(self) -> None:
        """Group the training rows and plan the run; the parent is constructed."""
        self.commonit = start_run(self)
        self.add_callback(RunCallback(self))
        if self.is_world_process_zero():
            reports.log_summary(self)

    def commonit_group(self) -> tuple[Grouping, NDArray[np.integer[Any]]]:
        """Return the groups of the training rows, and the (rows,) groups of `train_dataset`."""
        return group_rows(self)

    def commonit_rows(self, dataset: Dataset) -> Rows:
        """Return `dataset` as the groupers read it."""
        return Rows(dataset, self.processing_class)

    def commonit_is_packed(self, dataset: Dataset) -> bool:
        """Return whether the rows of an evaluation set are packs."""
        return False

    def commonit_loss_is_summed(self) -> bool:
        """Return whether the loss is a sum over rows divided by the step's token count."""
        return is_summed_over_tokens(self)

    # --- groups and plan --------------------------------------------------------------------------------------------

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

    # --- training ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Return the parent's dataloader, over this rank's micro-batches of the plan."""
        if self.commonit is None:
            return super().get_train_dataloader()
        self.commonit.check_dataset(self.train_dataset)
        return self.commonit.dataloader(self, super().get_train_dataloader())

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Train as the parent does; collect the micro-batch's loss for its group."""
        if self.commonit is None:
            return super().training_step(model, inputs, num_items_in_batch)
        counts = count_micro_batch(inputs, predicts_next_token(self.model))  # the parent may take values out of inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.commonit.add_micro_batch(self, loss, num_items_in_batch, *counts)
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

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; refuse a checkpoint of other groups or another plan."""
        resume_from_checkpoint = resume.prepare(self, resume_from_checkpoint)
        checkpoint.save(self, self.args.output_dir)  # before training, so that a failed run has its groups
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, and the groups beside it in `commonit/`."""
        if _internal_call:
            checkpoint.mark_incomplete(self, output_dir)
        super().save_model(output_dir, _internal_call)
        checkpoint.save(self, output_dir or self.args.output_dir)

    # A private name of transformers: the only place that decides at which step of which epoch the Trainer resumes.
    # tests/unit/test_platform.py fails when it changes.
    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        return resume.replanned_place(self, num_update_steps_per_epoch) or place

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the parent's model card, with a section on the groups."""
        super().create_model_card(*args, **kwargs)
        if self.commonit is not None and self.is_world_process_zero():
            reports.extend_model_card(self)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> Any:
        """Return the parent's dataloader; remember its rows for the loss of each group."""
        loader = super().get_eval_dataloader(eval_dataset)
        if self.commonit is not None:
            self.commonit.eval_sets.remember(loader, eval_dataset)
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
        with RowLosses(self, dataloader) as losses:
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            output.metrics.update(losses.metrics(metric_key_prefix))
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Predict as the parent does; collect the loss of each row."""
        kept = dict(inputs)  # the parent may take values out of inputs
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.commonit is not None and self.commonit.row_losses is not None:
            self.commonit.row_losses.add(kept, result[0])
        return result
