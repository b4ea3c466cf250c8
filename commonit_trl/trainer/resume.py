"""Resume a run: compare it with the checkpoint, and plan the remaining rows of its epoch anew.

A resumed run trains exactly the remaining micro-batches of its plan. With `commonit_resume="replan"` and other ranks,
batch sizes, seed or groups, the remaining rows of the epoch are planned with the new settings, and saved in every
checkpoint until the epoch ends. Cost: the plan of one epoch.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from commonit_trl.grouping import load_grouper
from commonit_trl.plan import PlanSpec
from commonit_trl.plan.spec import weights_by_id
from commonit_trl.trainer.checkpoint import (
    COMMONIT_DIR,
    MANIFEST,
    SPEC_FIELDS,
    check_baseline,
    describe,
    fingerprints,
    last_checkpoint,
    load_remaining,
    read_checkpoint,
    run_id,
    settings,
)
from commonit_trl.trainer.run import Run, row_costs

logger = logging.getLogger(__name__)


def prepare(trainer: Any, resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """Choose and check the checkpoint that `train` resumes from.

    Returns:
        The argument for the parent's `train`.

    Raises:
        ValueError: as `resume` and `check_baseline`.
    """
    run = trainer.commonit
    if run is not None:
        run.restart()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(trainer.args.output_dir) or True
    found = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if found and Path(found).exists():  # else the parent refuses it
        if run is None:
            check_baseline(Path(found))
        else:
            resume(trainer, Path(found))
    return resume_from_checkpoint


def resume(trainer: Any, checkpoint: Path) -> None:
    """Compare the run with a checkpoint, and take over the remaining rows of its epoch.

    Raises:
        ValueError: when the checkpoint was written by another run, without CommonIT, or not to its end.
    """
    run, args = trainer.commonit, trainer.args
    directory = checkpoint / COMMONIT_DIR
    if (checkpoint / TRAINER_STATE_NAME).exists() and not directory.exists():
        raise _not_ours(checkpoint)
    saved, state = read_checkpoint(checkpoint)
    if run_id(checkpoint) != saved.get("run id"):
        raise _not_ours(checkpoint)
    try:
        run.spec = replace(run.spec, **load_remaining(directory, saved))
        run.replanned = saved["times replanned"]
        current = describe(trainer)
        # With auto_find_batch_size, the Trainer takes the batch size from the checkpoint.
        skipped = {"per_device_train_batch_size", "order of samples"} if args.auto_find_batch_size else set()
        differences = {
            name: _difference(name, saved, current)
            for name in current
            if name not in skipped and saved[name] != current[name]
        }
        explanation = _explain(differences, run, saved["settings"], settings(args))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}): use another checkpoint."
        ) from error
    if differences and args.commonit_resume == "exact":
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is of another run (in the checkpoint -> now): {explanation}. "
            "Resume with the same settings and data, or start a new run; commonit_resume='replan' continues with other "
            "settings and the same rows."
        )
    if differences:
        trainer.commonit_logger.info("commonit_resume='replan' (in the checkpoint -> now): %s.", explanation)
        _replan(trainer, checkpoint, saved, state, differences)
    elif args.process_index not in saved["random states"]:
        logger.warning(
            "resume_from_checkpoint=%r: the checkpoint of this node has no random state of rank %d. Batches are exact, "
            "dropout is not. Start each node with the node rank that it had.",
            str(checkpoint),
            args.process_index,
        )


def _not_ours(checkpoint: Path) -> ValueError:
    return ValueError(
        f"resume_from_checkpoint={str(checkpoint)!r}: it was written without CommonIT, and this run trains with it, in "
        "another order. Resume with commonit_metric='none', or start a new run."
    )


def _difference(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{name}: {then[name]!r} -> {now[name]!r}"


def _explain(differences: Mapping[str, str], run: Run, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings that differ; hashes, which nobody can read, only where none does."""
    hashes = run.of_spec(fingerprints)
    named = [text for name, text in differences.items() if name not in hashes]
    named += [_difference(name, then, now) for name in now if name in then and then[name] != now[name]]
    data = [text for name, text in differences.items() if name != "order of samples"]  # which follows from the others
    return "; ".join(named) or f"no setting differs, but hashes do: {'; '.join(data or differences.values())}"


def _replan(
    trainer: Any, checkpoint: Path, saved: Mapping[str, Any], state: TrainerState, differences: Mapping[str, str]
) -> None:
    """Plan the remaining rows of the checkpoint's epoch with the run's settings."""
    run = trainer.commonit
    if trainer.is_deepspeed_enabled and "world size" in differences:
        raise ValueError(
            f"commonit_resume='replan': {differences['world size']}: DeepSpeed's checkpoints are read by as many "
            "ranks as wrote them; resume with those, or start a new run from the checkpoint's model."
        )
    other_data = [differences[name] for name in ("rows", "tokens of rows") if name in differences]
    try:
        started = _saved_spec(trainer, checkpoint, saved, differences)
        if not other_data and started.fingerprint != saved["order of samples"]:
            other_data = ["their groups or numbers of tokens differ"]
    except ValueError as error:
        other_data.append(str(error))
    if other_data:
        raise ValueError(
            f"commonit_resume='replan' needs the rows that resume_from_checkpoint={str(checkpoint)!r} was trained "
            "on (with packing, the same packs, which depend on the groups): "
            f"{'; '.join(other_data)}. Give the same data, or start a new run from the checkpoint's model."
        )
    epoch, done = divmod(state.global_step, started.plan(0).num_steps)
    run.spec = started.remaining(epoch, done, then=run.spec)
    epoch += done > 0 and run.spec.resumed_epoch is None  # all rows of the epoch are trained
    run.replanned += 1
    plan = run.plan(epoch)
    run.first_step = epoch * plan.num_steps + plan.first_step
    if 0 < trainer.args.max_steps <= run.first_step:
        raise ValueError(
            f"max_steps={trainer.args.max_steps}: with these settings the checkpoint's epoch resumes at step "
            f"{run.first_step}. Raise max_steps."
        )
    trainer.commonit_logger.info(
        "commonit_resume='replan': epoch %d has %d samples left, planned anew in %d steps that repeat %d; training "
        "resumes at step %d, with %d per epoch.",
        epoch,
        0 if run.spec.remaining_rows is None else len(run.spec.remaining_rows),
        plan.num_steps - plan.first_step,
        plan.summary().repeated,
        run.first_step,
        plan.num_steps,
    )


def replanned_place(trainer: Any, steps_per_epoch: int) -> tuple[int, int] | None:
    """Set the Trainer's state to the first step of a replanned epoch.

    Returns:
        The epoch, and how many of its micro-batches are done; None where nothing was replanned.
    """
    run, state = trainer.commonit, trainer.state
    if run is None or run.first_step is None:
        return None
    state.global_step = run.first_step
    state.epoch = run.first_step / steps_per_epoch
    state.best_global_step = None  # a step of the checkpoint's own count
    epoch, step = divmod(run.first_step, steps_per_epoch)
    return epoch, step * trainer.args.gradient_accumulation_steps


def _saved_spec(trainer: Any, checkpoint: Path, saved: Mapping[str, Any], differences: Mapping[str, str]) -> PlanSpec:
    """The spec of the run that wrote the checkpoint, over the rows of this run."""
    run = trainer.commonit
    grouper, group_ids = load_grouper(checkpoint / COMMONIT_DIR), run.spec.group_ids
    if "assignment of rows to groups" in differences:
        group_ids = grouper.assign(run.grouping.rows)
    tokens = row_costs(trainer.train_dataset, trainer.data_collator)
    fields = {field: saved[name] for field, name in SPEC_FIELDS.items()}
    return replace(
        run.spec,
        group_ids=group_ids,
        positions=grouper.positions(),
        lengths=tokens if saved["commonit_balance_lengths"] else None,
        heaviest_first=tokens if saved["commonit_heaviest_first"] else None,
        micro_batch_size=saved["per_device_train_batch_size"],
        weights=weights_by_id(saved["commonit_weights"], grouper.names, group_ids),
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()},
    )


def move_schedule(scheduler: Any, step: int) -> None:
    """Set a learning rate schedule to optimizer step `step`."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # with DeepSpeed, accelerate wraps it
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step - 1
        scheduler.step()
    else:
        logger.warning(
            "commonit_resume='replan': a %s cannot be set to step %d and continues from the checkpoint's step.",
            type(scheduler).__name__,
            step,
        )
