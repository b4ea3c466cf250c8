"""One run of a comparison, in its own process or ranks: train, measure each held-out row, write the results.

`rows.safetensors` has for each held-out row the sum of its tokens' losses, the number of tokens that the model ranks
first, the number of tokens, and the group; for each score of lm-evaluation-harness it has the values of the examples.
`result.json` has the rest; it is written last, so it marks a finished run.

Rows are measured by the model's forward without labels, in float32. The Trainer's evaluation gives means over batches
only, and newer versions of TRL train with heads that compute no logits.

Cost: the training, and one forward pass over the held-out rows.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from xxhash import xxh3_128

from commonit_trl.cli.sft import make_trainer
from commonit_trl.compare.processor import processor
from commonit_trl.compare.runs import PROGRESS_FILE, RESULT_FILE, ROWS_FILE, SCORE
from commonit_trl.compare.tasks import check_trainer, evaluate_tasks
from commonit_trl.files import write_arrays, write_text
from commonit_trl.rows import Rows
from commonit_trl.trainer.metrics import IGNORED_LABEL, TokenCounts, count_tokens, sum_over_ranks


def train_and_measure(
    model_args: Any,
    training_args: Any,
    train: Dataset,
    held_out: Dataset,
    directory: Path,
    asked: Mapping[str, Any],
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    *,
    chat: bool = False,
) -> None:
    """Train a run and write its results into `directory`.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: the options of the run, with checked `commonit_*` options.
        train: raw training rows, the same in all runs.
        held_out: raw held-out rows, the same in all runs.
        directory: of the run.
        asked: the settings of the run, written with its results.
        tasks: of lm-evaluation-harness, on which the trained model is evaluated too.
        task_folder: with task files of the user's own.
        chat: whether the prompts of `tasks` have the chat template.

    Raises:
        ValueError: from the trainer; and if its model cannot be evaluated on `tasks`.
    """
    set_seed(training_args.seed)  # for new adapters: TRL 1.9 makes them before the Trainer seeds
    trainer: Any = make_trainer(model_args, training_args, train, held_out)
    if tasks:
        check_trainer(trainer)
    weights = _hash_weights(trainer.model) if trainer.is_world_process_zero() else None
    trainer.add_callback(_Progress(directory / PROGRESS_FILE))
    counts: list[TokenCounts] = []

    def count(model: Any, args: Any, inputs: dict[str, Any]) -> None:
        # TRL repeats some forwards without gradients, for its metrics.
        if model.training and torch.is_grad_enabled() and (counted := count_tokens(inputs)) is not None:
            counts.append(counted)

    hook = trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trained = trainer.train()
    hook.remove()
    tokens, computed = sum_over_ranks(
        trainer, [sum(int(one.data) for one in counts), sum(one.computed for one in counts)]
    )
    evaluation, run, state = trainer.eval_dataset, trainer.commonit, trainer.state
    arrays = measure_rows(trainer, evaluation)
    if tasks:
        arrays |= {
            f"{SCORE}{name}": values for name, values in evaluate_tasks(trainer, tasks, task_folder, chat=chat).items()
        }
    # The same groups as for the trainer's own evaluation losses by group.
    group_ids = None if run is None else run.eval_sets.assign(evaluation)
    if not trainer.is_world_process_zero():
        return
    arrays["group_ids"] = np.full(len(evaluation), -1) if group_ids is None else group_ids
    write_arrays(directory / ROWS_FILE, arrays)
    summary = {"left_out": 0, "repeated": 0} if run is None else run.summary()
    result = {
        "asked": dict(asked),
        "processor": processor(training_args.device),
        "weights": weights,
        "groups": [] if run is None else run.grouping.names,
        "left_out": summary["left_out"],
        "repeated": summary["repeated"],
        "steps": state.global_step,
        "epochs": state.epoch,
        "tokens": int(tokens),
        "computed_tokens": int(computed),
        "tokens_per_second": tokens / trained.metrics["train_runtime"],
        "curves": {
            curve: [(entry["epoch"], entry[curve]) for entry in state.log_history if curve in entry]
            for curve in ("loss", "eval_loss")
        },
    }
    write_text(directory / RESULT_FILE, json.dumps(result, indent=1))


# --- held-out rows ------------------------------------------------------------------------------------------------


def measure_rows(trainer: Any, rows: Dataset) -> dict[str, NDArray[Any]]:
    """Measure each row; call on every rank.

    Args:
        trainer: a trained trainer; its model, collator and accelerator are used.
        rows: tokenised, as the trainer prepares its evaluation set.

    Returns:
        Three (rows,) arrays: `loss`, summed over the trained tokens, `correct`, the number of them that the model ranks
        first, and `tokens`, the number of them.
    """
    order = np.argsort(Rows(rows).token_counts("total"), kind="stable")[::-1]  # rows of similar length share a batch
    parts = []
    for batch in _batches(trainer, rows.select(order), padded_collator(trainer)):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = trainer.model_wrapped(**inputs).logits
        parts.append(trainer.accelerator.gather_for_metrics(_of_rows(logits, batch["labels"])).cpu())
    measured = np.empty((len(rows), 3))
    measured[order] = torch.cat(parts).double().numpy()
    loss, correct, tokens = measured.T
    return {"loss": loss.copy(), "correct": correct.astype(np.int64), "tokens": tokens.astype(np.int64)}


def _of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (rows, 3): sum of losses, correct tokens, tokens; float32 counts exactly up to 2**24."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL)
    trained = labels != IGNORED_LABEL
    correct = (logits.argmax(dim=-1) == labels) & trained
    return torch.stack([losses.sum(dim=1), correct.sum(dim=1), trained.sum(dim=1)], dim=1)


def padded_collator(trainer: Any) -> Any:
    """Return the trainer's collator with padding, even if training is padding-free, so that rows stay separate."""
    collator = trainer.data_collator
    return dataclasses.replace(collator, padding_free=False) if getattr(collator, "padding_free", False) else collator


def _batches(trainer: Any, rows: Dataset, collate: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield evaluation batches of this rank's rows, with the model in evaluation mode."""
    loader = DataLoader(
        rows.with_format(None), batch_size=trainer.args.per_device_eval_batch_size, collate_fn=collate, shuffle=False
    )
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    try:
        yield from trainer.accelerator.prepare_data_loader(loader, device_placement=True)
    finally:
        model.train(was_training)


class _Progress(TrainerCallback):
    """Writes the current step and the number of steps to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step % max(1, state.max_steps // 100) == 0:
            write_text(self.file, json.dumps([state.global_step, state.max_steps]))


def _hash_weights(model: Any) -> str:
    """Return a hash of all weights; with sharded weights, of those on this rank."""
    digest = xxh3_128()
    for _, weight in sorted(model.named_parameters()):
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
