"""Measure padding and waiting for several orders of the samples and several ways to cut a step.

Steps: (1) read the mixture (GSM8K, CodeAlpaca, APIBench) and tokenise it with a byte-level BPE trained on it; (2) group
it by task, by response length (8 bins) and by embedding (32 clusters); (3) plan epochs and apply all `CUTS` to the same
steps; (4) add ungrouped orders: random, and those of transformers; (5) compute the padded tokens of each micro-batch
and write a report. benchmarks/balance.py compares searches for the best cut.

    python -m benchmarks padding --size full --data FOLDER

A cut is a function from the lengths of some steps to `Batches`. Cost: a minute of one CPU core, and once some minutes
to encode the prompts (the quick size leaves embeddings out); nothing is downloaded.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from benchmarks.common import Cases, Report, Settings, Table
from benchmarks.mixture import VOCABULARY, encoder, read_mixture, tokenized, train_tokenizer
from commonit_trl import plan_epoch
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.cache import fit_assign_cached
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.task import TaskGrouper
from commonit_trl.plan.balance import balance
from commonit_trl.rows import Rows

TITLE = "Padding and waiting"
SIZES = {
    "quick": {"seeds": 2, "metrics": ["task", "length"]},
    "full": {"seeds": 5, "metrics": ["task", "length", "embedding"]},
}
GROUPERS: dict[str, tuple[str, Callable[[], Grouper], float]] = {
    "task": ("task", lambda: TaskGrouper(columns=["task"]), 1.10),
    "length": ("response length, 8 bins", LengthGrouper, 1.06),
    "embedding": ("embedding, 32 clusters", lambda: EmbeddingGrouper(model=encoder()), 1.10),
}
"""Metric -> name in the report, grouper, and upper goal for the relative cost."""
B, W, A = 8, 4, 2
BLOCKS = W * A
STEP = B * BLOCKS

Ints = NDArray[np.int64]
Batches = tuple[Ints, Ints]
"""Sample lengths in the order step, micro-step, rank; and (steps, A * W) micro-batch sizes."""
CUTS = Cases()
ORDERS = Cases()


# --- ways to cut a step into micro-batches ----------------------------------------------------------------------------


@CUTS("random order, equal sizes")
def as_shuffled(steps: list[Ints]) -> Batches:
    sizes = [np.full(BLOCKS, len(step) // BLOCKS) + (np.arange(BLOCKS) < len(step) % BLOCKS) for step in steps]
    return np.concatenate(steps), np.array(sizes)


@CUTS("transformers' rebalance")
def transformers_rebalance(steps: list[Ints]) -> Batches:
    lengths, sizes = [], []
    for step in steps:
        sampler = BatchRebalanceSampler([1] * len(step), len(step), dp_size=W, grad_accum=A)
        ranks = sampler._assign(step.tolist(), step.tolist())
        batches = [ranks[rank][micro_step] for micro_step in range(A) for rank in range(W)]
        lengths += batches
        sizes.append([len(batch) for batch in batches])
    return np.concatenate(lengths), np.array(sizes)


@CUTS("this package")
def ours(steps: list[Ints]) -> Batches:
    lengths = np.concatenate(steps)
    order, sizes = balance(lengths, np.array([len(step) for step in steps]), A, W)
    return lengths[order], sizes


# --- orders that are not pure -----------------------------------------------------------------------------------------


def whole_steps(lengths: Ints, rows: Ints) -> Batches:
    """Cut the rows into equal micro-batches in this order; drop the last step if it is not full."""
    rows = rows[: len(rows) // STEP * STEP]
    return lengths[rows], np.full((len(rows) // STEP, BLOCKS), B)


@ORDERS("random (TRL's default)")
def random_order(lengths: Ints, seed: int) -> Batches:
    return whole_steps(lengths, np.random.default_rng(seed).permutation(len(lengths)))


@ORDERS("transformers' group_by_length")
def group_by_length(lengths: Ints, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(B * A, lengths=lengths.tolist(), generator=generator)
    return whole_steps(lengths, np.array(list(sampler)))


@ORDERS("transformers' batch_rebalance")
def batch_rebalance(lengths: Ints, seed: int) -> Batches:
    rows = np.random.default_rng(seed).permutation(len(lengths))
    return transformers_rebalance(np.split(lengths[rows[: len(rows) // STEP * STEP]], len(rows) // STEP))


# --- figures ----------------------------------------------------------------------------------------------------------


def with_attention(lengths: Ints) -> Ints:
    """Return the cost of each sample with transformers' attention term, in thousandths of a token."""
    return lengths * 1_000 + lengths * lengths


def figures(batches: Batches, micro_steps: int = A, world_size: int = W) -> dict[str, float]:
    """Compute padding, costs and peak of the micro-batches."""
    lengths, sizes = batches
    longest = np.maximum.reduceat(lengths, np.r_[0, np.cumsum(sizes)[:-1]]).reshape(sizes.shape)
    padded = (longest * sizes).reshape(-1, micro_steps, world_size)
    attention = (with_attention(longest) * sizes).reshape(-1, micro_steps, world_size)
    return {
        "padding": 1 - lengths.sum() / padded.sum(),
        "cost": world_size * padded.sum(axis=1).max(axis=1).sum() / lengths.sum(),
        "micro_step_cost": world_size * padded.max(axis=2).sum() / lengths.sum(),
        "attention_cost": world_size * attention.sum(axis=1).max(axis=1).sum() / with_attention(lengths).sum(),
        "peak": float(padded.max()),
    }


def over_seeds(results: list[dict[str, float]]) -> dict[str, float]:
    means = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    return {**means, "cost_deviation": float(np.std([result["cost"] for result in results]))}


def compare(groups: Ints, lengths: Ints, seeds: int) -> dict[str, dict[str, float]]:
    """Compute the figures of all cuts of the same plans."""
    functions, _ = CUTS.present()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for seed in range(seeds):
        plan = plan_epoch(groups, micro_batch_size=B, world_size=W, accumulation_steps=A, seed=seed)
        steps = np.split(lengths[plan.indices], plan.offsets[BLOCKS:-1:BLOCKS])
        for name, cut in functions.items():
            results[name].append(figures(cut(steps)))
    return {name: over_seeds(each) for name, each in results.items()}


def table(heading: str, results: dict[str, dict[str, float]], goal: float | None) -> Table:
    return Table(
        heading=heading,
        header=["", "padding", "relative cost", "by micro-step", "with attention", "peak tokens"],
        rows=[
            [
                f"**{name}**" if name.startswith("this package") else name,
                f"{row['padding']:.1%}",
                f"{row['cost']:.3f} ± {row['cost_deviation']:.3f}",
                f"{row['micro_step_cost']:.3f}",
                f"{row['attention_cost']:.3f}",
                f"{row['peak']:,.0f}",
            ]
            for name, row in results.items()
        ],
        bars={name: row["cost"] for name, row in results.items()},
        bars_of="relative cost of a step",
        goal=goal,
    )


def run(settings: Settings) -> Report:
    rows = read_mixture(settings.data)
    measured = Rows(tokenized(rows, train_tokenizer(rows, VOCABULARY)))
    lengths, seeds = measured.token_counts("total"), settings["seeds"]
    results = {
        "no groups": {
            name: over_seeds([figures(order(lengths, seed)) for seed in range(seeds)])
            for name, order in ORDERS.present()[0].items()
        }
    }
    goals = {}
    for metric in settings["metrics"]:
        words, grouper, goal = GROUPERS[metric]
        _, groups = fit_assign_cached(grouper(), measured)
        results[f"pure by {words}"] = compare(groups, lengths, seeds)
        goals[f"pure by {words}"] = goal
    return Report(
        head={
            "data": f"{len(lengths)} rows of GSM8K, CodeAlpaca and APIBench, {lengths.sum():,} tokens of a byte-level "
            f"BPE of {VOCABULARY:,}; {B} samples a micro-batch, {W} ranks, {A} micro-batches a rank and step",
            "figures": f"means of {seeds} seeds, ± the standard deviation; *relative cost*: padded tokens of the "
            "slowest rank of each step, times the ranks, for each token; *by micro-step*: the same when ranks wait for "
            "the slowest in every micro-step; *with attention*: relative cost when a sample of n tokens costs n + "
            "n²/1000; *peak tokens*: padded tokens of the largest micro-batch",
        },
        parts=[table(name, each, goals.get(name)) for name, each in results.items()],
        results=results,
    )
