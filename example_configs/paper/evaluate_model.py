"""Evaluate a trained model on the paper's areas with EleutherAI's lm-evaluation-harness (pip install '.[eval]').

    python example_configs/paper/evaluate_model.py out/paper/trl/llama-7b-flan-task --areas mmlu bbh gsm8k

An area is a key of `AREAS`, or any other task of the harness or of the folder `--include_path`. Prints a table;
`--output` writes the scores as JSON, with those of sub-tasks. Wrong arguments print one line and exit with code 2,
before the model is loaded. The harness downloads its data from the hub, except for task files with local data. Runs as
one process on the first GPU, or on the CPU.
"""

import argparse
import json
import os
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
"""Area -> task of the harness, and the number of examples in a prompt; None for the task's default."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """Evaluate the model in `argv` (default: the arguments of the process) and print its scores."""
    options, tasks, manager = parse(argv)
    scores = evaluate(options, tasks, manager)
    print_scores(scores)
    if options.output is not None:
        text = json.dumps({"model": str(options.model), "areas": scores}, indent=2)
        options.output.write_text(text, encoding="utf-8")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, tuple[str, int | None]], Any]:
    """Return the options, the task and number of examples of each area, and the harness's `TaskManager`.

    Raises:
        SystemExit: an argument is wrong; one line on stderr names it.
    """
    parser = _Parser(prog="evaluate_model.py", description="Evaluate a model on the paper's areas.")
    parser.add_argument("model", type=Path, help="directory of the model and its tokenizer")
    parser.add_argument("--areas", nargs="+", required=True, help=f"{', '.join(AREAS)}, or tasks of the harness")
    parser.add_argument("--include_path", type=Path, help="folder with your own task files")
    parser.add_argument("--limit", type=int, help="maximum number of examples of each task")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    parser.add_argument(
        "--run_generated_code",
        action="store_true",
        help="execute the code that the model generates for humaneval, without a sandbox: use a disposable machine",
    )
    options = parser.parse_args(argv)
    if not (options.model / "config.json").is_file():
        parser.error(f"model={options.model}: not a model. Use the output_dir of a run or one of its checkpoints.")
    if options.include_path is not None and not options.include_path.is_dir():
        parser.error(f"--include_path={options.include_path}: not a folder. Use the folder with your task files.")
    for option, value in (("--limit", options.limit), ("--batch_size", options.batch_size)):
        if value is not None and value < 1:
            parser.error(f"{option}={value}: too small. Use at least 1.")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output={options.output}: no such folder. Create {options.output.parent} first.")
    if "humaneval" in options.areas and not options.run_generated_code:
        parser.error("--areas=humaneval: executes code that the model generates. Add --run_generated_code to allow it.")

    from lm_eval import __version__
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    tasks = {area: AREAS.get(area, (area, None)) for area in options.areas}
    for area, (task, _) in tasks.items():
        if task not in manager.all_tasks:
            known = nearest(task, [*AREAS, *manager.all_tasks])
            parser.error(f"--areas={area}: no task {task!r} in lm-eval {__version__} or --include_path. Use {known!r}?")
    return options, tasks, manager


def evaluate(options: argparse.Namespace, tasks: dict[str, tuple[str, int | None]], manager: Any) -> dict[str, Any]:
    """Map each area to its task, its settings, and the harness's scores of the task and its sub-tasks."""
    if options.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric of humaneval checks it when it is loaded
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(options.model), batch_size=options.batch_size, device=device)
    scores = {}
    for area, (task, examples) in tasks.items():
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=examples,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
            confirm_run_unsafe_code=options.run_generated_code,
        )
        scores[area] = {
            "task": task,
            "lm_eval": lm_eval.__version__,
            "limit": options.limit,
            "num_fewshot": results["n-shot"],
            "scores": results["results"],
        }
    return scores


def print_scores(scores: dict[str, Any]) -> None:
    """Print the scores of each area, or of its sub-tasks where the task has no score of its own."""
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
    main()
