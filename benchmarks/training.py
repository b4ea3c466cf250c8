"""Measure training throughput in tokens of the data per second, with TRL's orders of samples and with this package's.

Steps: (1) tokenise a slice of the mixture, in which every task keeps its share, with a byte-level BPE; (2) for each
order of samples and each form of micro-batches (padded, padding-free, packed) train two steps, which warms up and
detects unsupported combinations; (3) in rounds over all cases, train one epoch of a random Llama with TRL's trainer and
with this package's, and divide the tokens of the data by the seconds from the first step to the last.

    python -m benchmarks training --size full --data FOLDER
    torchrun --nproc_per_node 2 -m benchmarks training --size full --data FOLDER    # two ranks
    python -m benchmarks training --size gpu --data FOLDER                           # a Llama of 1B parameters

All cases of a round train the same rows, so their times are comparable. The size `gpu` saves each case's figures beside
the results, stops after its time budget and resumes from there in the next run; the model and the batches are in
`SIZES`. Cost of quick and full on two cores: five minutes, and an hour.
"""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common import Cases, Report, Round, Settings, Skipped, Table, medians, paired_rounds
from benchmarks.mixture import (
    TINY,
    VOCABULARY,
    llama,
    read_mixture,
    reuse_freed_memory,
    stratified_slice,
    tokenized,
    train_tokenizer,
)
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer
from commonit_trl.rows import Rows

TITLE = "Training, real tokens a second"
SIZES = {
    "quick": {"rows": 256, "rounds": 1, "model": "small", "batch": 8, "accumulation": 2, "minutes": None},
    "full": {"rows": 1_000, "rounds": 3, "model": "small", "batch": 8, "accumulation": 2, "minutes": None},
    "gpu": {"rows": 4_000, "rounds": 2, "model": "1b", "batch": 16, "accumulation": 2, "minutes": 8},
}
MODELS = {
    "tiny": TINY,
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
BASE = "TRL, random: padded"
PACK = 1_024  # tokens
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"max_length": None},
    "padding-free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": PACK, "packing": True},
}
GOAL = 1.5

Case = tuple[type[SFTTrainer], type[SFTConfig], dict[str, Any]]
"""Trainer class, config class and options of the config."""
ORDERS = Cases()


@ORDERS("TRL, random")
def random_order() -> Case:
    return SFTTrainer, SFTConfig, {}


@ORDERS("TRL, group_by_length")
def group_by_length() -> Case:
    return SFTTrainer, SFTConfig, {"train_sampling_strategy": "group_by_length"}


@ORDERS("TRL, batch_rebalance")
def batch_rebalance() -> Case:
    return SFTTrainer, SFTConfig, {"train_sampling_strategy": "batch_rebalance"}


@ORDERS("this package, by task")
def by_task() -> Case:
    return CommonITSFTTrainer, CommonITSFTConfig, {"commonit_metric": "task", "commonit_report": False}


@ORDERS("this package, by length")
def by_length() -> Case:
    return CommonITSFTTrainer, CommonITSFTConfig, {"commonit_metric": "length", "commonit_report": False}


# --- one epoch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """Inputs that all cases share."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerFast
    make_model: Callable[[int], Any]
    """Seed -> new model."""
    batch: int
    accumulation: int
    folder: Path
    """Output directory of training."""
    now: Callable[[], float]
    """The clock, in seconds."""


class Clock(TrainerCallback):
    """Record step times and tokens of the forward passes."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ends: list[float] = []
        self.tokens = self.computed = self.largest = 0

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(self.record, with_kwargs=True)
        self.start = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(self.now())

    def record(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        mask, count = inputs.get("attention_mask"), inputs["input_ids"].numel()
        self.tokens += count if mask is None else int(mask.sum())
        self.computed += count
        self.largest = max(self.largest, count)


def wall() -> float:
    """Return the wall time in seconds after the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(
    run: Run,
    trainer_class: type[SFTTrainer],
    config_class: type[SFTConfig],
    options: dict[str, Any],
    max_steps: int = -1,
    seed: int = 0,
) -> tuple[SFTTrainer, Clock]:
    """Train one epoch, or `max_steps`."""
    gc.collect()  # trainers hold reference cycles that keep earlier models in memory
    gpu = torch.cuda.is_available()
    config = config_class(
        **{
            "output_dir": str(run.folder),
            "per_device_train_batch_size": run.batch,
            "gradient_accumulation_steps": run.accumulation,
            "num_train_epochs": 1,
            "max_steps": max_steps,
            "seed": seed,
            "bf16": gpu,
            "use_cpu": not gpu,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **({"commonit_cache_dir": str(run.folder / "groups")} if config_class is CommonITSFTConfig else {}),
            **options,
        }
    )
    with torch.device("cuda" if gpu else "cpu"):
        model = run.make_model(seed)
    clock = Clock(run.now)
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=run.dataset,
        processing_class=run.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return trainer, clock


def epoch(run: Run, case: Case, tokens: int, number: int) -> dict[str, float]:
    """Return the figures of one epoch.

    Raises:
        RuntimeError: if it did not train all tokens of the data.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer, clock = train(run, *case, seed=number)
    seconds = clock.ends[-1] - clock.start
    trained, computed = over_ranks(clock.tokens, clock.computed)
    if trained < tokens:
        raise RuntimeError(f"{trained} of {tokens} tokens were trained")
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "steps": len(clock.ends),
        "step_seconds": seconds / len(clock.ends),
        "computed": computed / tokens,
        "largest": clock.largest,
        "parameters": trainer.model.num_parameters(),
        "gpu_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
    }


def over_ranks(*counts: int) -> list[int]:
    if not torch.distributed.is_initialized():
        return list(counts)
    total = torch.tensor(counts)
    total = total.cuda() if torch.distributed.get_backend() == "nccl" else total
    torch.distributed.all_reduce(total)
    return total.tolist()


# --- all cases --------------------------------------------------------------------------------------------------------


def resumed(
    function: Callable[[int], dict[str, float]], name: str, kept_in: Path, deadline: float, number: int
) -> dict[str, float]:
    """Return the saved figures of an earlier call, or call `function` and save its figures.

    Raises:
        Skipped: after the deadline.
    """
    kept = [json.loads(line) for line in kept_in.read_text().splitlines()] if kept_in.exists() else []
    for case, round_number, figures in kept:
        if (case, round_number) == (name, number):
            return figures
    if time.monotonic() > deadline:
        raise Skipped(f"time budget used with {len(kept)} epochs in {kept_in}: run it again to resume")
    figures = function(number)
    with kept_in.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([name, number, figures]) + "\n")
    return figures


def packs_a_micro_batch(run: Run) -> int:
    """Return the packs with about the tokens of a micro-batch; the mixture's rows have 148 on average."""
    return max(1, run.batch * 148 // PACK)


def find_cases(run: Run) -> tuple[dict[str, Case], dict[str, str]]:
    """Return the supported cases, and the reasons for unsupported ones."""
    cases, refused = {}, {}
    for form, form_options in FORMS.items():
        for order, function in ORDERS.present()[0].items():
            trainer_class, config_class, options = function()
            options = options | form_options
            if "packing" in form_options:
                options["per_device_train_batch_size"] = packs_a_micro_batch(run)
            try:
                train(run, trainer_class, config_class, options, max_steps=2)
                cases[f"{order}: {form}"] = trainer_class, config_class, options
            except ValueError as error:
                refused[f"{order}: {form}"] = str(error).splitlines()[0]
    return cases, refused


def run(settings: Settings) -> Report:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    deadline = time.monotonic() + 60 * (settings["minutes"] or float("inf"))
    reuse_freed_memory()
    mixture = read_mixture(settings.data)
    tokenizer = train_tokenizer(mixture, VOCABULARY)
    rows = tokenized(stratified_slice(mixture, settings["rows"], seed=0), tokenizer)
    tokens = int(Rows(rows).token_counts("total").sum())
    with tempfile.TemporaryDirectory() as folder:
        common = Run(
            dataset=rows.select_columns(["input_ids", "labels", "task"]),
            tokenizer=tokenizer,
            make_model=partial(llama, tokenizer, **MODELS[settings["model"]]),
            batch=settings["batch"],
            accumulation=settings["accumulation"],
            folder=Path(folder),
            now=wall,
        )
        cases, refused = find_cases(common)
        functions: dict[str, Callable[[int], dict[str, float]]] = {
            name: partial(epoch, common, case, tokens) for name, case in cases.items()
        }
        if settings["minutes"]:
            kept_in = settings.out / f"training-{settings['model']}-{settings['rows']}-rows.jsonl"
            functions = {
                name: partial(resumed, function, name, kept_in, deadline) for name, function in functions.items()
            }
        results = medians(paired_rounds(functions, settings["rounds"]), "tokens_per_second", BASE)
    parameters, gpu = results[BASE]["parameters"], torch.cuda.is_available()
    return Report(
        head={
            "data": f"{len(rows):,} rows of GSM8K, CodeAlpaca and APIBench, each with its share, {tokens:,} tokens of "
            f"a byte-level BPE of {VOCABULARY:,}",
            "training": f"epochs of a random Llama of {parameters / 1e6:,.1f} M weights{', bf16' * gpu}; {ranks} "
            f"rank{'s' * (ranks > 1)}, {common.batch} rows a micro-batch or packs of {PACK:,} tokens "
            f"({packs_a_micro_batch(common)}), {common.accumulation} micro-batches a step",
            "figures": f"medians of {settings['rounds']} rounds, ratios to {BASE!r} taken in each round; *real "
            "tokens*: those of the data, each counted once; *computed*: tokens that enter the model for each "
            "of the data's; *largest*: tokens of the largest micro-batch; without a kernel for sequences of different "
            "lengths, padding-free and packed rows attend through a mask over the whole micro-batch",
        },
        parts=[table(form, results, refused) for form in FORMS],
        results={"cases": results, "refused": refused},
        packages=("accelerate", "datasets", "numpy"),
        label=f"{ranks}-ranks" if ranks > 1 else "",
    )


def table(form: str, results: Round, refused: dict[str, str]) -> Table:
    ours = {name.removesuffix(f": {form}"): row for name, row in results.items() if name.endswith(f": {form}")}
    header = ["", "real tokens a second", f"× {BASE}", "lowest to highest", "steps", "a step, s", "computed", "largest"]
    gpu = torch.cuda.is_available()
    return Table(
        heading=form,
        header=[*header, "GPU memory, GB"] if gpu else header,
        rows=[
            [
                name,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                f"{row['steps']:.0f}",
                f"{row['step_seconds']:.2f}",
                f"{row['computed']:.2f}",
                f"{row['largest']:,.0f}",
                *([f"{row['gpu_gigabytes']:.1f}"] if gpu else []),
            ]
            for name, row in ours.items()
        ],
        skipped={name: why for name, why in refused.items() if name.endswith(f": {form}")},
        bars={name: row["ratio"] for name, row in ours.items()},
        bars_of=f"real tokens a second, × {BASE}",
        goal=GOAL if form == "padded" else None,
    )
