"""Scores of tasks of EleutherAI's lm-evaluation-harness, example by example, so that two models can be paired.

The trained model is evaluated in memory, without being saved. Data-parallel ranks share the examples. Prompts have the
tokenizer's chat template if the training rows are conversations.

Cost: that of the tasks; each process imports the harness (about five seconds).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from commonit_trl.config import nearest

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's `mixed_precision` -> dtype."""


def check_tasks(tasks: Sequence[str], folder: str | None) -> None:
    """Check the values of `--lm_eval_tasks` and `--lm_eval_include_path`.

    Raises:
        ValueError: without the harness, a folder that does not exist, or an unknown task.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(f"--lm_eval_tasks {','.join(tasks)}: needs lm-eval. pip install 'commonit-trl[eval]'")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--lm_eval_include_path {folder}: no such folder. Use the folder with your task files.")
    known = _manager(folder).all_tasks
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"--lm_eval_tasks {task}: neither lm-eval nor --lm_eval_include_path has this task. Did you mean "
                f"{nearest(task, known)!r}?"
            )


def check_trainer(trainer: Any) -> None:
    """Check that `evaluate_tasks` can evaluate the trainer's model.

    Raises:
        ValueError: if the weights are sharded, or the model has a processor instead of a tokenizer.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "--lm_eval_tasks needs the whole weights on each rank, and FSDP and ZeRO-3 shard them. Use DDP or ZeRO-2, "
            "or remove the option."
        )
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            "--lm_eval_tasks evaluates text models, and this one has a processor for other data. Remove the option."
        )


def hash_folder(folder: str) -> str:
    """Return a hash of the task files, which tells whether two runs had the same tasks."""
    digest = xxh3_128()
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def evaluate_tasks(trainer: Any, tasks: Sequence[str], folder: str | None, *, chat: bool) -> dict[str, NDArray[Any]]:
    """Evaluate the trainer's model; call on every rank.

    Args:
        trainer: a trained trainer for which `check_trainer` passes.
        tasks: names of tasks, groups or tags of the harness.
        folder: with the user's own task files.
        chat: whether prompts have the chat template.

    Returns:
        On rank 0: score, such as `gsm8k exact_match strict-match` -> (examples,) its value for each example, in the
        order of the data; a task with sub-tasks has the examples of all. Empty on other ranks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    accelerator = trainer.accelerator

    class OnRanks(HFLM):
        """The harness's model, whose examples are shared among the trainer's ranks."""

        rank, world_size = accelerator.process_index, accelerator.num_processes

    model = accelerator.unwrap_model(trainer.model_wrapped)
    harness = OnRanks(
        pretrained=model,
        tokenizer=trainer.processing_class,
        batch_size=trainer.args.per_device_eval_batch_size,
        mixed_precision_dtype=_AUTOCAST.get(accelerator.mixed_precision),
    )
    if accelerator.num_processes > 1:
        harness.accelerator = accelerator
    was_training = model.training
    model.eval()
    manager = _manager(folder)  # reads all task files
    scores: dict[str, NDArray[Any]] = {}
    for task in tasks:
        evaluated = simple_evaluate(
            model=harness,
            tasks=[task],
            task_manager=manager,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
        if evaluated is not None:
            scores |= _by_score(task, evaluated["samples"])
    model.train(was_training)
    return scores


def _by_score(task: str, samples: dict[str, list[dict[str, Any]]]) -> dict[str, NDArray[Any]]:
    values: dict[str, list[float]] = {}
    for name in sorted(samples):
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"]):
            how = "" if sample["filter"] == "none" else f" {sample['filter']}"
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):  # others are summed up in ways of their own, such as BLEU
                    values.setdefault(f"{task} {metric}{how}", []).append(float(sample[metric]))
    return {score: np.array(found) for score, found in values.items()}


def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)
