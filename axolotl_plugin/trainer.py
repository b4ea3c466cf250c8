"""`AxolotlTrainer`, packed or not, and `AxolotlRewardTrainer` with group-pure batches.

Two differences of `AxolotlTrainer` from the mixin with TRL: Axolotl packs in the sampler, so plans consist of bins
(`axolotl_plugin.packing`). The loss of a training step is its mean over tokens, as in transformers; Axolotl averages
each micro-batch first, so a sample's weight would depend on its micro-batch (see `axolotl_plugin/README.md`).
Evaluation keeps Axolotl's loss.
"""

import copy
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
from axolotl.core.trainers import AxolotlRewardTrainer, AxolotlTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import unwrap_peft_model

from axolotl_plugin.dropped import dropped_rows
from axolotl_plugin.labels import carried_columns, with_source_names
from axolotl_plugin.packing import PackedRun
from commonit_trl.grouping.fit import Grouping
from commonit_trl.rows import Rows
from commonit_trl.trainer import validate
from commonit_trl.trainer.loss import is_causal_lm_loss
from commonit_trl.trainer.mixin import CommonITMixin

LOG = get_logger(__name__)


class CommonITAxolotlMixin(CommonITMixin):
    """`CommonITMixin` for rows that Axolotl has prepared, with carried columns and counts of dropped rows."""

    commonit_logger = LOG

    def commonit_check(self, options: Any, dataset: Any) -> None:
        # Axolotl sets dataloader_drop_last for packed evaluation; CommonIT's training batches ignore it.
        checked = copy.copy(options)
        checked.dataloader_drop_last = False
        validate.check_settings(checked)
        validate.check_class(type(self), CommonITMixin, known=(CommonITAxolotlTrainer,))
        validate.check_dataset(dataset)

    def commonit_group(self) -> tuple[Grouping, NDArray[np.integer[Any]]]:
        dropped = dropped_rows(self.train_dataset)
        grouping, row_groups = super().commonit_group()
        if dropped is not None:
            grouping = replace(grouping, dropped=grouping.dropped + dropped)
        # Packed rows keep all columns, and Axolotl's collators read every column as numbers.
        self.train_dataset = _without_carried(self.train_dataset)
        return grouping, row_groups

    def commonit_rows(self, dataset: Dataset) -> Rows:
        return super().commonit_rows(with_source_names(dataset))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the parent's dataloader without carried columns; keep them for the losses by group."""
        if self.commonit is None:
            return super().get_eval_dataloader(eval_dataset)
        labelled = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = super().get_eval_dataloader(_without_carried(labelled) if isinstance(labelled, Dataset) else labelled)
        self.commonit.eval_sets.remember(loader, labelled)
        return loader


class CommonITAxolotlTrainer(CommonITAxolotlMixin, AxolotlTrainer):
    """`AxolotlTrainer` with group-pure batches."""

    commonit_run_class = PackedRun

    def commonit_start(self) -> None:
        self._parent_accepts_loss_kwargs = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = accepts_loss_kwargs(self.accelerator.unwrap_model(self.model))
        super().commonit_start()

    def commonit_loss_is_summed(self) -> bool:
        # Check the class: a trial batch needs Axolotl's evaluation settings.
        return self.model_accepts_loss_kwargs and is_causal_lm_loss(self)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with Axolotl's loss."""
        if self.commonit is None:
            return super().evaluation_loop(*args, **kwargs)
        trained_with, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, self._parent_accepts_loss_kwargs
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = trained_with

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Skip Axolotl's sampler, which packs the whole dataset several times, when CommonIT replaces it."""
        if self.commonit is not None:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset)


class CommonITAxolotlRewardTrainer(CommonITAxolotlMixin, AxolotlRewardTrainer):
    """`AxolotlRewardTrainer` (`reward_model: true`) with group-pure batches."""

    def __init__(self, *args: Any, dataset_tags: Any = None, **kwargs: Any) -> None:
        # Axolotl gives dataset_tags to every trainer but its own reward trainers, which do not take them.
        super().__init__(*args, **kwargs)


def accepts_loss_kwargs(model: Any) -> bool:
    """Return whether the model's loss takes the step's token count, as `transformers.Trainer.__init__` decides.

    `AxolotlTrainer.__init__` checks the signature of the inner model, which never has the argument in transformers'
    causal language models.
    """
    model = unwrap_peft_model(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return model.accepts_loss_kwargs
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _without_carried(dataset: Dataset) -> Dataset:
    return dataset.remove_columns(carried_columns(dataset))
