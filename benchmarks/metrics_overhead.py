"""What the metrics of each group cost: the time of an optimizer step with them and without, paired in one run.

Steps: (1) make the demo's model and a larger Llama, and rows of six tasks that all have the same number of tokens, so
that all steps cost the same; (2) train each, two optimizer steps with the metrics of `commonit_trl.metrics` and two
without by turns, with everything logged after every step, which is the most that they can cost; and once more with
none, which shows what the comparison itself makes of equal steps; (3) compare the medians of neighbours' differences.

    python benchmarks/metrics_overhead.py

Cost: about six minutes of one CPU core; nothing is downloaded.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from real_data import RESULTS, machine, markdown_table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from trl import SFTTrainer

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer
from commonit_trl.demo import INITIAL_DIR, generate_rows, make_models

ROWS, TOKENS = 4_800, 40
WARM_UP = 8
TURN = 2  # steps with, then as many without; the first of each is timed


class Toggled(CommonITSFTTrainer):
    """Leaves the metrics out of every other turn, or of all."""

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


class Clock(TrainerCallback):
    """(step, seconds) from the beginning of a step to that of the next, logging included."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.perf_counter())


def equal_rows(vocabulary: int) -> Dataset:
    tokens = np.random.default_rng(0).integers(2, vocabulary, size=(ROWS, TOKENS))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "task": [f"task {row % 6}" for row in range(ROWS)]})


def step_times(folder: Path, model: Any, steps: int, ever: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of the steps with and without metrics, as many of each; unless `ever`, of steps without and without."""
    args = CommonITSFTConfig(
        output_dir=str(folder / "out"),
        commonit_metric="task",
        commonit_cache_dir=str(folder / "cache"),
        commonit_report=False,
        max_steps=WARM_UP + steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    clock = Clock()
    trainer = Toggled(
        model=model,
        args=args,
        train_dataset=equal_rows(model.config.vocab_size),
        processing_class=AutoTokenizer.from_pretrained(folder / INITIAL_DIR),
        callbacks=[clock],
    )
    trainer.ever = ever
    trainer.train()
    seconds = [after - before for before, after in zip(clock.begun, clock.begun[1:])]
    turns = ([], [])
    for step in range(WARM_UP, len(seconds) - len(seconds) % (2 * TURN)):
        if step % TURN == 0:  # the Trainer counts the step before it logs it
            turns[step // TURN % 2].append(seconds[step])
    return turns


def larger_llama(vocabulary: int) -> LlamaForCausalLM:
    """A Llama whose step takes about half a second on one core."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            intermediate_size=1152,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of the demo's model (default: %(default)s)")
    parser.add_argument("--larger_steps", type=int, default=100, help="of the larger one (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, generate_rows(seed=0)[0], seed=0)
        demo = AutoModelForCausalLM.from_pretrained(folder / INITIAL_DIR)
        models = {"the demo's": (demo, arguments.steps), "larger": (larger_llama(512), arguments.larger_steps)}
        for name, (model, steps) in models.items():
            nothing = statistics.median(a - b for a, b in zip(*step_times(folder, model, steps // 2, ever=False)))
            with_metrics, without = step_times(folder, model, steps)
            difference = statistics.median(a - b for a, b in zip(with_metrics, without))
            median = statistics.median(without)
            rows.append(
                {
                    "model": name,
                    "parameters": model.num_parameters(),
                    "pairs": len(without),
                    "median_ms": 1000 * median,
                    "median_with_ms": 1000 * statistics.median(with_metrics),
                    "median_difference_ms": 1000 * difference,
                    "overhead": difference / median,
                    "median_difference_of_equal_steps": nothing / median,
                }
            )
            print(rows[-1])
    today = datetime.date.today().isoformat()
    table = markdown_table(
        [
            "model",
            "weights",
            "pairs of steps",
            "step without, ms",
            "with, ms",
            "median difference, ms",
            "overhead",
            "of equal steps",
        ],
        [
            [
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                row["pairs"],
                f"{row['median_ms']:.1f}",
                f"{row['median_with_ms']:.1f}",
                f"{row['median_difference_ms']:.2f}",
                f"{row['overhead']:.2%}",
                f"{row['median_difference_of_equal_steps']:.2%}",
            ]
            for row in rows
        ],
    )
    text = (
        f"# What the metrics of each group cost, {today}\n\n`python benchmarks/metrics_overhead.py`\n\n{machine()}\n\n"
        f"{table}\n\nEverything is logged after every step. *median difference*: of neighbouring steps. "
        "*of equal steps*: the same comparison where neither has the metrics: its noise.\n"
    )
    (RESULTS / f"metrics_overhead-{today}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"metrics_overhead-{today}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
