"""Compare compositions of an epoch: steps, pure share, repeats, cost and peak, on real data.

Steps: (1) read and tokenise the mixture (GSM8K, CodeAlpaca, APIBench); (2) group it by each of `METRICS`; (3) plan
epochs with each of `COMPOSITIONS`; (4) cost the micro-batches that the ranks read, and those that plain bisection cuts
from the same steps; (5) time the planning of many rows with each composition beside `torch.randperm`.

    python -m benchmarks compositions --size full --data FOLDER

Cost: two minutes of one CPU core, and once some minutes to encode the prompts (the quick size leaves embeddings out).
"""

import itertools
import time
from typing import Any

import numpy as np
import torch

from benchmarks.balance import bisection, dealt_in_turns, measure
from benchmarks.common import Report, Settings, Table
from benchmarks.mixture import REFERENCE, VOCABULARY, encoder, read_mixture, tokenized, train_tokenizer
from benchmarks.padding import BLOCKS, STEP, A, B, Ints, W, figures
from commonit_trl import plan_epoch
from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import build_grouper, fit_assign_cached
from commonit_trl.plan import EpochPlan
from commonit_trl.rows import Rows

TITLE = "Compositions of an epoch"
METRICS: dict[str, dict[str, Any]] = {
    "task": {"commonit_metric": "task"},
    "length": {"commonit_metric": "length"},
    "length, total": {"commonit_metric": "length", "commonit_length_of": "total"},
    "embedding, MMLU reference": {"commonit_metric": "embedding"},
    "task+length": {"commonit_metric": "task+length"},
    "task+length, total": {"commonit_metric": "task+length", "commonit_length_of": "total"},
}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "keep": {},
    "mix": {"remainder": "mix"},
    "mix, fraction 0.5": {"remainder": "mix", "pure_fraction": 0.5},
    "mix, fraction 0": {"remainder": "mix", "pure_fraction": 0.0},
}
GEOMETRY = {"micro_batch_size": B, "world_size": W, "accumulation_steps": A}
RANDPERM = "torch.randperm"
SIZES = {
    "quick": {"seeds": 2, "metrics": [name for name in METRICS if "embedding" not in name], "rows": 1e6, "rounds": 3},
    "full": {"seeds": 5, "metrics": list(METRICS), "rows": 1e7, "rounds": 5},
}


def measure_epoch(plan: EpochPlan, lengths: Ints) -> dict[str, float]:
    """Measure the micro-batches of an epoch, and the peak of plain bisection over the same steps."""
    rows, sizes = plan.indices, np.diff(plan.offsets).reshape(-1, BLOCKS)
    summary = plan.summary()
    plain = measure(bisection, dealt_in_turns, lengths[rows], sizes.sum(axis=1), A, W)
    return {
        **figures((lengths[rows], sizes)),
        "peak_of_bisection": plain["peak"],
        "steps": summary.num_steps,
        "plain_steps": summary.baseline_steps,
        "pure": summary.pure_steps / summary.num_steps,
        "mixed_rows": summary.mixed_samples / len(rows),
        "repeated": summary.repeated,
    }


def time_plans(rows: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time planning epochs of many rows; return the median seconds, and the ratios to `torch.randperm`."""
    group_ids = np.random.default_rng(0).integers(0, 57, rows)
    cases = {
        RANDPERM: lambda: torch.randperm(rows),
        **{
            name: (lambda options=options: plan_epoch(group_ids, **GEOMETRY, **options))
            for name, options in {**COMPOSITIONS, "mix, ascending": {"remainder": "mix", "order": "ascending"}}.items()
        },
    }

    def seconds(name: str) -> float:
        begin = time.perf_counter()
        cases[name]()
        return time.perf_counter() - begin

    timed = [{name: seconds(name) for name in cases} for _ in range(rounds)]
    medians_of = {name: float(np.median([each[name] for each in timed])) for name in cases}
    ratios = {name: float(np.median([each[name] / each[RANDPERM] for each in timed])) for name in cases}
    return medians_of, ratios


def table(metric: str, results: dict[str, dict[str, float]]) -> Table:
    return Table(
        heading=f"commonit_metric: {metric}",
        header=[
            *("", "steps (plain)", "pure steps", "rows in mixed steps", "repeats", "by step", "by micro-step"),
            *("peak tokens", "of bisection's"),
        ],
        rows=[
            [
                name,
                f"{row['steps']:.0f} ({row['plain_steps']:.0f})",
                f"{row['pure']:.1%}",
                f"{row['mixed_rows']:.1%}",
                f"{row['repeated']:.0f}",
                f"{row['cost']:.3f}",
                f"{row['micro_step_cost']:.3f}",
                f"{row['peak']:,.0f}",
                f"{row['peak'] / row['peak_of_bisection']:.2f}",
            ]
            for name, row in results.items()
        ],
    )


def run(settings: Settings) -> Report:
    seconds, ratios = time_plans(int(settings["rows"]), settings["rounds"])
    rows = read_mixture(settings.data)
    measured = Rows(tokenized(rows, train_tokenizer(rows, VOCABULARY)))
    lengths = measured.token_counts("total")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for metric in settings["metrics"]:
        options = dict(METRICS[metric])
        if "embedding" in metric:
            reference = str(settings.data / REFERENCE)
            options |= {"commonit_embedding_model": encoder(), "commonit_reference_dataset": reference}
        grouper = build_grouper(CommonITArguments(**options), measured.columns)
        grouper, groups = fit_assign_cached(grouper, measured)
        results[metric] = {}
        for name, composition in COMPOSITIONS.items():
            plans = (
                plan_epoch(groups, lengths, **GEOMETRY, **composition, positions=grouper.positions(), seed=seed)
                for seed in range(settings["seeds"])
            )
            epochs = [measure_epoch(plan, lengths) for plan in plans]
            results[metric][name] = {
                figure: float(np.mean([epoch[figure] for epoch in epochs])) for figure in epochs[0]
            }
    speed = Table(
        heading=f"Planning {int(settings['rows']):.0e} rows",
        header=["", "seconds", "of torch.randperm's"],
        rows=[[name, f"{seconds[name]:.2f}", f"{ratios[name]:.2f}"] for name in seconds],
    )
    return Report(
        head={
            "data": f"{len(lengths)} rows of GSM8K, CodeAlpaca and APIBench, {lengths.sum():,} tokens of a byte-level "
            f"BPE of {VOCABULARY:,}; {B} samples a micro-batch, {W} ranks, {A} micro-batches a rank and step "
            f"({STEP} samples)",
            "figures": f"means of {settings['seeds']} seeds; *by step*: padded tokens of the slowest rank of each "
            "step, times the ranks, for each token; *by micro-step*: the same when ranks wait for the slowest in every "
            "micro-step; *peak tokens*: padded tokens of the largest micro-batch; *of bisection's*: relative to the "
            "peak when the same steps are cut into equal costs by bisection",
        },
        parts=[*itertools.starmap(table, results.items()), speed],
        results={**results, "planning": {"seconds": seconds, "ratios": ratios}},
    )
