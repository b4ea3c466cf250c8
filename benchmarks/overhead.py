"""Measure the overhead of a step relative to TRL's if there is no padding to save.

Steps: (1) make rows of six tasks that all have the same number of tokens, so that every order of samples costs the
same; (2) in rounds over all cases, train an epoch with TRL's random order and with this package's groups, with and
without balanced lengths, metrics of each group included; (3) compare the seconds of a step and of making its batches,
for the demo's model, whose steps are short, and for a larger one.

    python -m benchmarks overhead

CPU seconds of one thread. Cost: two minutes for the quick size, fifteen for the full one; nothing is downloaded.
"""

import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import Cases, Report, Settings, Table, medians, paired_rounds
from benchmarks.mixture import llama, reuse_freed_memory
from benchmarks.training import MODELS, Case, Run, by_task, random_order, train
from commonit_trl.cli.demo import INITIAL_DIR, generate_rows, make_models

TITLE = "A step beside TRL's"
SIZES = {"quick": {"rows": 288, "rounds": 3}, "full": {"rows": 960, "rounds": 10}}
BASE = "TRL, random"
GOAL = 1.01
TASKS = 6
TOKENS = {"the demo's model": 40, "a larger model": 150}
BATCH, ACCUMULATION = 8, 2

CASES = Cases()
CASES(BASE)(random_order)
CASES("this package, by task")(by_task)


@CASES("this package, by task, arrangement off")
def not_arranged() -> Case:
    trainer, config, options = by_task()
    return trainer, config, options | {"commonit_balance_lengths": False}


def equal_rows(rows: int, tokens: int, vocabulary: int) -> Dataset:
    ids = np.random.default_rng(0).integers(2, vocabulary, size=(rows, tokens))
    return Dataset.from_dict({"input_ids": ids.tolist(), "task": [f"task {row % TASKS}" for row in range(rows)]})


def runs(folder: Path, rows: int) -> dict[str, Run]:
    """Return model name -> run."""
    make_models(folder, generate_rows(seed=0)[0], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / INITIAL_DIR)
    models = {
        "the demo's model": lambda seed: AutoModelForCausalLM.from_pretrained(folder / INITIAL_DIR),
        "a larger model": partial(llama, tokenizer, **MODELS["small"]),
    }
    return {
        name: Run(
            dataset=equal_rows(rows, TOKENS[name], len(tokenizer)),
            tokenizer=tokenizer,
            make_model=make_model,
            batch=BATCH,
            accumulation=ACCUMULATION,
            folder=folder / "out",
            now=time.process_time,
        )
        for name, make_model in models.items()
    }


def figures(run: Run, case: Case, number: int) -> dict[str, float]:
    """Return the CPU seconds of a step, and of making its batches."""
    trainer, clock = train(run, *case, seed=number)
    start = time.process_time()
    batches = sum(1 for _ in trainer.get_train_dataloader())
    loading = (time.process_time() - start) * ACCUMULATION / batches
    step = statistics.median(after - before for before, after in pairwise(clock.ends))
    return {"step_seconds": step, "loading_seconds": loading}


def run(settings: Settings) -> Report:
    torch.set_num_threads(1)
    reuse_freed_memory()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, what in runs(Path(folder), settings["rows"]).items():
            cases = {name: partial(figures, what, function()) for name, function in CASES.present()[0].items()}
            results[model] = medians(paired_rounds(cases, settings["rounds"]), "step_seconds", BASE)
    return Report(
        head={
            "data": f"{settings['rows']:,} rows of {TASKS} tasks, all of {' or '.join(map(str, TOKENS.values()))} "
            f"tokens; {BATCH} rows a micro-batch, {ACCUMULATION} micro-batches a step",
            "figures": f"CPU seconds of one thread: medians of {settings['rounds']} rounds of the medians of an "
            f"epoch's steps, ratios taken in each round; goal: {GOAL}",
        },
        parts=[table(model, rows) for model, rows in results.items()],
        results=results,
    )


def table(model: str, results: dict[str, dict[str, float]]) -> Table:
    return Table(
        heading=model,
        header=["", "a step, ms", f"× {BASE}", "lowest to highest", "making its batches, ms", "share of the step"],
        rows=[
            [
                name,
                f"{row['step_seconds'] * 1e3:.1f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
                f"{row['loading_seconds'] * 1e3:.2f}",
                f"{row['loading_seconds'] / row['step_seconds']:.2%}",
            ]
            for name, row in results.items()
        ],
        bars={name: row["ratio"] for name, row in results.items()},
        bars_of=f"a step, × {BASE}",
        goal=GOAL,
    )
