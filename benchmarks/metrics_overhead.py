"""Time an optimizer step with and without the metrics of each group, paired in one run.

Steps: (1) make the demo's model and a larger Llama, and rows of six tasks that all have the same number of tokens, so
that all steps cost the same; (2) train each, alternating two optimizer steps with the metrics of `trainer/metrics.py`
and two without, and log after every step, the most expensive case; repeat without metrics to measure the noise of the
comparison; (3) compare the medians of differences between neighbours.

    python -m benchmarks metrics_overhead --size full

Cost: about six minutes of one CPU core; nothing is downloaded.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from benchmarks.common import Report, Settings, Table
from benchmarks.overhead import ACCUMULATION, BATCH, runs
from benchmarks.training import Run, by_task, train
from commonit_trl import CommonITSFTTrainer

TITLE = "What the metrics of each group cost"
SIZES = {
    "quick": {"demo_steps": 80, "larger_steps": 16},
    "full": {"demo_steps": 800, "larger_steps": 100},
}
WARM_UP = 8
TURN = 2
"""Steps with metrics, then as many without. The time from the end of the first to the end of the second step counts:
it includes logging the first step's metrics."""


class Toggled(CommonITSFTTrainer):
    """Trainer that skips the metrics in every other turn, or in all."""

    ever = True

    def metrics_on(self) -> bool:
        return self.ever and self.state.global_step // TURN % 2 == 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.metrics_on():
            return super().training_step(*args, **kwargs)
        return SFTTrainer.training_step(self, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if self.metrics_on():
            return super()._get_grad_norm(*args, **kwargs)
        return SFTTrainer._get_grad_norm(self, *args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        if self.metrics_on():
            return super().log(*args, **kwargs)
        return SFTTrainer.log(self, *args, **kwargs)


class NeverOn(Toggled):
    ever = False


def step_times(run: Run, trainer_class: type[Toggled], steps: int) -> tuple[list[float], list[float]]:
    """Return the step seconds of both turns, equally many."""
    _, config_class, options = by_task()
    options |= {"logging_strategy": "steps", "logging_steps": 1}
    _, clock = train(run, trainer_class, config_class, options, max_steps=WARM_UP + steps)
    seconds = [after - before for before, after in pairwise(clock.ends)]
    turns: tuple[list[float], list[float]] = ([], [])
    for step in range(WARM_UP, len(seconds) - len(seconds) % (2 * TURN)):
        if step % TURN == 0:
            turns[step // TURN % 2].append(seconds[step])
    return turns


def figures(run: Run, steps: int) -> dict[str, float]:
    nothing = statistics.median(a - b for a, b in zip(*step_times(run, NeverOn, steps // 2)))
    with_metrics, without = step_times(run, Toggled, steps)
    difference = statistics.median(a - b for a, b in zip(with_metrics, without))
    median = statistics.median(without)
    return {
        "parameters": run.make_model(0).num_parameters(),
        "pairs": len(without),
        "median_ms": 1000 * median,
        "median_with_ms": 1000 * statistics.median(with_metrics),
        "median_difference_ms": 1000 * difference,
        "overhead": difference / median,
        "median_difference_of_equal_steps": nothing / median,
    }


def run(settings: Settings) -> Report:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        demo, larger = (
            replace(each, now=time.perf_counter) for each in runs(Path(name), BATCH * ACCUMULATION * 20).values()
        )
        results = {
            "the demo's": figures(demo, settings["demo_steps"]),
            "larger": figures(larger, settings["larger_steps"]),
        }
    table = Table(
        heading="A step with the metrics and without",
        header=[
            "model",
            "weights",
            "pairs of steps",
            "step without, ms",
            "with, ms",
            "median difference, ms",
            "overhead",
            "of equal steps",
        ],
        rows=[
            [
                model,
                f"{row['parameters'] / 1e6:.1f} M",
                row["pairs"],
                f"{row['median_ms']:.1f}",
                f"{row['median_with_ms']:.1f}",
                f"{row['median_difference_ms']:.2f}",
                f"{row['overhead']:.2%}",
                f"{row['median_difference_of_equal_steps']:.2%}",
            ]
            for model, row in results.items()
        ],
    )
    return Report(
        head={
            "figures": "wall seconds of one thread; everything is logged after every step; *median difference*: of "
            "neighbouring steps; *of equal steps*: the same comparison where neither has the metrics: its noise"
        },
        parts=[table],
        results=results,
    )
