"""Evaluates a trained model on the paper's areas with EleutherAI's lm-evaluation-harness: pip install '.[eval]'.

    python example_configs/paper/evaluate_model.py out/paper/trl/llama-7b-flan-task --areas mmlu bbh gsm8k

An area is one of `AREAS`, or any other task of the harness or of a folder that `--include_path` names. Prints a table,
and with `--output` writes what it shows, and the scores of an area's sub-tasks, as JSON. A mistake in the arguments
ends as one line and exit code 2, before the model is loaded. The harness loads its data from the hub; a local task
file with local data needs none. One process, on the first GPU, else on the CPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from commonit_trl.config import nearest

AREAS: dict[str, tuple[str, int | None]] = {
    "mmlu": ("mmlu", 5),
    "bbh": ("bbh_cot_fewshot", None),
    "gsm8k": ("gsm8k_cot", None),
    "tydiqa": ("tydiqa_goldp", 1),
    "humaneval": ("humaneval", None),
}
"""Of each area of the paper that the harness has: the task, and the examples in a prompt; None for the task's own."""


class WrongArgument(ValueError):
    """What the user can put right."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate as `argv` (default: the arguments of the process) says; returns the exit code."""
    try:
        asked = parse(argv)
        tasks, manager = find_tasks(asked.areas, asked.include_path)
    except WrongArgument as error:
        print(f"evaluate_model.py: error: {error}", file=sys.stderr)
        return 2
    scores = evaluate(asked, tasks, manager)
    show(scores)
    if asked.output is not None:
        asked.output.write_text(json.dumps({"model": str(asked.model), "areas": scores}, indent=2), encoding="utf-8")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate_model.py", description="Evaluate a model on the paper's areas.")
    parser.add_argument("model", type=Path, help="directory of the model and its tokenizer")
    parser.add_argument("--areas", nargs="+", required=True, help=f"{', '.join(AREAS)}, or tasks of the harness")
    parser.add_argument("--include_path", type=Path, help="folder with task files of your own")
    parser.add_argument("--limit", type=int, help="no more than so many examples of each task: to try it out")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    parser.add_argument(
        "--run_generated_code",
        action="store_true",
        help="let humaneval run what the model writes, on this machine and unprotected: use one that may break",
    )
    parser.error = _raise_wrong_argument  # type: ignore[method-assign]
    asked = parser.parse_args(argv)
    if not (asked.model / "config.json").is_file():
        raise WrongArgument(f"{asked.model} holds no model: name the output_dir of a run, or one of its checkpoints.")
    if asked.include_path is not None and not asked.include_path.is_dir():
        raise WrongArgument(f"--include_path {asked.include_path} is no folder: name the one with your task files.")
    for option, value in (("--limit", asked.limit), ("--batch_size", asked.batch_size)):
        if value is not None and value < 1:
            raise WrongArgument(f"{option} {value} must be at least 1.")
    if asked.output is not None and not asked.output.parent.is_dir():
        raise WrongArgument(f"--output {asked.output}: there is no folder {asked.output.parent}: make it first.")
    if "humaneval" in asked.areas and not asked.run_generated_code:
        raise WrongArgument("--areas humaneval runs code that the model writes: add --run_generated_code if it may.")
    return asked


def _raise_wrong_argument(message: str) -> NoReturn:
    raise WrongArgument(message)


def find_tasks(areas: list[str], include_path: Path | None) -> tuple[dict[str, tuple[str, int | None]], Any]:
    """The task of each area with its number of examples, and the `TaskManager` that knows them all.

    Raises:
        WrongArgument: on an area that neither the harness nor `include_path` has a task for.
    """
    from lm_eval import __version__
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    tasks = {area: AREAS.get(area, (area, None)) for area in areas}
    for area, (task, _) in tasks.items():
        if task not in manager.all_tasks:
            raise WrongArgument(
                f"--areas {area}: neither lm-eval {__version__} nor --include_path has a task {task!r}; the nearest is "
                f"{nearest(task, [*AREAS, *manager.all_tasks])!r}."
            )
    return tasks, manager


def evaluate(asked: argparse.Namespace, tasks: dict[str, tuple[str, int | None]], manager: Any) -> dict[str, Any]:
    """Of each area: the task, how it was asked, and the harness's scores of it and of its sub-tasks."""
    if asked.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric, which is loaded with the task
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(asked.model), batch_size=asked.batch_size, device=device)
    scores = {}
    for area, (task, examples) in tasks.items():
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=examples,
            limit=asked.limit,
            task_manager=manager,
            log_samples=False,
            confirm_run_unsafe_code=asked.run_generated_code,
        )
        scores[area] = {
            "task": task,
            "lm_eval": lm_eval.__version__,
            "limit": asked.limit,
            "num_fewshot": results["n-shot"],
            "scores": results["results"],
        }
    return scores


def show(scores: dict[str, Any]) -> None:
    """Print each area's scores; where a task has no score as a whole, those of its sub-tasks."""
    from rich.console import Console
    from rich.table import Table

    table = Table("area", "task", "metric", "filter")
    for title in ("score", "standard error"):
        table.add_column(title, justify="right")
    for area, found in scores.items():
        whole = found["scores"].get(found["task"])
        for task, values in found["scores"].items() if whole is None else [(found["task"], whole)]:
            for name, value in values.items():
                metric, _, how = name.partition(",")
                if how and not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{how}", "")
                    table.add_row(area, task, metric, how, _number(value), _number(error))
    Console().print(table)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
