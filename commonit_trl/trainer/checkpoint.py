"""Checkpoints of a run: its manifest, what a resumed run must share with it, and the remaining rows of its epoch.

A checkpoint holds `commonit/` with the fitted groups and the manifest `run.json`. The run id in the manifest is also in
the checkpoint's `trainer_state.json` (`CommonITCallback`), so a run without CommonIT that overwrites the checkpoint is
noticed. A resumed run trains exactly the remaining micro-batches of its plan. With `commonit_resume="replan"` and
other ranks, batch sizes, seed or groups, the remaining rows of the epoch are planned anew, and saved in every
checkpoint until the epoch ends.

Cost: the plan of one epoch, and four bytes per remaining row in the checkpoints of a replanned epoch.
"""

import json
import logging
import operator
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from commonit_trl.files import write_arrays, write_text
from commonit_trl.grouping import load_grouper
from commonit_trl.grouping.fit import fingerprint
from commonit_trl.plan import PlanSpec
from commonit_trl.plan.spec import weights_by_id
from commonit_trl.trainer.run import row_costs

logger = logging.getLogger(__name__)

COMMONIT_DIR = "commonit"
MANIFEST = "run.json"
REMAINING_FILE = "remaining.safetensors"
MARK = "CommonITCallback"
_HASHED_ROWS = 64


def describe(trainer: Any) -> dict[str, Any]:
    """Return everything that determines the batches: all ranks, and a resumed run, must share it."""
    run, args = trainer.commonit, trainer.args
    spec = run.spec
    return {
        "commonit_metric": args.commonit_metric,
        "commonit_purity": spec.purity,
        "commonit_remainder": spec.remainder,
        "commonit_pure_fraction": list(spec.pure_fraction),
        "commonit_order": spec.order,
        "commonit_heaviest_first": spec.heaviest_first is not None,
        "mixed groups": list(spec.mixed_groups),
        "left-out groups": list(spec.left_out_groups),
        "commonit_weights": args.commonit_weights,
        "commonit_balance_lengths": spec.lengths is not None,
        "equal micro-batches": spec.equal_sizes,
        "data seed": spec.seed,
        "per-device batch size": spec.micro_batch_size,
        "world size": spec.world_size,
        "gradient accumulation steps": spec.accumulation_steps,
        "rows": len(run.row_groups),
        "number of groups": len(run.grouping.names),
        "names of groups": fingerprint(json.dumps(run.grouping.names).encode()),
        "assignment of rows to groups": fingerprint(np.ascontiguousarray(run.row_groups)),
        "tokens of rows": _fingerprint_rows(run.dataset),
        "token lengths": None if spec.lengths is None else fingerprint(np.ascontiguousarray(spec.lengths)),
        "order of samples": trainer.commonit_fingerprint(),
        "remaining rows": None
        if spec.remaining_rows is None
        else [spec.resumed_epoch, fingerprint(np.ascontiguousarray(spec.remaining_rows)), spec.remaining_pure],
        "times replanned": run.replanned,
    }


def _fingerprint_rows(dataset: Dataset) -> str | None:
    """A hash of the tokens of some rows; None of rows that are not tokenised."""
    if "input_ids" not in dataset.column_names:
        return None
    rows = np.unique(np.linspace(0, len(dataset) - 1, _HASHED_ROWS).astype(int))
    tokens = dataset.select_columns(["input_ids"]).with_format(None)[rows.tolist()]["input_ids"]
    return fingerprint(json.dumps(tokens).encode())


def save(trainer: Any, directory: Path, run_id: str) -> None:
    """Write the groups and the manifest of the run into `directory`."""
    run = trainer.commonit
    run.grouping.grouper.save(directory, epoch_summary=run.summary())
    if run.spec.remaining_rows is not None:
        write_arrays(directory / REMAINING_FILE, {"rows": run.spec.remaining_rows})
    write_text(directory / MANIFEST, json.dumps({**describe(trainer), "run id": run_id}, indent=2))


def written_with_commonit(checkpoint: Path) -> bool:
    """Return whether a CommonIT run wrote the checkpoint, and no other run has overwritten it since."""
    return (checkpoint / COMMONIT_DIR).exists() and _run_id(checkpoint) is not None


def _run_id(checkpoint: Path) -> Any:
    """The run id in the Trainer's state; None where there is none."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return state["stateful_callbacks"][MARK]["attributes"]["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_baseline(checkpoint: Path) -> None:
    """Refuse to resume a CommonIT checkpoint without CommonIT.

    Raises:
        ValueError: naming the checkpoint.
    """
    if written_with_commonit(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: it was written with CommonIT, and this run trains without "
            "it, in another order. Resume with the checkpoint's commonit_metric, or start a new run."
        )


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
    if (checkpoint / TRAINER_STATE_NAME).exists() and not (checkpoint / COMMONIT_DIR).exists():
        raise _not_ours(checkpoint)
    saved, state = read_checkpoint(checkpoint)
    if _run_id(checkpoint) != saved.get("run id"):
        raise _not_ours(checkpoint)
    directory = checkpoint / COMMONIT_DIR
    try:
        run.spec = replace(run.spec, **load_remaining(directory, saved))
        run.replanned = saved["times replanned"]
        current = describe(trainer)
        # With auto_find_batch_size, the Trainer takes the batch size from the checkpoint.
        skipped = {"per-device batch size", "order of samples"} if args.auto_find_batch_size else set()
        differences = {
            name: f"{name} ({saved[name]!r} in the checkpoint, {current[name]!r} now)"
            for name in current
            if name not in skipped and saved[name] != current[name]
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}): use another checkpoint."
        ) from error
    if differences and args.commonit_resume == "exact":
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is of another run; these differ: "
            f"{'; '.join(differences.values())}. Resume with the same settings and data, or start a new run; "
            "commonit_resume='replan' continues with other settings and the same rows."
        )
    if differences:
        _replan(trainer, checkpoint, saved, state, differences)


def _not_ours(checkpoint: Path) -> ValueError:
    return ValueError(
        f"resume_from_checkpoint={str(checkpoint)!r}: it was written without CommonIT, and this run trains with it, in "
        "another order. Resume with commonit_metric='none', or start a new run."
    )


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
        "resumes at step %d, with %d per epoch. Differences from the checkpoint: %s.",
        epoch,
        0 if run.spec.remaining_rows is None else len(run.spec.remaining_rows),
        plan.num_steps - plan.first_step,
        plan.summary().repeated,
        run.first_step,
        plan.num_steps,
        "; ".join(differences.values()),
    )


def _saved_spec(trainer: Any, checkpoint: Path, saved: Mapping[str, Any], differences: Mapping[str, str]) -> PlanSpec:
    """The spec of the run that wrote the checkpoint, over the rows of this run."""
    run = trainer.commonit
    grouper, group_ids = load_grouper(checkpoint / COMMONIT_DIR), run.spec.group_ids
    if "assignment of rows to groups" in differences:
        group_ids = grouper.assign(run.grouping.rows)
    tokens = row_costs(trainer.train_dataset, trainer.data_collator)
    return PlanSpec(
        group_ids=group_ids,
        lengths=tokens if saved["commonit_balance_lengths"] else None,
        pure_fraction=tuple(saved["commonit_pure_fraction"]),
        order=saved["commonit_order"],
        positions=grouper.positions(),
        mixed_groups=tuple(saved["mixed groups"]),
        left_out_groups=tuple(saved["left-out groups"]),
        heaviest_first=tokens if saved["commonit_heaviest_first"] else None,
        micro_batch_size=saved["per-device batch size"],
        world_size=saved["world size"],
        accumulation_steps=saved["gradient accumulation steps"],
        purity=saved["commonit_purity"],
        remainder=saved["commonit_remainder"],
        weights=weights_by_id(saved["commonit_weights"], grouper.names, group_ids),
        equal_sizes=saved["equal micro-batches"],
        seed=saved["data seed"],
        resumed_epoch=run.spec.resumed_epoch,
        remaining_rows=run.spec.remaining_rows,
        remaining_pure=run.spec.remaining_pure,
    )


def load_remaining(directory: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PlanSpec` that describe the remaining rows of a replanned epoch, if a manifest has one."""
    described = saved["remaining rows"]
    if not described:
        return {}
    rows = load_file(directory / REMAINING_FILE)["rows"]
    epoch, _, pure = described
    return {"resumed_epoch": operator.index(epoch), "remaining_rows": rows, "remaining_pure": operator.index(pure)}


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


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], TrainerState]:
    """Return the manifest and the Trainer's state of a checkpoint that is complete.

    The first rank writes the Trainer's state last, while other ranks may still write their random states.

    Raises:
        ValueError: naming the file that is missing or ends early.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
        operator.index(state.global_step)
    except Exception as error:  # a damaged file fails in the parser's own way
        raise _not_whole(path, "it is missing" if isinstance(error, OSError) else error) from error
    path = checkpoint / COMMONIT_DIR / MANIFEST
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        ranks, _ = operator.index(run["world size"]), operator.index(run.get("times replanned", 0))
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint.") from error
    random_states = list(checkpoint.glob("rng_state*.pth"))  # none with save_only_model
    for path in random_states:
        if not zipfile.is_zipfile(path):
            raise _not_whole(path, "it ends early")
    if 0 < len(random_states) < ranks:
        raise _not_whole(checkpoint / "rng_state_*.pth", f"{len(random_states)} of {ranks} ranks have one")
    return run, state


def _not_whole(path: Path, why: Any) -> ValueError:
    reason = " ".join(str(why).split())
    return ValueError(
        f"resume_from_checkpoint={str(path.parent)!r} was not written to its end ({path.name}: {reason}): use an "
        "earlier checkpoint, and remove this one."
    )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the checkpoint in `output_dir` to resume from, None where there is none.

    It is the complete checkpoint of most steps. A replanned epoch counts its steps anew, so checkpoints written since
    come before earlier ones. `transformers.trainer_utils.get_last_checkpoint` reads only the names of the folders.
    """
    found = []
    for checkpoint in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            run, state = read_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("Skipped: %s", error)
        else:
            found.append((run.get("times replanned", 0), state.global_step, str(checkpoint)))
    return max(found)[2] if found else None
