"""`AxolotlTrainer` with group-pure batches, packed or not.

Two things differ from the mixin under TRL. Axolotl packs in the sampler, so plans are made of bins
(`axolotl_plugin.packing`). And the loss of a step is its mean over tokens, as transformers computes it: Axolotl takes
the mean of each micro-batch instead, and then a sample's weight would depend on those that share its micro-batch
(`axolotl_plugin/README.md` says more).
"""

import copy
import gc
import inspect
from typing import Any

import numpy as np
from axolotl.core.trainers import AxolotlTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import unwrap_peft_model

from axolotl_plugin.packing import Bins, PackedBatchSampler, bin_shape, pack_for_training
from commonit_trl.plan import EpochPlan
from commonit_trl.plan.sampler import CommonITBatchSampler
from commonit_trl.rows import Rows
from commonit_trl.trainer.mixin import CommonITMixin

LOG = get_logger(__name__)


class CommonITAxolotlTrainer(CommonITMixin, AxolotlTrainer):
    """`AxolotlTrainer` with group-pure batches."""

    _commonit_logger = LOG
    _commonit_packed: Bins | None = None

    def _commonit_check_settings(self, args: Any) -> None:
        # Axolotl sets it for the evaluation of packed runs; our training batches do not read it.
        checked = copy.copy(args)
        checked.dataloader_drop_last = False
        super()._commonit_check_settings(checked)

    def _commonit_set_up(self) -> None:
        self.model_accepts_loss_kwargs = accepts_loss_kwargs(self.accelerator.unwrap_model(self.model))
        super()._commonit_set_up()
        # Packed rows keep all their columns, and Axolotl's collators take each for numbers. The loss of each group of
        # the evaluation set needs its labels before they go.
        group_ids = None if self.eval_dataset is None else self._commonit_assign_eval(self.eval_dataset)
        self.train_dataset = _without_labels(self.train_dataset)
        self.eval_dataset = _without_labels(self.eval_dataset)
        if self.eval_dataset is not None:
            self._commonit_eval_groups[self.eval_dataset] = group_ids

    # --- evaluation -------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The parent's, without the label column: `axolotl evaluate` gives the rows as they were prepared."""
        if self._commonit_on and isinstance(eval_dataset, Dataset):
            group_ids = self._commonit_assign_eval(eval_dataset)
            eval_dataset = _without_labels(eval_dataset)
            self._commonit_eval_groups[eval_dataset] = group_ids
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; with `eval_sample_packing` Axolotl collects garbage five times for each group's rows, so what
        is alive now is kept out of that."""
        gc.freeze()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            gc.unfreeze()

    # --- packing ------------------------------------------------------------------------------------------------------

    @property
    def _commonit_packs(self) -> bool:
        return bool(self.args.sample_packing)

    def _commonit_bins(self) -> Bins:
        """The training rows in bins."""
        capacity, _ = bin_shape(self.args, self._train_batch_size)
        if self._commonit_packed is None or self._commonit_packed.capacity != capacity:  # auto_find_batch_size
            assert self.commonit_group_ids is not None
            lengths = Rows(self.train_dataset).token_counts("total")
            self._commonit_packed = pack_for_training(
                self.args, self.commonit_group_ids, lengths, self._train_batch_size, self._commonit_world_size
            )
        return self._commonit_packed

    def _commonit_samples(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, int]:
        if not self._commonit_packs:
            return super()._commonit_samples()
        bins = self._commonit_bins()
        lengths = None if self._commonit_lengths is None else bins.lengths
        return bins.group_ids, lengths, bin_shape(self.args, self._train_batch_size)[1]

    def _commonit_batch_sampler(self) -> CommonITBatchSampler:
        if not self._commonit_packs:
            return super()._commonit_batch_sampler()
        return PackedBatchSampler(self._commonit_bins(), self._commonit_plan_of(), self._commonit_rank)

    def _commonit_run(self, plan: EpochPlan) -> dict[str, Any]:
        run = super()._commonit_run(plan)
        if self._commonit_packs:
            run["order of samples"] += f", bins {self._commonit_bins().digest()}"
        return run

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Axolotl's, which packs the whole dataset several times; not where our batches take its place."""
        if self._commonit_on:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset)


def accepts_loss_kwargs(model: Any) -> bool:
    """What `transformers.Trainer.__init__` finds out: whether the model's loss takes the token count of the step.

    `AxolotlTrainer.__init__` looks for the argument in the signature of the model inside the model, where none of
    transformers' causal language models has it.
    """
    model = unwrap_peft_model(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return model.accepts_loss_kwargs
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _without_labels(dataset: Any) -> Any:
    if dataset is None:
        return None
    return dataset.remove_columns([name for name in dataset.column_names if name.startswith("commonit_task[")])
