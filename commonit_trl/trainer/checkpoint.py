"""Checkpoints of a run: written with the groups and a manifest, read back, and found in an output directory.

A checkpoint holds `commonit/` with the fitted groups and the manifest `run.json`. The run id in the manifest is also in
the checkpoint's `trainer_state.json` (`mark`), so a run without CommonIT that overwrites the checkpoint is noticed. In
a replanned epoch (`resume.py`) it also holds the remaining rows, four bytes each.
"""

import json
import logging
import operator
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from commonit_trl.config import OPTIONS
from commonit_trl.files import write_arrays, write_text
from commonit_trl.grouping.fit import fingerprint
from commonit_trl.grouping.ranks import Ranks
from commonit_trl.trainer.run import Run

logger = logging.getLogger(__name__)

COMMONIT_DIR = "commonit"
MANIFEST = "run.json"
REMAINING_FILE = "remaining.safetensors"
_MARK = "CommonITCallback"
_HASHED_ROWS = 64
SPEC_FIELDS = {
    "purity": "commonit_purity",
    "remainder": "commonit_remainder",
    "pure_fraction": "commonit_pure_fraction",
    "order": "commonit_order",
    "mixed_groups": "mixed groups",
    "left_out_groups": "left-out groups",
    "equal_sizes": "equal micro-batches",
    "seed": "data seed",
    "world_size": "world size",
    "accumulation_steps": "gradient_accumulation_steps",
}
"""Fields of `PlanSpec` -> their names in the manifest and in messages."""
_COMPARED = {
    *("commonit_metric", "commonit_weights", "commonit_balance_lengths", "commonit_heaviest_first"),
    *SPEC_FIELDS.values(),
}
_EXPLAINING = (
    *sorted(OPTIONS.keys() - _COMPARED - {"commonit_cache_dir", "commonit_report", "commonit_resume"}),
    *("max_length", "truncation_mode", "packing", "packing_strategy", "sample_packing", "max_seq_length"),
)


def describe(trainer: Any) -> dict[str, Any]:
    """Return everything that determines the batches: all ranks, and a resumed run, must share it."""
    run, args = trainer.commonit, trainer.args
    fields = {name: getattr(run.spec, field) for field, name in SPEC_FIELDS.items()}
    return {
        "commonit_metric": args.commonit_metric,
        "commonit_weights": args.commonit_weights,
        "commonit_balance_lengths": run.spec.lengths is not None,
        "commonit_heaviest_first": run.spec.heaviest_first is not None,
        "per_device_train_batch_size": trainer._train_batch_size,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
        "rows": len(run.row_groups),
        "number of groups": len(run.grouping.names),
        **run.of_spec(fingerprints),
        "times replanned": run.replanned,
    }


def fingerprints(run: Run) -> dict[str, Any]:
    """Return the hashed part of `describe`."""

    def hashed(array: Any) -> str | None:
        return None if array is None else fingerprint(np.ascontiguousarray(array))

    spec = run.spec
    return {
        "names of groups": fingerprint(json.dumps(run.grouping.names).encode()),
        "assignment of rows to groups": hashed(run.row_groups),
        "tokens of rows": _fingerprint_rows(run.dataset),
        "token lengths": hashed(spec.lengths),
        "order of samples": run.fingerprint,
        "remaining rows": None
        if spec.remaining_rows is None
        else [spec.resumed_epoch, hashed(spec.remaining_rows), spec.remaining_pure],
    }


def _fingerprint_rows(dataset: Dataset) -> str | None:
    """A hash of the tokens of some rows; None of rows that are not tokenised."""
    if "input_ids" not in dataset.column_names:
        return None
    rows = np.unique(np.linspace(0, len(dataset) - 1, _HASHED_ROWS).astype(int))
    tokens = dataset.select_columns(["input_ids"]).with_format(None)[rows.tolist()]["input_ids"]
    return fingerprint(json.dumps(tokens).encode())


def settings(args: Any) -> dict[str, Any]:
    """Return the arguments that may differ between runs of the same batches, and explain other groups or rows."""
    return {name: getattr(args, name) for name in _EXPLAINING if hasattr(args, name)}


def save(trainer: Any, output_dir: str) -> None:
    """Write the groups and the manifest of the run into `commonit/` of `output_dir`, on the rank that saves."""
    run = trainer.commonit
    if run is None or not trainer.args.should_save:
        return
    directory = Path(output_dir) / COMMONIT_DIR
    run.grouping.grouper.save(directory, epoch_summary=run.summary())
    if run.spec.remaining_rows is not None:
        write_arrays(directory / REMAINING_FILE, {"rows": run.spec.remaining_rows})
    manifest = {
        **describe(trainer),
        "settings": settings(trainer.args),
        "random states": _ranks_of_checkpoint(trainer.args),
        "run id": run.run_id,
    }
    write_text(directory / MANIFEST, json.dumps(manifest, indent=2))


def _ranks_of_checkpoint(args: Any) -> list[int]:
    """Return the ranks that write their random states into this checkpoint: those of the node, or all."""
    if not args.save_on_each_node:
        return list(range(args.world_size))
    first = args.process_index - args.local_process_index
    return list(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))))


def mark(run: Run, state: Any) -> None:
    """Put the id of the run into the Trainer's state, where a run without CommonIT has none."""
    state.stateful_callbacks[_MARK] = {"args": {}, "attributes": {"run_id": run.run_id}}


def mark_incomplete(trainer: Any, checkpoint: str | None) -> None:
    """Remove the Trainer's state of an earlier run's checkpoint of the same step, before it is written over."""
    if trainer.commonit is not None and checkpoint is not None and trainer.args.should_save:
        (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def run_id(checkpoint: Path) -> Any:
    """The run id in the Trainer's state; None where there is none."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return state["stateful_callbacks"][_MARK]["attributes"]["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_baseline(checkpoint: Path) -> None:
    """Refuse to resume a CommonIT checkpoint, which no other run has overwritten since, without CommonIT.

    Raises:
        ValueError: naming the checkpoint.
    """
    if (checkpoint / COMMONIT_DIR).exists() and run_id(checkpoint) is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: it was written with CommonIT, and this run trains without "
            "it, in another order. Resume with the checkpoint's commonit_metric, or start a new run."
        )


def load_remaining(directory: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PlanSpec` that describe the remaining rows of a replanned epoch, if a manifest has one."""
    described = saved["remaining rows"]
    if not described:
        return {}
    rows = load_file(directory / REMAINING_FILE)["rows"]
    epoch, _, pure = described
    return {"resumed_epoch": operator.index(epoch), "remaining_rows": rows, "remaining_pure": operator.index(pure)}


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
        operator.index(run.get("times replanned", 0))
        ranks = list(map(operator.index, run["random states"]))
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint.") from error
    random_states = list(checkpoint.glob("rng_state*.pth"))  # none with save_only_model
    for path in random_states:
        if not zipfile.is_zipfile(path):
            raise _not_whole(path, "it ends early")
    if 0 < len(random_states) < len(ranks):
        raise _not_whole(checkpoint / "rng_state_*.pth", f"{len(random_states)} of {len(ranks)} ranks have one")
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
    come before earlier ones. `transformers.trainer_utils.get_last_checkpoint` reads only the names of the folders. In a
    run with several ranks, all ranks call this together, and the checkpoint is complete on every node.

    Raises:
        ValueError: on all ranks, when some have complete checkpoints, but none of these is on every node.
    """
    by_rank = Ranks.of_run().gather(lambda: _complete_checkpoints(Path(output_dir)))
    on_all = set(by_rank[0]).intersection(*by_rank[1:])
    if not on_all and any(by_rank):
        have = "; ".join(
            f"rank {rank} has {', '.join(name for _, _, name in sorted(found)) or 'none'}"
            for rank, found in enumerate(by_rank)
        )
        raise ValueError(
            f"output_dir={str(output_dir)!r}: no checkpoint is complete on every node ({have}). Share output_dir "
            "between the nodes, or train with save_on_each_node=True and copy a checkpoint to the node without one."
        )
    return str(Path(output_dir) / max(on_all)[2]) if on_all else None


def _complete_checkpoints(output_dir: Path) -> list[tuple[int, int, str]]:
    """List (times replanned, step, folder name) of the complete checkpoints."""
    found = []
    for checkpoint in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            run, state = read_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("Skipped: %s", error)
        else:
            found.append((run.get("times replanned", 0), state.global_step, checkpoint.name))
    return found
