"""`commonit compare`: does CommonIT help this model on these data, and with which metric?

Every strategy trains with every seed, from the same weights, on the same rows, for the same number of epochs. Each run
is measured on the same held-out rows. The result is each strategy's difference to the baseline, with its interval.
"""

import argparse
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from xxhash import xxh3_128

from commonit_trl.cli import quiet
from commonit_trl.cli.data import check_rows, load_all_splits, named_data, split_of
from commonit_trl.cli.options import Options, check_number
from commonit_trl.cli.quiet import Screen
from commonit_trl.cli.sft import model_config
from commonit_trl.compare.comparison import compare
from commonit_trl.compare.runs import RunResult, claimed, directory_of, execute, read_result
from commonit_trl.compare.strategies import BASELINE, parse_strategies, runs_of
from commonit_trl.compare.tasks import check_tasks, hash_folder
from commonit_trl.compare.view import print_comparison, write_html
from commonit_trl.config import OPTIONS, parts_of
from commonit_trl.files import write_text

COMPARE_DIR = "compare"
PAGE_FILE, NUMBERS_FILE = "compare.html", "compare.json"
# They come last, so they win: a comparison keeps no models, and measures the held-out rows one by one.
FLAGS = (
    *("--save_strategy", "no", "--load_best_model_at_end", "false", "--push_to_hub", "false", "--report_to", "none"),
    *("--disable_tqdm", "true", "--eval_packing", "false", "--commonit_report", "false"),
)
_NOT_COMPARED = {"output_dir", "logging_dir", "run_name", "local_rank", "hub_token", *OPTIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `commonit compare` has."""
    add = parser.add_argument
    add(
        "--metrics",
        metavar="METRIC[:OPTION=VALUE],...",
        default="none,task,length,embedding",
        help="strategies, such as none,task,length:num_groups=16,task:purity=micro (default: %(default)s)",
    )
    add("--seeds", type=int, metavar="N", default=3, help="runs per strategy (default: %(default)s)")
    add("--train_rows", type=int, metavar="N", help="train on N random rows (default: all)")
    add(
        "--held_out_rows",
        type=int,
        metavar="N",
        default=1_000,
        help="measure on at most N random rows of the test split; without that split, hold out N training rows "
        "(default: %(default)s)",
    )
    add(
        "--lm_eval_tasks",
        metavar="TASK,...",
        help="also evaluate every model on these tasks of lm-evaluation-harness (pip install 'commonit-trl[eval]')",
    )
    add("--lm_eval_include_path", metavar="FOLDER", help="folder with task files of your own")
    add("--jobs", type=int, metavar="N", default=1, help="runs at a time (default: %(default)s)")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--only", metavar="RUN", help="do one run, such as length@0, in this process")
    quiet.add_arguments(parser)


def run(
    asked: argparse.Namespace, given: Options, launch_flags: Sequence[str], argv: Sequence[str], screen: Screen
) -> int:
    """Do the runs that have not finished, and print the comparison of all; return the exit code.

    Args:
        asked: the options of `add_arguments`.
        given: the options of `commonit sft`; the training arguments are an `SFTRecipeConfig`.
        launch_flags: for `accelerate launch`.
        argv: the arguments of `commonit compare`, for the processes of its runs.
        screen: where to print.

    Raises:
        ValueError: on options, data or a model that cannot be used, and on results of other settings.
    """
    _check(asked, given)
    args = given.training
    strategies = parse_strategies("--metrics", asked.metrics)
    if BASELINE not in (strategy.name for strategy in strategies):
        raise ValueError(f"--metrics {asked.metrics}: the baseline {BASELINE!r} is missing. Add it.")
    output_dir = Path(args.output_dir) / COMPARE_DIR
    runs = {each.name: each for each in runs_of(strategies, args.seed, asked.seeds)}
    # If one strategy groups by task, a mixture has its column of entries in all runs, so that all have the same rows.
    args.commonit_metric = "task" if any("task" in parts_of(strategy.metric) for strategy in strategies) else "none"
    model_config(given.model, args)
    train, held_out = _load(asked, given)
    tasks = [task.strip() for task in (asked.lm_eval_tasks or "").split(",") if task.strip()]
    task_folder: str | None = asked.lm_eval_include_path
    if tasks:
        check_tasks(tasks, task_folder)
    elif task_folder is not None:
        raise ValueError(f"--lm_eval_include_path {task_folder}: no task is named. Add --lm_eval_tasks.")
    shared = {  # what all runs share and affects their results; `seed` draws the rows
        **{name: value for name, value in args.to_dict().items() if name not in _NOT_COMPARED},
        **vars(given.script),
        **vars(given.model),
        **vars(given.mixture),
        **{name: getattr(asked, name) for name in ("train_rows", "held_out_rows", "lm_eval_tasks")},
        **{f"version of {name}": version(name) for name in ("commonit-trl", "torch", "transformers", "trl")},
        "options of the launcher": launch_flags,
        "content of the rows": [_hash(train), _hash(held_out)],
        "version of lm_eval": version("lm_eval") if tasks else None,
        "content of lm_eval_include_path": None if task_folder is None else hash_folder(task_folder),
    }
    settings = {}
    for name, each in runs.items():
        values = shared | each.strategy.settings(args) | {"seed of the run": each.seed}
        settings[name] = json.loads(json.dumps(values, default=str))
    if asked.only is not None:
        if asked.only not in runs:
            raise ValueError(f"--only {asked.only}: no such run. Name one of {', '.join(runs)}.")
        each, directory = runs[asked.only], directory_of(output_dir, runs[asked.only])
        for name, value in each.strategy.settings(args).items():
            setattr(args, name, value)
        args.output_dir, args.seed, args.data_seed = str(directory), each.seed, None
        from trl import is_conversational

        from commonit_trl.compare.one_run import train_and_measure

        with claimed(directory):
            train_and_measure(
                given.model,
                args,
                train,
                held_out,
                directory,
                settings[each.name],
                tasks,
                task_folder,
                chat=is_conversational(train[0]),
            )
        return 0

    results = {name: read_result(output_dir, each, settings[name]) for name, each in runs.items()}
    waiting = [runs[name] for name, result in results.items() if result is None]
    failed = execute(output_dir, waiting, len(runs), argv, asked.jobs, screen.stderr) if waiting else {}
    for each in waiting:
        if each.name not in failed:
            results[each.name] = read_result(output_dir, each, settings[each.name])
    finished: list[RunResult] = [result for result in results.values() if result is not None]
    comparison = compare(finished, train_rows=len(train), failed=failed, at_a_time=asked.jobs)
    numbers = json.dumps(comparison.to_json(), indent=1)
    screen.log_dir = output_dir
    write_text(output_dir / NUMBERS_FILE, numbers)
    write_html(output_dir / PAGE_FILE, comparison)
    if asked.json:
        print(numbers, file=screen.stdout)
    else:
        print_comparison(comparison, output_dir / PAGE_FILE, Console(file=screen.stdout, highlight=False))
    return 1 if failed else 0


def _check(asked: argparse.Namespace, given: Options) -> None:
    for name, least in (("seeds", 1), ("jobs", 1), ("train_rows", 1), ("held_out_rows", 2)):
        check_number(f"--{name}", getattr(asked, name), least)
    if given.training.max_steps > 0:
        raise ValueError(
            f"max_steps={given.training.max_steps}: the size of steps depends on the metric, so the runs would see "
            "different numbers of samples. Set num_train_epochs, and --train_rows N for a shorter comparison."
        )
    if given.script.dataset_streaming or given.mixture.streaming:
        option = "streaming" if given.mixture.streaming else "dataset_streaming"
        raise ValueError(f"{option}=True: a comparison needs every row beforehand. Set it to False.")
    if "RANK" in os.environ and asked.only is None:
        raise ValueError(
            "A launcher has started this process, and commonit compare starts its own. Run it without a launcher; "
            "--num_processes N sets the ranks of each run."
        )


def _load(asked: argparse.Namespace, given: Options) -> tuple[Dataset, Dataset]:
    """Return the training rows and the held-out rows, which are the same for all runs."""
    splits, train_split, test_split, _ = load_all_splits(given)
    seed = given.training.seed
    train = split_of(splits, train_split, "Training", "dataset_train_split")
    for rows in (train, splits.get(test_split)):
        check_rows(rows, given)
    if test_split in splits:
        held_out = _some(splits[test_split], asked.held_out_rows, seed)
    elif len(train) <= asked.held_out_rows:
        raise ValueError(
            f"--held_out_rows {asked.held_out_rows}: no training row would remain, since {named_data(given)} has "
            f"{len(train)} rows and no split {test_split!r}. Hold out fewer rows, or give data with that split."
        )
    else:
        parts = train.train_test_split(test_size=asked.held_out_rows, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return _some(train, asked.train_rows, seed), held_out


def _some(rows: Dataset, most: int | None, seed: int) -> Dataset:
    return rows if most is None or len(rows) <= most else rows.shuffle(seed=seed).select(range(most))


def _hash(rows: Dataset) -> str:
    """Return a hash of all rows and columns, in order."""
    digest = xxh3_128(str(rows.column_names).encode())
    for table in rows.with_format("arrow").iter(10_000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
