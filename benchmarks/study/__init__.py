"""Compare every strategy with baseline batches, from one pretrained base model and with several seeds.

Steps: (1) cut the real mixture in halves; train a BPE and a small Llama from scratch on the first, in random batches:
the base of all runs; (2) for accumulation 1 and 4, choose the best learning rate of the baseline; (3) fine-tune the
base on rows of the second half with `commonit compare`, by every strategy; other rows of that half are held out; (4)
report the differences to the baseline, with their intervals, in tables and a plot.

    python -m benchmarks study --size full --data FOLDER          two cores of a CPU, no GPU
    python -m benchmarks study --size gpu --data FOLDER           a GPU; run again to resume after an interruption

The directory `work` keeps all results; finished parts are not repeated.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, Settings
from benchmarks.mixture import REFERENCE, encoder, llama, read_mixture, train_tokenizer
from benchmarks.study.tables import report
from commonit_trl.files import write_text

TITLE = "Does it help?"
_CPU: dict[str, Any] = {
    "jobs": 2,
    "batch": 8,
    "base_rate": 2e-3,
    "max_length": 384,
    "seeds": 5,
    "accumulations": [1, 4],
    "rates": [1e-4, 2e-4, 5e-4, 1e-3],
}
SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        **_CPU,
        "work": "out/study-quick",
        "hidden": 32,
        "layers": 2,
        "vocabulary": 2_000,
        "base_rows": 400,
        "base_epochs": 1,
        "train_rows": 200,
        "held_out_rows": 100,
        "seeds": 2,
    },
    "full": {
        **_CPU,
        "work": "out/study",
        "hidden": 128,
        "layers": 2,
        "vocabulary": 4_000,
        "base_rows": None,
        "base_epochs": 2,
        "train_rows": 2_000,
        "held_out_rows": 800,
    },
    "gpu": {
        **_CPU,
        "work": "out/study-gpu",
        "hidden": 768,
        "layers": 16,
        "vocabulary": 16_000,
        "base_rows": None,
        "base_epochs": 6,
        "base_rate": 6e-4,
        "rates": [3e-5, 1e-4, 3e-4],
        "max_length": 1_024,
        "train_rows": 5_000,
        "held_out_rows": 2_000,
    },
}
# `{reference}` is the MMLU dev set, as in the paper.
STRATEGIES = (
    "none",
    "task",
    "length:num_groups=4",
    "length:num_groups=8",
    "length:num_groups=16",
    "embedding:reference_dataset={reference}",
    "embedding:num_groups=8",
    "embedding:num_groups=32",
)
MICRO = ("task:purity=micro", "length:num_groups=8:purity=micro", "embedding:num_groups=32:purity=micro")
"""Equal to `STRATEGIES` if a step is one micro-batch."""
SECONDS_FILE = "seconds.json"


def run(settings: Settings) -> Report:
    """Run the unfinished parts, and report on all."""
    work = Path(settings["work"]).absolute()
    work.mkdir(parents=True, exist_ok=True)
    link(work, settings.data, encoder())
    parameters = prepare(settings, work)
    _timed(work, "base", train_base, settings, work)
    comparisons = {}
    for accumulation in settings["accumulations"]:
        rates = _timed(work, f"rates, {accumulation}", baseline_losses, settings, work, accumulation)
        best = min(rates, key=lambda rate: rates[rate])
        strategies = [*STRATEGIES, *(MICRO if accumulation > 1 else ())]
        name = f"accumulation-{accumulation}"
        comparison = _timed(
            work, name, fine_tune, settings, work, name, accumulation, best, strategies, settings["seeds"]
        )
        comparisons[accumulation] = comparison | {"rates": rates, "rate": best}
    seconds = json.loads((work / SECONDS_FILE).read_text(encoding="utf-8"))
    return report(settings, parameters, comparisons, seconds)


def link(work: Path, data: Path, model: str) -> None:
    """Link the reference and the encoder into `work` under short names."""
    for name, target in (("reference.jsonl", data / REFERENCE), ("encoder", Path(model))):
        if not (work / name).exists():
            (work / name).symlink_to(target.absolute())


def prepare(settings: Settings, work: Path) -> int:
    """Write missing halves, tokenizer and random model; return the model's number of parameters."""
    rows = read_mixture(settings.data)
    order = np.random.default_rng(0).permutation(len(rows))
    first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
    held_out, train = second[: settings["held_out_rows"]], second[settings["held_out_rows"] :]
    for folder, splits in (
        ("first_half", {"train": first[: settings["base_rows"]]}),
        ("second_half", {"train": train[: settings["train_rows"]], "test": held_out}),
    ):
        (work / folder).mkdir(exist_ok=True)
        for split, numbers in splits.items():
            lines = "".join(json.dumps(rows[number]) + "\n" for number in numbers)
            write_text(work / folder / f"{split}.jsonl", lines)
    tokenizer = train_tokenizer([rows[number] for number in first], settings["vocabulary"])
    model = llama(
        tokenizer,
        hidden_size=settings["hidden"],
        intermediate_size=2 * settings["hidden"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=max(2, settings["hidden"] // 64),
        num_key_value_heads=max(2, settings["hidden"] // 64),
        tie_word_embeddings=True,
    )
    if not (work / "random").exists():
        model.save_pretrained(work / "random-")
        tokenizer.save_pretrained(work / "random-")
        (work / "random-").rename(work / "random")  # atomic
    return model.num_parameters()


def train_base(settings: Settings, work: Path) -> None:
    """Train the random model on the first half with baseline batches."""
    if (work / "base").exists():
        return
    out = work / "base-"
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resume = ["--resume_from_checkpoint", str(checkpoints[-1])] if checkpoints else []
    _commonit(
        work,
        "sft",
        *_options(settings, "random", "first_half", out.name, settings["base_rate"]),
        *("--commonit_metric", "none", "--num_train_epochs", str(settings["base_epochs"])),
        *(
            "--gradient_accumulation_steps",
            "2",
            "--save_steps",
            "500",
            "--save_total_limit",
            "1",
            "--report_to",
            "none",
        ),
        *resume,
    )
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    out.rename(work / "base")


def baseline_losses(settings: Settings, work: Path, accumulation: int) -> dict[float, float]:
    """Return learning rate -> held-out loss of the baseline with one seed."""
    losses = {}
    for rate in settings["rates"]:
        name = f"rates/{accumulation}-{rate:g}"
        comparison = fine_tune(settings, work, name, accumulation, rate, ["none"], seeds=1)
        losses[rate] = comparison["strategies"][0]["loss"]["value"]
    return losses


def fine_tune(
    settings: Settings, work: Path, name: str, accumulation: int, rate: float, strategies: list[str], seeds: int
) -> dict[str, Any]:
    """Compare strategies on the second half; return the content of `compare.json`."""
    _commonit(
        work,
        "compare",
        *_options(settings, "base", "second_half", name, rate),
        *("--metrics", ",".join(strategies).format(reference="reference.jsonl"), "--seeds", str(seeds)),
        *("--held_out_rows", str(settings["held_out_rows"]), "--jobs", str(settings["jobs"])),
        *("--num_train_epochs", "1", "--gradient_accumulation_steps", str(accumulation)),
        *("--commonit_embedding_model", "encoder"),
    )
    return json.loads((work / name / "compare" / "compare.json").read_text(encoding="utf-8"))


def _options(settings: Settings, model: str, data: str, out: str, rate: float) -> list[str]:
    """Return training options; paths are relative to `work`, which may be moved."""
    on_gpu = settings.size == "gpu"
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "learning_rate": rate,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "linear",
        "max_length": settings["max_length"],
        "per_device_train_batch_size": settings["batch"],
        "per_device_eval_batch_size": 4 * settings["batch"],
        "gradient_checkpointing": "false",
        "dtype": "float32",
        "bf16": str(on_gpu).lower(),
        "use_cpu": str(not on_gpu).lower(),
        "logging_steps": 10,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _commonit(work: Path, *arguments: str) -> None:
    """Run `commonit` in `work`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        # As in `benchmarks.mixture.reuse_freed_memory`.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }
    done = subprocess.run([sys.executable, "-m", "commonit_trl", *arguments], cwd=work, env=environment)
    if done.returncode:
        sys.exit(
            f"commonit {arguments[0]} failed with exit code {done.returncode}: run the same command again to resume"
        )


def _timed(work: Path, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `step`, and add its wall time to that of earlier calls."""
    start = time.monotonic()
    try:
        return step(*arguments)
    finally:
        file = work / SECONDS_FILE
        seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 1)
        write_text(file, json.dumps(seconds))
