"""The loss of each group of an evaluation set, from the forward passes that the parent's evaluation makes.

1. `RowLosses` iterates over the loader's batch sampler beside the loader itself, which gives the rows of each batch;
2. a forward hook on the model keeps each batch's outputs, from which the losses of its tokens are computed;
3. the sums over each row's tokens are added up over the ranks, each row once, although accelerate fills the last
   batches with rows of the first ones;
4. `eval_<group>_loss` is the mean over the trained tokens of the group's rows.

The parent's batches, and with them `eval_loss`, are untouched. A batch whose tokens' mean is not the loss that the
parent computed (label smoothing, a loss of another kind) ends the account: then no loss per group is logged, with a
message. Cost: a cross entropy over the logits that exist anyway (TRL from 1.16 on gives the tokens' losses itself), and
24 bytes per row. benchmarks/evaluation.py measures it beside the parent's evaluation.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from commonit_trl.grouping.fit import Grouping
from commonit_trl.sanitize import sanitize
from commonit_trl.trainer.loss import predicts_next_token
from commonit_trl.trainer.metrics import IGNORED_LABEL, sum_over_ranks

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 4096
"""Tokens whose logits are cast to float32 together."""
_TOLERANCE = 0.02
"""Relative difference between the parent's loss of a batch and ours; half precision stays below it."""


class EvalSets:
    """The groups of the evaluation sets of `trainer`."""

    def __init__(self, trainer: Any, grouping: Grouping) -> None:
        self.trainer = trainer
        self.grouping = grouping
        self._assigned: weakref.WeakKeyDictionary[Any, NDArray[np.int64] | None] = weakref.WeakKeyDictionary()
        self._loaded: tuple[Any, Any] = (None, None)

    def remember(self, loader: Any, dataset: Any) -> None:
        """Remember that `loader` evaluates `dataset`, an argument of `get_eval_dataloader`."""
        sets = self.trainer.eval_dataset
        self._loaded = loader, sets if dataset is None else sets[dataset] if isinstance(dataset, str) else dataset

    def groups_of(self, loader: Any) -> NDArray[np.int64] | None:
        """Return the (rows,) groups of the set that `loader` evaluates; None where it has none."""
        (remembered, dataset), self._loaded = self._loaded, (None, None)
        return self.assign(dataset) if dataset is not None and remembered is loader else None

    def assign(self, dataset: Any) -> NDArray[np.int64] | None:
        """Return the (rows,) groups of an evaluation set; None, with a message, where they cannot be assigned."""
        if not isinstance(dataset, Dataset):
            logger.info("No loss per group: the evaluation set is a %s.", type(dataset).__name__)
            return None
        if self.trainer.commonit_is_packed(dataset):
            logger.info("No loss per group: the evaluation set is packed; set eval_packing=False to get it.")
            return None
        if dataset not in self._assigned:
            try:
                self._assigned[dataset] = self.grouping.assign(self.trainer.commonit_rows(dataset))
            except ValueError as error:
                logger.warning("No loss per group on the evaluation set: %s", error)
                self._assigned[dataset] = None  # so that this is logged once
        return self._assigned[dataset]

    def groups(self) -> dict[str, list[str]]:
        """Return metric prefix -> groups of each evaluation set; no groups where they cannot be assigned."""
        given = self.trainer.eval_dataset
        sets = {f"eval_{name}": rows for name, rows in given.items()} if isinstance(given, dict) else {"eval": given}
        assigned = {prefix: self.assign(rows) for prefix, rows in sets.items() if rows is not None}
        return {
            prefix: [] if ids is None else [self.grouping.name_of(group) for group in np.unique(ids).tolist()]
            for prefix, ids in assigned.items()
        }


class RowLosses:
    """Collects the loss of each row of one evaluation; a context in which the model's outputs are kept.

    It does nothing for an evaluation set without groups, and without CommonIT.

    Args:
        trainer: whose evaluation it is.
        loader: the evaluation dataloader.
    """

    def __init__(self, trainer: Any, loader: Any) -> None:
        self.trainer = trainer
        self.problem: str | None = None
        run = trainer.commonit
        self.group_ids = None if run is None else run.eval_sets.groups_of(loader)
        """(rows,) group of each row, -1 for an unseen task."""
        self._loader = loader
        self._hooks: list[Any] = []
        self._outputs: Any = None
        self._hidden_states: Any = None

    def __enter__(self) -> Self:
        if self.group_ids is None:
            return self
        self.trainer.commonit.row_losses = self
        self._batches = iter(self._loader.batch_sampler)
        self.sums = np.zeros((3, len(self.group_ids)))
        """(3, rows) losses of trained tokens, number of trained tokens, and how often the row was evaluated."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hooks.append(self.trainer.model.register_forward_hook(self._keep_outputs))
        backbone = getattr(base, "base_model", None)
        if backbone is not None and backbone is not base:
            self._hooks.append(backbone.register_forward_hook(self._keep_hidden_states))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.group_ids is not None:
            self.trainer.commonit.row_losses = None

    def _keep_outputs(self, model: Any, args: Any, outputs: Any) -> None:
        self._outputs = outputs

    def _keep_hidden_states(self, model: Any, args: Any, outputs: Any) -> None:
        self._hidden_states = getattr(outputs, "last_hidden_state", None)

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Any], loss: Any) -> None:
        """Add a batch that the parent has evaluated with this loss."""
        rows = _flat(next(self._batches, []))
        outputs, hidden_states, self._outputs, self._hidden_states = self._outputs, self._hidden_states, None, None
        if self.problem is None:
            try:
                self._add(rows, inputs, outputs, hidden_states, loss)
            except _NotCountable as error:
                self.problem = str(error)

    def _add(self, rows: list[int], inputs: Mapping[str, Any], outputs: Any, hidden_states: Any, loss: Any) -> None:
        losses, trained = self._token_losses(inputs, outputs, hidden_states)
        total, count = losses.sum(), trained.sum()
        # On several ranks the parent may divide by the mean number of tokens per rank: then only its range is known.
        ratio = float(loss * count / total) if total > 0 and loss is not None else 1.0
        ranks = self.trainer.args.world_size
        if abs(ratio - 1) > _TOLERANCE and not (ranks > 1 and 0 < ratio <= ranks * (1 + _TOLERANCE)):
            raise _NotCountable("the loss is not the mean cross entropy of the labels")
        owners = _row_of_tokens(inputs, losses.shape, len(rows))
        sums = torch.zeros((3, len(rows)), dtype=torch.float64)
        sums[2] = 1
        for row, values in enumerate((losses, trained)):
            sums[row].index_add_(0, owners.flatten().cpu(), values.flatten().double().cpu())
        self.sums[:, rows] = sums.numpy()

    def _token_losses(
        self, inputs: Mapping[str, Any], outputs: Any, hidden_states: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, tokens) losses, 0 where nothing is trained, and which tokens are trained."""
        if getattr(outputs, "log_probs", None) is not None:  # TRL from 1.16 on
            return -outputs.log_probs, outputs.label_mask
        labels, logits = inputs.get("labels"), getattr(outputs, "logits", None)
        if not isinstance(labels, torch.Tensor):
            raise _NotCountable("the batches have no labels")
        if logits is None and hidden_states is None:
            raise _NotCountable("the model returns no logits")
        scores = hidden_states if logits is None else logits
        labels = labels.to(scores.device)
        if labels.shape != scores.shape[:-1] or labels.is_floating_point():
            raise _NotCountable("the labels are not one class per token or row")
        if labels.ndim == 2 and predicts_next_token(self.trainer.model):
            labels = inputs["shift_labels"][:, :-1].to(scores.device) if "shift_labels" in inputs else labels[:, 1:]
            scores = scores[:, :-1]
        trained = labels != IGNORED_LABEL
        selected, targets = scores[trained], labels[trained]
        head = None if logits is not None else _whole(self.trainer.model.get_output_embeddings())
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        parts = [
            cross_entropy((part if head is None else head(part)).float(), target, reduction="none")
            for part, target in zip(selected.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
        ]
        losses[trained] = torch.cat(parts)
        return losses.reshape(labels.shape[0], -1), trained.reshape(labels.shape[0], -1)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return `<prefix>_<group>_loss` of each group; a collective on every rank."""
        if self.group_ids is None:
            return {}
        *flat, problems = sum_over_ranks(self.trainer, np.append(self.sums.ravel(), self.problem is not None))
        if problems:
            logger.warning("No loss per group on the evaluation set: %s.", self.problem or "another rank has none")
            return {}
        losses, tokens, times = np.reshape(flat, self.sums.shape)
        seen = times > 0
        losses, tokens = losses / np.maximum(times, 1), tokens / np.maximum(times, 1)
        groups, numbers = np.unique(self.group_ids, return_inverse=True)
        names = [self.trainer.commonit.grouping.name_of(group) for group in groups]
        sums, counts, missed = (np.bincount(numbers, values, len(groups)) for values in (losses, tokens, ~seen))
        if missed.any():
            named = [f"{missed[group]:.0f} of {sanitize(names[group])!r}" for group in np.flatnonzero(missed)[:5]]
            logger.warning(
                "%s: the evaluation left out %d of %d rows (%s), because its loader drops incomplete batches; the loss "
                "of a group without a row is NaN.",
                prefix,
                missed.sum(),
                len(self.group_ids),
                ", ".join(named),
            )
        means = np.divide(sums, counts, out=np.full(len(groups), np.nan), where=counts > 0)
        return {f"{prefix}_{name}_loss": float(mean) for name, mean in zip(names, means, strict=True)}


def _whole(head: Any) -> Any:
    """Return `head` as a function on whole weights, where FSDP2 shards them with the model's other layers.

    Outside the model's forward pass such weights stay sharded; gathering them is a collective on every rank.
    """
    whole = {name: value.full_tensor() for name, value in head.named_parameters() if isinstance(value, DTensor)}
    if not whole or isinstance(head, FSDPModule):  # which gathers its own weights
        return head
    return lambda scores: torch.func.functional_call(head, whole, (scores,))


class _NotCountable(Exception):
    """Why a batch's loss cannot be divided among its rows."""


def _flat(rows: Any) -> list[int]:
    """Row numbers of a batch; packed batches are lists of lists."""
    return [number for entry in rows for number in (_flat(entry) if isinstance(entry, list | tuple) else [int(entry)])]


def _row_of_tokens(inputs: Mapping[str, Any], shape: torch.Size, count: int) -> torch.Tensor:
    """(batch rows, tokens) the place in the batch of the row that each label belongs to."""
    batch_rows, width = shape
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if batch_rows == count and (positions is None or count > 1 or not _packed(positions)):
        return torch.arange(count)[:, None].expand(shape)
    if positions is None:
        raise _NotCountable(f"a batch of {count} rows has {batch_rows} sequences and no position_ids")
    starts = positions == 0
    if mask is not None and mask.shape == starts.shape:
        starts &= mask != 0
    segments = starts.flatten().cumsum(0).reshape(starts.shape) - 1
    if segments.max() + 1 < count:
        raise _NotCountable(f"{count} rows are packed in {int(segments.max()) + 1} sequences")
    labelled = segments[:, -width:]  # shifted losses belong to the row of the token that they predict
    return labelled.clamp(0, count - 1)


def _packed(positions: torch.Tensor) -> bool:
    return bool((positions == 0).sum() > 1)
