"""Checks of trainers, settings and ranks: everything that would undo group-pure batches is refused by name.

All refusals that need only the arguments come before the model is loaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from transformers import Trainer

from commonit_trl.config import CommonITArguments, parts_of, validate_options


def check_options(args: Any) -> None:
    """Refuse training arguments without `commonit_*` options, and options that were set wrongly later."""
    if not isinstance(args, CommonITArguments):
        raise ValueError(
            f"args is {type(args).__name__}, which has no commonit_* options: give an instance of a dataclass that "
            "derives from CommonITArguments and the trainer's own arguments (CommonITSFTConfig for SFTTrainer)."
        )
    validate_options(args)


def check_dataset(dataset: Any) -> None:
    """Refuse a training set whose rows cannot be read beforehand."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}; grouping needs the length and every row beforehand: give a "
            "datasets.Dataset (not streaming), for example with load_dataset(...) or Dataset.from_list(...)."
        )
    if len(dataset) == 0:
        raise ValueError("train_dataset has no rows.")


def check_images(options: CommonITArguments, dataset: Dataset) -> None:
    """Refuse metric `length` for rows with images, which TRL's collator tokenises during training."""
    images = [column for column in ("image", "images") if column in dataset.column_names]
    if images and "length" in parts_of(options.commonit_metric):
        raise ValueError(
            f"commonit_metric={options.commonit_metric!r}: rows with a column {images[0]!r} have no token count before "
            "training, because the collator tokenises them. Use commonit_metric='task', 'column' or 'embedding'."
        )


def check_settings(args: Any) -> None:
    """Refuse training arguments that would undo group-pure batches."""
    must_be_off = {
        "accelerator_config.split_batches": "it would cut micro-batches apart; set it to False",
        "accelerator_config.dispatch_batches": "it would hand one rank's micro-batches to all; set it to False",
        "dataloader_drop_last": "the plan decides about remainders; use commonit_remainder='drop'",
        "ignore_data_skip": "a resumed epoch would start over and repeat samples; set it to False",
    }
    conflicts = {name: fix for name, fix in must_be_off.items() if attrgetter(name)(args)}
    if args.train_sampling_strategy != "random":
        conflicts["train_sampling_strategy"] = (
            "it is another order of samples; leave it at 'random' (commonit_balance_lengths keeps padding low)"
        )
    if args.auto_find_batch_size and args.commonit_resume == "replan":
        conflicts["auto_find_batch_size"] = (
            "commonit_resume='replan' plans for one batch size; set it to False, or commonit_resume to 'exact'"
        )
    if args.world_size > 1 and args.commonit_balance_lengths and not args.average_tokens_across_devices:
        conflicts["average_tokens_across_devices"] = (
            "each rank's tokens would weigh differently, and balancing by length would change the gradient; set it to "
            "True, or commonit_balance_lengths to False"
        )
    for name, fix in conflicts.items():
        raise ValueError(f"{name}={attrgetter(name)(args)!r} does not go with commonit_metric: {fix}.")


def check_loss_type(args: Any) -> None:
    """Refuse KTO losses that pair each row with its neighbour in the dataset (`trl/trainer/kto_trainer.py`)."""
    is_kto = any(kind.__name__ == "KTOConfig" for kind in type(args).__mro__)
    if is_kto and args.loss_type != "apo_zero_unpaired":
        raise ValueError(
            f"loss_type={args.loss_type!r} does not go with commonit_metric: it estimates the KL divergence from each "
            "row's neighbour, so its batches cannot be composed anew; use loss_type='apo_zero_unpaired' and "
            "train_sampling_strategy='random', or commonit_metric='none'."
        )


def check_class(trainer_class: type, mixin: type, known: Sequence[type]) -> None:
    """Refuse a trainer with a training sampler of its own, which the plan would replace.

    Args:
        mixin: the class whose `get_train_dataloader` follows the plan.
        known: classes whose `_get_train_sampler` may be replaced.
    """
    owner = next(kind for kind in trainer_class.__mro__ if "_get_train_sampler" in vars(kind))
    # KTOTrainer has one for the losses that `check_loss_type` refuses.
    if owner not in (Trainer, *known) and owner.__name__ != "KTOTrainer":
        raise ValueError(
            f"{owner.__name__}._get_train_sampler does not go with commonit_metric: it is another order of samples, "
            f"which {mixin.__name__} would replace; use a trainer without it, or commonit_metric='none'."
        )


def check_best_metric(metric: str, names: Sequence[str], evaluated: Mapping[str, Sequence[str]]) -> None:
    """Refuse a `metric_for_best_model` that is the loss of no group of an evaluation set.

    Args:
        metric: the option.
        names: of the groups.
        evaluated: metric prefix (`eval`, or `eval_<set>`) -> groups of that set, none where it cannot be grouped.
    """
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    if key.startswith("eval_loss_") and key.removeprefix("eval_loss_") in names:
        raise ValueError(
            f"metric_for_best_model={metric!r}: the loss of a group is named eval_<group>_loss. Write "
            f"'eval_{key.removeprefix('eval_loss_')}_loss'."
        )
    losses = [f"{prefix}_loss" for prefix in evaluated]
    losses += [f"{prefix}_{name}_loss" for prefix, present in evaluated.items() for name in present]
    if evaluated and key.endswith("_loss") and key not in losses:
        raise ValueError(
            f"metric_for_best_model={metric!r}: the evaluation logs no such loss, only "
            f"{', '.join(map(repr, losses))}. Name one of these."
        )


def data_parallel_rank(trainer: Any) -> tuple[int, int]:
    """Return (data-parallel world size, data-parallel rank).

    Tensor- and context-parallel ranks share batches, laid out as in `accelerate.data_loader.prepare_data_loader`.

    Raises:
        ValueError: under sequence parallelism.
    """
    if trainer.get_sp_size() > 1:
        raise ValueError(
            f"sp_size={trainer.get_sp_size()}: sequence parallelism does not go with commonit_metric, because its "
            "dataloader adapter splits batches again; set sp_size to 1."
        )
    shared_by = trainer.get_tp_size() * trainer.get_cp_size()
    return trainer.args.world_size // shared_by, trainer.args.process_index // shared_by


def compare_ranks(values: Mapping[str, Any]) -> None:
    """Compare values that all ranks must share; a collective on every rank.

    Raises:
        ValueError: on every rank, naming the ranks and the values that differ.
    """
    hashes = [
        int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big") >> 1
        for value in values.values()
    ]
    by_rank = gather(torch.tensor([hashes], device=PartialState().device)).cpu()
    differs = by_rank != by_rank[0]
    if differs.any():
        ranks = ", ".join(map(str, differs.any(dim=1).nonzero()[:, 0].tolist()))
        names = ", ".join(name for name, here in zip(values, differs.any(dim=0)) if here)
        raise ValueError(
            f"The ranks would train different batches: rank {ranks} differs from rank 0 in {names}. Give every "
            "rank the same data, options, seed and commonit_cache_dir."
        )
