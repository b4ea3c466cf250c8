"""How long does it take to plan an epoch and to walk through one rank's micro-batches of it?

Steps: (1) make group ids (64 groups with Zipf's sizes, in random order) and log-normal token lengths; (2) for each
number of rows, time the first micro-batch and the whole epoch of each of `CASES`, each in a process of its own, in
several rounds over all cases; (3) divide by the time that `torch.randperm` takes in the same round; (4) measure the
memory of our plan and what a resume near the end of an epoch costs; (5) write a report.

    python benchmarks/plan_speed.py --rows 1e6 1e7 --repeats 5

A case is a function from `Inputs` to an iterable of batches of row numbers, decorated with `case`. What it needs
besides (lists of lengths, imports) is made before the clock starts. Cost: a minute for 10^6 rows, ten for 10^7.
"""

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it

import numpy as np
import torch
from accelerate.data_loader import SkipBatchSampler
from numpy.typing import NDArray
from real_data import RESULTS, machine, markdown_table
from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from commonit_trl import CommonITBatchSampler, plan_epoch

B, W, A = 8, 8, 4
GROUPS = 64
FLOOR = "torch.randperm"


@dataclass(frozen=True)
class Inputs:
    """What the cases plan for."""

    rows: int
    seed: int = 0

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


Case = Callable[[Inputs, int], Iterable[Any]]
CASES: dict[str, tuple[Case, int, tuple[str, ...]]] = {}


def case(name: str, most_rows: float, needs: tuple[str, ...] = ()) -> Callable[[Case], Case]:
    """Register a case: up to how many rows it is run, and which inputs it needs."""

    def register(function: Case) -> Case:
        CASES[name] = (function, int(most_rows), needs)
        return function

    return register


@case(FLOOR, 1e9)
def randperm(inputs: Inputs, seed: int) -> Iterable[Any]:
    torch.randperm(inputs.rows, generator=torch.Generator().manual_seed(seed))
    return iter([[]])


def ours(inputs: Inputs, seed: int, arranged: bool) -> CommonITBatchSampler:
    lengths = inputs.lengths if arranged else None
    geometry = {"micro_batch_size": B, "world_size": W, "accumulation_steps": A}
    return CommonITBatchSampler(partial(plan_epoch, inputs.group_ids, lengths, **geometry, seed=seed))


@case("this package, without lengths", 1e9, ("group_ids",))
def ours_plain(inputs: Inputs, seed: int) -> Iterable[Any]:
    return ours(inputs, seed, arranged=False)


@case("this package, arranged by length", 1e9, ("group_ids", "lengths"))
def ours_arranged(inputs: Inputs, seed: int) -> Iterable[Any]:
    return ours(inputs, seed, arranged=True)


@case("torch RandomSampler", 1e7)
def torch_random(inputs: Inputs, seed: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(seed)
    return BatchSampler(RandomSampler(range(inputs.rows), generator=generator), B, drop_last=False)


@case("transformers group_by_length", 1e7, ("length_list",))
def group_by_length(inputs: Inputs, seed: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(B * A, lengths=inputs.length_list, generator=generator)
    return BatchSampler(sampler, B, drop_last=False)


@case("transformers batch_rebalance", 1e6, ("length_list",))
def batch_rebalance(inputs: Inputs, seed: int) -> Iterable[Any]:
    return BatchRebalanceSampler(inputs.length_list, B * W * A, dp_size=W, grad_accum=A, seed=seed, drop_last=False)


@case("sentence-transformers proportional", 1e7, ("group_sizes",))
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


def seconds(function: Case, inputs: Inputs, seed: int) -> tuple[float, float]:
    """To the first batch, and to the end of the epoch."""
    start = time.process_time()
    batches = iter(function(inputs, seed))
    next(batches)
    first = time.process_time()
    collections.deque(batches, maxlen=0)
    return first - start, time.process_time() - start


def in_a_process_of_its_own(function: Callable[[], Any]) -> Any:
    """The result of `function` in a fork: it finds no memory that an earlier case has touched and freed."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(function()))
    process.start()
    result = results.get()
    process.join()
    return result


def time_cases(inputs: Inputs, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over `repeats` rounds; the ratio to the floor is taken in each round."""
    cases = {name: function for name, (function, most_rows, _) in CASES.items() if inputs.rows <= most_rows}
    for name, function in cases.items():
        seconds(function, Inputs(10_000), 0)  # what is made once in a process
        for needed in CASES[name][2]:
            getattr(inputs, needed)
    rounds = [
        {name: in_a_process_of_its_own(partial(seconds, function, inputs, seed)) for name, function in cases.items()}
        for seed in range(repeats)
    ]
    floors = [times[FLOOR][1] for times in rounds]
    return {
        name: {
            "first_batch_seconds": statistics.median(times[name][0] for times in rounds),
            "epoch_seconds": statistics.median(times[name][1] for times in rounds),
            "ratio": statistics.median(times[name][1] / floor for times, floor in zip(rounds, floors, strict=True)),
        }
        for name in cases
    }


def bytes_per_row(inputs: Inputs, arranged: bool) -> float:
    """Peak of building a plan and walking through one rank's batches, beside the arguments."""
    tracemalloc.start()
    collections.deque(ours(inputs, 0, arranged), maxlen=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / inputs.rows


def resume_seconds(inputs: Inputs) -> dict[str, float]:
    """From a planned epoch to the first micro-batch of its last hundredth, through accelerate's wrapper that skips."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)

    results: dict[str, Any] = {}
    parts = []
    for rows in map(int, args.rows):
        inputs = Inputs(rows)
        cases = time_cases(inputs, args.repeats)
        plain, arranged = (cases[f"this package, {name}"] for name in ("without lengths", "arranged by length"))
        more = {
            "arrangement_microseconds_per_sample": (arranged["epoch_seconds"] - plain["epoch_seconds"]) / rows * 1e6,
            "peak_bytes_per_row": [bytes_per_row(inputs, arranged=False), bytes_per_row(inputs, arranged=True)],
            "resume_seconds": resume_seconds(inputs),
        }
        results[f"{rows}"] = {"cases": cases, **more}
        header = ["one epoch", "first micro-batch, ms", "epoch, s", "× torch.randperm", "µs a sample"]
        body = [
            [
                name,
                f"{row['first_batch_seconds'] * 1e3:,.1f}" if name != FLOOR else "",
                f"{row['epoch_seconds']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['epoch_seconds'] / rows * 1e6:.3f}",
            ]
            for name, row in cases.items()
        ]
        peak, resume = more["peak_bytes_per_row"], more["resume_seconds"]
        parts.append(
            f"## {rows:,} rows\n\n{markdown_table(header, body)}\n\n"
            f"Arranging adds {more['arrangement_microseconds_per_sample']:.2f} µs a sample. Peak memory beside the "
            f"arguments: {peak[0]:.1f} bytes a row, {peak[1]:.1f} with lengths. First micro-batch of the last "
            f"hundredth of an epoch with lengths: {resume['walking'] * 1e3:,.0f} ms through a wrapper that skips, "
            f"{resume['told'] * 1e3:,.1f} ms when the sampler is told first."
        )
        print(parts[-1], flush=True)

    date = datetime.date.today().isoformat()
    head = {
        "command": f"python benchmarks/plan_speed.py --rows {' '.join(f'{rows:g}' for rows in args.rows)} "
        f"--repeats {args.repeats}",
        "machine": machine(),
        "inputs": f"{GROUPS} groups of Zipf's sizes; {B} samples a micro-batch, {W} ranks, {A} micro-batches a rank "
        f"and step; CPU seconds of one thread, medians of {args.repeats} rounds, ratios taken in each round",
    }
    lines = "\n".join(f"- {key}: {value}" for key, value in head.items())
    report = "\n\n".join([f"# Planning an epoch, {date}", lines, *parts]) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"plan_speed-{date}-{max(args.rows):g}-rows"
    (args.out / f"{name}.md").write_text(report, encoding="utf-8")
    content = json.dumps({"date": date, **head, "results": results}, indent=2)
    (args.out / f"{name}.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
