"""Time planning an epoch and reading one rank's micro-batches.

Steps: (1) make group ids (64 groups with Zipf's sizes, in random order) and log-normal token lengths; (2) for each
number of rows, time the first micro-batch and the whole epoch of each of `CASES`, each in its own process, in
several rounds over all cases; (3) divide by the time that `torch.randperm` takes in the same round; (4) measure the
memory of our plan and what a resume near the end of an epoch costs.

    python -m benchmarks plan_speed --size full

A case is a function from `Inputs` and a seed to an iterable of batches of row numbers; inputs (lists of lengths, say)
are made before timing starts. Cost: a minute for 10^6 rows, ten for 10^7, of one core.
"""

import collections
import importlib.machinery
import logging
import multiprocessing
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SkipBatchSampler
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from benchmarks.common import Cases, Report, Settings, Table, medians, paired_rounds
from commonit_trl import CommonITBatchSampler, plan_epoch

TITLE = "Planning an epoch"
SIZES = {"quick": {"rows": [1e6], "rounds": 3}, "full": {"rows": [1e6, 1e7, 1e8], "rounds": 5}}
B, W, A = 8, 8, 4
GROUPS = 64
FLOOR = "torch.randperm"
MOST_OF_PEERS = 10_000_000


@dataclass(frozen=True)
class Inputs:
    """Inputs of a case."""

    rows: int

    @cached_property
    def group_sizes(self) -> NDArray[np.int64]:
        shares = 1 / np.arange(1, GROUPS + 1)
        sizes = np.floor(self.rows * shares / shares.sum()).astype(np.int64)
        sizes[0] += self.rows - sizes.sum()
        return sizes

    @cached_property
    def group_ids(self) -> NDArray[np.int32]:
        ids = np.repeat(np.arange(GROUPS, dtype=np.int32), self.group_sizes)
        np.random.default_rng(1).shuffle(ids)
        return ids

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return np.clip(np.random.default_rng(2).lognormal(5.2, 0.7, self.rows), 8, 4096).astype(np.int32)

    @cached_property
    def length_list(self) -> list[int]:
        return self.lengths.tolist()

    @cached_property
    def length_column(self) -> Any:
        """As transformers' Trainer passes it, where the rows have a column of lengths."""
        return Dataset.from_dict({"length": self.lengths})["length"]

    def make(self) -> None:
        """Make all inputs before timing starts."""
        for name in ("group_ids", "lengths", *(("length_list", "length_column") if self.rows <= MOST_OF_PEERS else ())):
            getattr(self, name)


CASES = Cases()


@CASES(FLOOR)
def randperm(inputs: Inputs, seed: int) -> Iterable[Any]:
    torch.randperm(inputs.rows, generator=torch.Generator().manual_seed(seed))
    return iter([[]])


def ours(inputs: Inputs, seed: int, arranged: bool) -> CommonITBatchSampler:
    lengths = inputs.lengths if arranged else None
    geometry = {"micro_batch_size": B, "world_size": W, "accumulation_steps": A}
    return CommonITBatchSampler(partial(plan_epoch, inputs.group_ids, lengths, **geometry, seed=seed))


@CASES("this package, without lengths")
def ours_plain(inputs: Inputs, seed: int) -> Iterable[Any]:
    return ours(inputs, seed, arranged=False)


@CASES("this package, arranged by length")
def ours_arranged(inputs: Inputs, seed: int) -> Iterable[Any]:
    return ours(inputs, seed, arranged=True)


@CASES("stable argsort of 16-bit ids, groups shuffled")
def argsort(inputs: Inputs, seed: int) -> Iterable[Any]:
    """Lower bound for full steps of one group, in numpy; drops each group's tail."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(inputs.group_ids.astype(np.int16), kind="stable").astype(np.int32)
    starts = []
    for end, size in zip(np.cumsum(inputs.group_sizes), inputs.group_sizes):
        rng.shuffle(rows[end - size : end])
        starts.append(end - size + np.arange(0, size - size % (B * W * A), B * W * A))
    steps = rng.permutation(np.concatenate(starts))
    for low in range(0, len(steps), 256):
        yield from rows[steps[low : low + 256, None] + np.arange(B * A)].reshape(-1, B).tolist()


@CASES("torch RandomSampler", most=MOST_OF_PEERS)
def torch_random(inputs: Inputs, seed: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(seed)
    return BatchSampler(RandomSampler(range(inputs.rows), generator=generator), B, drop_last=False)


def length_grouped(lengths: Any, seed: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(seed)
    return BatchSampler(LengthGroupedSampler(B * A, lengths=lengths, generator=generator), B, drop_last=False)


@CASES("transformers group_by_length", most=MOST_OF_PEERS)
def group_by_length(inputs: Inputs, seed: int) -> Iterable[Any]:
    return length_grouped(inputs.length_list, seed)


@CASES("transformers group_by_length, of a datasets.Column", most=1e6)
def group_by_length_of_column(inputs: Inputs, seed: int) -> Iterable[Any]:
    return length_grouped(inputs.length_column, seed)


@CASES("transformers batch_rebalance", most=1e6)
def batch_rebalance(inputs: Inputs, seed: int) -> Iterable[Any]:
    return BatchRebalanceSampler(inputs.length_list, B * W * A, dp_size=W, grad_accum=A, seed=seed, drop_last=False)


@CASES("sentence-transformers proportional", most=MOST_OF_PEERS)
def proportional(inputs: Inputs, seed: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(seed)
    parts = [range(int(size)) for size in inputs.group_sizes]
    samplers = [
        DefaultBatchSampler(
            RandomSampler(part, generator=generator), batch_size=B, drop_last=False, generator=generator, seed=seed
        )
        for part in parts
    ]
    return ProportionalBatchSampler(
        dataset=ConcatDataset(parts), batch_samplers=samplers, generator=generator, seed=seed
    )


@CASES("mosaicml-streaming per_stream", package="mosaicml-streaming", most=MOST_OF_PEERS)
def per_stream(inputs: Inputs, seed: int) -> Iterable[Any]:
    """Make one rank's share of an epoch as StreamingDataset does, over streams without files."""
    StreamingDataset, generate_work, World = streaming()
    shard = 65_536
    shards = [[shard] * (size // shard) + [size % shard] * (size % shard > 0) for size in inputs.group_sizes.tolist()]
    per_stream = np.array([len(each) for each in shards])
    samples = np.concatenate(shards)
    dataset = SimpleNamespace(
        batch_size=B,
        num_canonical_nodes=1,
        initial_physical_nodes=None,
        partition_algo="relaxed",
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=9176 + seed,
        shuffle_block_size=4_000_000,
        epoch_seed_change=True,
        sampling_method="balanced",
        sampling_granularity=1,
        num_streams=GROUPS,
        shards_per_stream=per_stream,
        shard_offset_per_stream=per_stream.cumsum() - per_stream,
        samples_per_shard=samples,
        sample_offset_per_shard=samples.cumsum() - samples,
        streams=[SimpleNamespace(choose=size, proportion=size / inputs.rows) for size in inputs.group_sizes.tolist()],
    )
    dataset.resample_streams = partial(StreamingDataset.resample_streams, dataset)
    work = generate_work("per_stream", dataset, World(1, W, 1, 0), 0, 0)
    mine = work[0, 0, 0].reshape(-1, B)
    for low in range(0, len(mine), 8_192):
        yield from mine[low : low + 8_192].tolist()


def streaming() -> tuple[Any, Any, Any]:
    """Import mosaicml-streaming's StreamingDataset, generate_work and World."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        if name not in sys.modules:  # imported only for streaming.vision, unused here
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__getattr__ = lambda attribute: type(attribute, (), {})
            sys.modules[name] = module
    from streaming.base import StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    logging.getLogger("streaming").setLevel(logging.ERROR)
    return StreamingDataset, generate_work, World


def seconds(function: Callable[..., Iterable[Any]], inputs: Inputs, seed: int) -> dict[str, float]:
    """Return the CPU seconds until the first batch and until the end of the epoch."""
    start = time.process_time()
    batches = iter(function(inputs, seed))
    next(batches)
    first = time.process_time()
    collections.deque(batches, maxlen=0)
    return {"first_batch_seconds": first - start, "epoch_seconds": time.process_time() - start}


def in_a_process_of_its_own(function: Callable[[], Any]) -> Any:
    """Run `function` in a fork, without memory that earlier cases have touched and freed."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(function()))
    process.start()
    result = results.get()
    process.join()
    return result


def time_cases(inputs: Inputs, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Return the figures of each case, and the reasons for skipped ones."""
    functions, skipped = CASES.present(inputs.rows)
    warm_up = Inputs(min(inputs.rows, 200_000))
    for function in functions.values():
        seconds(function, warm_up, 0)  # imports and one-time setup of the process
    inputs.make()
    cases = {
        name: lambda seed, function=function: in_a_process_of_its_own(partial(seconds, function, inputs, seed))
        for name, function in functions.items()
    }
    return medians(paired_rounds(cases, rounds), "epoch_seconds", FLOOR), skipped


def bytes_per_row(inputs: Inputs, arranged: bool) -> dict[str, float]:
    """Measure a plan without its arguments: bytes held, and the peak of building it and reading one rank's batches."""
    tracemalloc.start()
    sampler = ours(inputs, 0, arranged)
    held = tracemalloc.get_traced_memory()[0]
    collections.deque(sampler, maxlen=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"held": held / inputs.rows, "peak": peak / inputs.rows}


def resume_seconds(inputs: Inputs) -> dict[str, float]:
    """Time a resume in the last hundredth of an epoch, through accelerate's `SkipBatchSampler`."""
    sampler = ours(inputs, 0, arranged=True)
    count = len(sampler) * 99 // 100
    taken = {}
    for name in ("walking", "told"):
        if name == "told":
            sampler.skip_first(count)
        start = time.process_time()
        next(iter(SkipBatchSampler(sampler, skip_batches=count)))
        taken[name] = time.process_time() - start
    return taken


def measure(rows: int, rounds: int) -> tuple[dict[str, Any], list[Table | str]]:
    """Return all figures for this many rows, and their part of the report."""
    inputs = Inputs(rows)
    cases, skipped = time_cases(inputs, rounds)
    plain, arranged = (cases[f"this package, {name}"] for name in ("without lengths", "arranged by length"))
    added = (arranged["epoch_seconds"] - plain["epoch_seconds"]) / rows * 1e6
    memory = {
        "without lengths": bytes_per_row(inputs, arranged=False),
        "arranged by length": bytes_per_row(inputs, arranged=True),
    }
    resume = resume_seconds(inputs)
    table = Table(
        heading=f"{rows:,} rows",
        header=["one epoch", "first micro-batch, ms", "epoch, s", "× torch.randperm", "µs a sample"],
        rows=[
            [
                name,
                f"{row['first_batch_seconds'] * 1e3:,.1f}" if name != FLOOR else "",
                f"{row['epoch_seconds']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['epoch_seconds'] / rows * 1e6:.3f}",
            ]
            for name, row in cases.items()
        ],
        skipped=skipped,
        bars={name: row["ratio"] for name, row in cases.items()},
        bars_of="one epoch, × torch.randperm",
    )
    text = (
        f"Balancing adds {added:.2f} µs per sample. Memory without the arguments, in bytes per row: "
        + "; ".join(f"{name}, {each['held']:.1f} held, {each['peak']:.1f} at the peak" for name, each in memory.items())
        + ". First micro-batch of the last hundredth of an epoch with lengths: "
        f"{resume['walking'] * 1e3:,.0f} ms through accelerate's wrapper, {resume['told'] * 1e3:,.1f} ms with "
        "`skip_first`."
    )
    figures = {
        "cases": cases,
        "arrangement_microseconds_per_sample": added,
        "bytes_per_row": memory,
        "resume_seconds": resume,
    }
    return figures, [table, text]


def run(settings: Settings) -> Report:
    torch.set_num_threads(1)  # as torchrun sets it
    rounds = settings["rounds"]
    results, parts = {}, []
    for rows in map(int, settings["rows"]):
        results[f"{rows}"], more = measure(rows, rounds)
        parts += more
    return Report(
        head={
            "inputs": f"{GROUPS} groups of Zipf's sizes; {B} samples a micro-batch, {W} ranks, {A} micro-batches a "
            f"rank and step; CPU seconds of one thread, medians of {rounds} rounds, ratios taken in each round",
        },
        parts=parts,
        results=results,
        packages=("sentence-transformers", "mosaicml-streaming", "numpy"),
    )
