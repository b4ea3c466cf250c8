"""What a trainer's loss is normalised by, measured on two rows.

Steps may be balanced by length only where a sample's share of the gradient does not depend on the samples that share
its micro-batch: where the loss is a sum over the rows divided by the step's token count. `model_accepts_loss_kwargs` is
no proof of that: transformers sets it for every forward with `**kwargs`, classifiers and T5 among them.

Cost: three forward passes over two short rows, once per trainer.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02
"""Relative difference between the loss of two rows and the sum of their losses; a mean differs by half."""
_ROWS_LOOKED_AT = 256


def is_summed_over_tokens(trainer: Any) -> bool:
    """Return whether the loss of a micro-batch is the sum of its rows' losses over the step's token count.

    Measured with the trainer's own `compute_loss`. Where the model cannot run yet (DeepSpeed, FSDP), or adds an
    auxiliary loss, it is decided by the model's class and `compute_loss`.
    """
    if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
        return False
    if has_auxiliary_loss(trainer) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return is_causal_lm_loss(trainer)
    try:
        return _is_additive(trainer)
    except Exception as error:  # anything that a model, collator or loss raises: then it is not proven
        logger.info("The loss of two rows cannot be measured (%s: %s).", type(error).__name__, error)
        return False


def has_auxiliary_loss(trainer: Any) -> bool:
    """Return whether a mixture of experts adds its load-balancing loss, a mean over each micro-batch."""
    config: Any = getattr(trainer.model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(trainer, "aux_loss_enabled", False) or getattr(text_config, "output_router_logits", False))


def is_causal_lm_loss(trainer: Any) -> bool:
    """Return whether the loss is the one that transformers or TRL computes for a causal language model."""
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    known = owner is Trainer or owner.__module__.startswith(("trl.", "axolotl."))
    return known and trainer.compute_loss_func is None and predicts_next_token(trainer.model)


def predicts_next_token(model: Any) -> bool:
    """Return whether the model's loss compares the output at each token with the next token's label."""
    config = getattr(model, "config", None)
    kind = getattr(model, "loss_type", None)
    return not getattr(config, "is_encoder_decoder", False) and kind in (
        "ForCausalLM",
        "ForConditionalGeneration",
        None,
    )


def _is_additive(trainer: Any) -> bool:
    rows = trainer.train_dataset.select(_two_rows(trainer))
    loader = trainer.get_test_dataloader(rows)  # for its collator and its columns
    features = [loader.dataset[0], loader.dataset[1]]
    items = torch.tensor(16, device=trainer.args.device)
    with _measuring(trainer):
        both, first, second = (
            float(trainer.compute_loss(trainer.model, _inputs(trainer, loader, part), num_items_in_batch=items))
            for part in (features, features[:1], features[1:])
        )
    return both > 0 and abs(both - first - second) <= _TOLERANCE * both


def _inputs(trainer: Any, loader: Any, features: list[Any]) -> Any:
    batch = loader.collate_fn(copy.deepcopy(features))  # some collators change their features
    return {
        name: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _two_rows(trainer: Any) -> list[int]:
    """The shortest of the first rows, and the next longer one."""
    rows = Rows(trainer.train_dataset.select(range(min(_ROWS_LOOKED_AT, len(trainer.train_dataset)))))
    lengths = rows.token_counts("total") if rows.tokenized else np.zeros(len(rows), dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    longer = order[lengths[order] > lengths[order[0]]]
    return [int(order[0]), int(longer[0] if len(longer) else order[-1])]


@contextlib.contextmanager
def _measuring(trainer: Any) -> Iterator[None]:
    """A context without gradients or dropout that leaves the model, the random state and TRL's metrics unchanged."""
    training = trainer.model.training
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))  # TRL's running metrics
    stored = copy.deepcopy(getattr(trainer, "_stored_metrics", None))  # those of ORPO and CPO
    trainer.model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), trainer.compute_loss_context_manager():
            yield
    finally:
        trainer.model.train(training)
        if metrics is not None:
            trainer._metrics = metrics
        if stored is not None:
            trainer._stored_metrics = stored
