"""Train one epoch on real instruction data by each metric, and count the rows in the model's forward passes.

Steps: (1) read the mixture (GSM8K, CodeAlpaca, APIBench) as prompt and completion with a `task`, and take a random
slice in which every task keeps its share; (2) train a byte-level BPE on the mixture and make a tiny random Llama; (3)
train one epoch with baseline batches and one by each metric: task, length, and embedding with the MMLU dev set as the
reference; (4) identify rows by the tokens of the model's forward pass, and count; (5) add the plan's figures for
several ranks, which need no training; (6) write a report.

    python -m benchmarks real_data --data FOLDER --set rows=2000

Cost: four minutes of one CPU core for 2,000 rows; nothing is downloaded.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Report, Settings, Table
from benchmarks.mixture import REFERENCE, encoder, prepare, reuse_freed_memory, tiny_llama
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer, EpochPlan, Grouper, plan_epoch

TITLE = "One epoch on real data"
SIZES = {"quick": {"rows": 500}, "full": {"rows": 2_000}}
METRICS = ("task", "length", "embedding")
MICRO_BATCH_SIZE = 8
ACCUMULATION_STEPS = 2
RANKS = 4
TOP_GROUPS = 10


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Record of one epoch."""

    seen: list[list[int]]
    """Row numbers in the model's forward passes, by optimizer step."""
    padded_tokens: int
    """Tokens that the model computed, padding included."""
    lengths: NDArray[np.int64]
    """(rows,) tokens of each row."""
    groups: NDArray[np.int64] | None
    """(rows,) group of each row; None for baseline batches."""
    grouper: Grouper | None
    setup_seconds: float
    """CPU time of tokenising, grouping and planning."""
    train_seconds: float
    """CPU time of the epoch."""


# --- training and what it saw -------------------------------------------------------------------------------


class SeenRows:
    """Identify rows by the tokens of the forward pass, independent of sampler, collator and columns."""

    def __init__(self, trainer: CommonITSFTTrainer) -> None:
        self.trainer = trainer
        tokens = [tuple(ids) for ids in trainer.train_dataset["input_ids"]]
        self.row_of_tokens = dict(zip(tokens, trainer.train_dataset["row"]))
        if len(self.row_of_tokens) < len(tokens):
            raise ValueError("Two rows have the same tokens: remove one of them.")
        self.steps: list[list[int]] = []
        self.padded_tokens = 0
        trainer.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        mask = inputs["attention_mask"].bool()
        if self.trainer.state.global_step == len(self.steps):
            self.steps.append([])
        self.steps[-1] += [
            self.row_of_tokens[tuple(ids[kept].tolist())] for ids, kept in zip(inputs["input_ids"], mask)
        ]
        self.padded_tokens += mask.numel()


def train_epoch(
    metric: str, dataset: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any
) -> Epoch:
    """Train one epoch on CPU, with output in `folder` and `options` in the config."""
    config = CommonITSFTConfig(
        output_dir=str(folder / metric),
        commonit_metric=metric,
        commonit_cache_dir=str(folder / "groups"),
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION_STEPS,
        num_train_epochs=1,
        max_length=None,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        commonit_report=False,
        **options,
    )
    start = time.process_time()
    trainer = CommonITSFTTrainer(
        model=tiny_llama(tokenizer),
        args=config,
        train_dataset=dataset.add_column("row", list(range(len(dataset)))),
        processing_class=tokenizer,
    )
    ready = time.process_time()
    seen = SeenRows(trainer)
    trainer.train()
    done = time.process_time()
    if len(trainer.train_dataset) != len(dataset):
        raise ValueError(f"TRL kept only {len(trainer.train_dataset)} of {len(dataset)} rows.")
    return Epoch(
        seen=seen.steps,
        padded_tokens=seen.padded_tokens,
        lengths=np.array([len(ids) for ids in trainer.train_dataset["input_ids"]]),
        groups=trainer.commonit_group_ids,
        grouper=trainer.commonit_grouper,
        setup_seconds=ready - start,
        train_seconds=done - ready,
    )


def train_all(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, reference: Path, encoder: str, folder: Path
) -> dict[str, Epoch]:
    """Train one epoch with baseline batches (`none`) and one by each metric."""
    embedding = {"commonit_embedding_model": encoder, "commonit_reference_dataset": str(reference)}
    options: dict[str, dict[str, Any]] = {"none": {}, "task": {}, "length": {}, "embedding": embedding}
    return {metric: train_epoch(metric, dataset, tokenizer, folder, **options[metric]) for metric in options}


# --- figures ------------------------------------------------------------------------------------------------


def pure_share(steps: list[list[int]], groups: NDArray[np.int64]) -> float:
    """Return the share of steps that hold one group."""
    return float(np.mean([len(set(groups[rows].tolist())) == 1 for rows in steps]))


def slowest_rank_cost(plan: EpochPlan, lengths: NDArray[np.int64]) -> float:
    """Return computed tokens per token of the data, counting the costliest rank of each micro-step for all ranks."""
    longest = np.maximum.reduceat(lengths[plan.indices], plan.offsets[:-1])
    padded = (longest * np.diff(plan.offsets)).reshape(-1, plan.world_size)
    return float(padded.max(axis=1).sum() * plan.world_size / lengths.sum())


def figures(epoch: Epoch, plain: Epoch) -> dict[str, Any]:
    """Return the figures of one metric's epoch and of the baseline."""
    assert epoch.groups is not None and epoch.grouper is not None
    names = epoch.grouper.names
    sizes = np.bincount(epoch.groups, minlength=len(names))
    held = sizes[sizes > 0]
    times_seen = np.bincount(np.concatenate(epoch.seen), minlength=len(epoch.groups))
    geometry = {
        "micro_batch_size": MICRO_BATCH_SIZE,
        "accumulation_steps": ACCUMULATION_STEPS,
        "world_size": RANKS,
    }
    ranks_plan = plan_epoch(epoch.groups, epoch.lengths, **geometry)
    # Random batches: one group, lengths not balanced.
    ranks_plain = plan_epoch(np.zeros_like(epoch.groups), **geometry)
    summary = ranks_plan.summary()
    return {
        "possible_groups": len(names),
        "groups": len(held),
        "smallest": int(held.min()),
        "median": float(np.median(held)),
        "largest": int(held.max()),
        "steps": len(epoch.seen),
        "plain_steps": len(plain.seen),
        "pure_steps": pure_share(epoch.seen, epoch.groups),
        "plain_pure_steps": pure_share(plain.seen, epoch.groups),
        "rows": len(times_seen),
        "lost": int((times_seen == 0).sum()),
        "repeated": int(np.maximum(times_seen - 1, 0).sum()),
        "cost": epoch.padded_tokens / float(epoch.lengths.sum()),
        "plain_cost": plain.padded_tokens / float(plain.lengths.sum()),
        "setup_seconds": round(epoch.setup_seconds, 1),
        "train_seconds": round(epoch.train_seconds, 1),
        "plain_train_seconds": round(plain.train_seconds, 1),
        "ranks": {
            "world_size": RANKS,
            "steps": summary.num_steps,
            "plain_steps": summary.baseline_steps,
            "lost": summary.left_out,
            "repeated": summary.repeated,
            "cost": slowest_rank_cost(ranks_plan, epoch.lengths),
            "plain_cost": slowest_rank_cost(ranks_plain, epoch.lengths),
        },
        "group_sizes": {name: int(size) for name, size in zip(names, sizes) if size},
    }


# --- the report -------------------------------------------------------------------------------------------------------


def parts(results: dict[str, dict[str, Any]]) -> Iterator[Table | str]:
    """Yield tables and explanations of their columns."""
    yield Table(
        heading="Seen by the model, one rank",
        header=[
            "metric",
            "groups",
            "smallest / median / largest",
            "steps (plain)",
            "pure steps (plain)",
            "rows lost / repeated",
            "tokens computed per token (plain)",
            "CPU seconds of set-up + training (plain training)",
        ],
        rows=[
            [
                metric,
                f"{row['groups']} of {row['possible_groups']}",
                f"{row['smallest']} / {row['median']:g} / {row['largest']}",
                f"{row['steps']} ({row['plain_steps']})",
                f"{row['pure_steps']:.1%} ({row['plain_pure_steps']:.1%})",
                f"{row['lost']} / {row['repeated']}",
                f"{row['cost']:.2f} ({row['plain_cost']:.2f})",
                f"{row['setup_seconds']:.1f} + {row['train_seconds']:.1f} ({row['plain_train_seconds']:.1f})",
            ]
            for metric, row in results.items()
        ],
    )
    yield (
        "*plain*: the same rows with `commonit_metric: none`, trained and counted in the same way. "
        "*groups*: groups with rows, of all fitted groups. "
        "*pure steps*: optimizer steps that hold one group. "
        "*tokens computed*: with padding and repeats. *set-up*: tokenising, grouping and planning."
    )
    yield Table(
        heading=f"Planned for {RANKS} ranks",
        header=["metric", "steps (plain)", "rows lost / repeated", "tokens computed per token (plain)"],
        rows=[
            [
                metric,
                f"{row['ranks']['steps']} ({row['ranks']['plain_steps']})",
                f"{row['ranks']['lost']} / {row['ranks']['repeated']}",
                f"{row['ranks']['cost']:.2f} ({row['ranks']['plain_cost']:.2f})",
            ]
            for metric, row in results.items()
        ],
    )
    yield "*tokens computed*: in every micro-step, each rank counts with the tokens of the costliest."
    for metric, row in results.items():
        sizes = list(row["group_sizes"].items())
        largest = ""
        if metric == "embedding":
            largest = f", the largest {TOP_GROUPS}"
            sizes = sorted(sizes, key=lambda item: -item[1])[:TOP_GROUPS]
        yield Table(heading=f"Rows of each group by {metric}{largest}", header=[metric, "rows"], rows=sizes)


def run(settings: Settings) -> Report:
    reuse_freed_memory()
    model = encoder()
    dataset, tokenizer = prepare(settings.data, settings["rows"])
    with tempfile.TemporaryDirectory() as folder:
        epochs = train_all(dataset, tokenizer, settings.data / REFERENCE, model, Path(folder))
    results = {metric: figures(epochs[metric], epochs["none"]) for metric in METRICS}
    return Report(
        head={
            "data": f"{len(dataset)} rows of GSM8K, CodeAlpaca and APIBench, each with its share; "
            f"byte-level BPE of {len(tokenizer)} tokens",
            "reference": "the MMLU dev set, encoded by all-MiniLM-L6-v2",
            "training": f"one epoch of a random Llama of two layers, {MICRO_BATCH_SIZE} rows a micro-batch, "
            f"{ACCUMULATION_STEPS} micro-batches a step",
        },
        parts=list(parts(results)),
        results=results,
    )
