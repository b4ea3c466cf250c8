"""Going on from a checkpoint: the last one that is whole, and what is left of its epoch where settings changed since.

A resumed run trains the micro-batches that its plan has left. With other ranks, batch sizes, seed or groups there is
no such plan: then the rows that the checkpoint's own plan has left, worked out from the settings and groups saved in
it, are planned as the rest of that epoch. They are saved in every checkpoint until the epoch ends, so that a rest can
be interrupted again.

Cost: the plan of one epoch, and four bytes a row left in the checkpoints of a rest.
"""

import json
import logging
import operator
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from commonit_trl.files import write_arrays
from commonit_trl.plan import EpochPlan, plan_rest

logger = logging.getLogger(__name__)

COMMONIT_DIR = "commonit"
RUN_FILE = "run.json"
REST_FILE = "rest.safetensors"


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What an epoch that was begun with another plan has left."""

    epoch: int
    rows: NDArray[np.integer[Any]]
    """(draws left,) row numbers, of `EpochPlan.left`."""

    def plan(self, plan_epoch: Callable[..., EpochPlan], seed: int, epoch: int) -> EpochPlan:
        """The plan of `epoch`: its rest in the epoch that was begun, else what `plan_epoch` makes."""
        whole = plan_epoch(epoch=epoch)
        return plan_rest(whole, self.rows, seed=seed, epoch=epoch) if epoch == self.epoch else whole

    def save(self, directory: Path) -> None:
        write_arrays(directory / REST_FILE, {"rows": self.rows})


def load_rest(directory: Path, run: dict[str, Any]) -> Rest | None:
    """The rest that was saved in `directory`, where `run` (its `run.json`) says that there is one."""
    described = run["rest of an epoch"]
    return described and Rest(epoch=described[0], rows=load_file(directory / REST_FILE)["rows"])


def first_step(plan: EpochPlan) -> int:
    """The first optimizer step of the epoch that holds samples."""
    first_unit = int(np.argmax(plan.unit_sizes > 0))
    return first_unit * plan.micro_batches_per_unit // (plan.world_size * plan.accumulation_steps)


def move_schedule(scheduler: Any, step: int) -> None:
    """Put a learning rate schedule at optimizer step `step`."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # with DeepSpeed, accelerate wraps it
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step - 1
        scheduler.step()
    else:
        logger.warning(
            "commonit_resume='replan': a %s cannot be moved to step %d and goes on from the checkpoint's step.",
            type(scheduler).__name__,
            step,
        )


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], TrainerState]:
    """What `run.json` says, and the Trainer's state, of a checkpoint that is whole.

    The Trainer writes its state last on the first rank, when other ranks may still be at their random states.

    Raises:
        ValueError: naming the file that is missing or ends early.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
        operator.index(state.global_step)
    except Exception as error:  # a damaged file fails in the parser's own way
        raise _not_whole(path, "it is missing" if isinstance(error, OSError) else error) from error
    path = checkpoint / COMMONIT_DIR / RUN_FILE
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
    """The checkpoint in `output_dir` to go on from: the one of most steps, less those that were not written to their
    end. Where a rest was planned anew, steps are counted anew, and checkpoints since then come before earlier ones.

    `transformers.trainer_utils.get_last_checkpoint` goes by the names of the folders alone.
    """
    found = []
    for checkpoint in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            run, state = read_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("Passed over: %s", error)
        else:
            found.append((run.get("times replanned", 0), state.global_step, str(checkpoint)))
    return max(found)[2] if found else None


def written_with_commonit(checkpoint: Path) -> bool:
    """Return whether a run with CommonIT wrote the checkpoint.

    Newer checkpoints name `CommonITCallback` in the Trainer's state; older ones have only the manifest.

    Args:
        checkpoint: a checkpoint folder, which may be incomplete or missing.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return "CommonITCallback" in state["stateful_callbacks"] or (checkpoint / COMMONIT_DIR / RUN_FILE).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False
