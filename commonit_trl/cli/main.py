"""The `commonit` command: train, inspect, group, compare and demo.

This module parses and calls. User errors (options, files, settings that contradict each other) print one line to stderr
and exit with code 2. Other exceptions, and all exceptions during training, keep their traceback.
"""

import argparse
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from commonit_trl import __version__
from commonit_trl.cli import quiet
from commonit_trl.cli.options import Options, Parser, check_number, check_output_dir, parse_sft
from commonit_trl.cli.quiet import Screen, hide_unused_deepspeed
from commonit_trl.sanitize import escape, sanitize

if TYPE_CHECKING:
    from commonit_trl.cli.recipes import Recipe


class UserError(Exception):
    """An error that the user can fix; `main` prints it as one line."""


@contextlib.contextmanager
def user_errors(*also: type[Exception], when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn errors of this block into user errors.

    Args:
        also: exceptions to turn besides ValueError and OSError (a missing file, or a hub that cannot be reached).
        when: called on an error; the error passes unchanged if it returns False.
    """
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        yield
    except kinds as error:
        if not when():
            raise
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        argv: the command and its options; by default, the arguments of the process.
    """
    parser = Parser(
        prog="commonit",
        usage="commonit [--help] [--version] COMMAND [OPTIONS]",
        description="Instruction tuning in which every optimizer step holds samples of one group.",
        epilog="\n".join(f"commonit {name:9}{command.__doc__}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"commonit-trl {__version__}")
    # The deepspeed launcher passes this before the command; the environment has the same value.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="see commonit COMMAND --help")
    hide_unused_deepspeed()
    try:
        with user_errors():
            given = parser.parse_args(argv)
        return COMMANDS[given.command](given.options)
    except UserError as error:
        print(f"commonit: error: {sanitize(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
        return 1


def _sft(argv: list[str]) -> int:
    """train as `trl sft` does, with its flags and YAML files, and commonit_* options"""
    with _messages(sys.stderr):
        with user_errors(TypeError):  # a YAML value of the wrong type, which TRL's dataclasses do not check
            options, launch_flags = parse_sft(argv)
            from commonit_trl.cli import launch
            from commonit_trl.cli.data import check_rows, load_splits
            from commonit_trl.cli.sft import TrainingStarted, make_trainer, model_config

            processes = launch.prepare(launch_flags, "sft", argv)
        with user_errors():
            if processes is not None:
                launch.start(processes)
                return 0
            args = options.training
            _check_paths(args)
            model_config(options.model, args)
            train, evaluation = load_splits(options)
            for rows in (train, evaluation):
                check_rows(rows, options)
            trainer = make_trainer(options.model, args, train, evaluation)
        started = TrainingStarted()
        trainer.add_callback(started)
        with user_errors(when=lambda: not started.value):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
        trainer.accelerator.print(f"Model saved to {sanitize(args.output_dir)}.")
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=options.script.dataset_name)
            trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
        trainer.accelerator.end_training()
    return 0


def _inspect(argv: list[str]) -> int:
    """show the groups, steps and batches of metrics, before training"""
    with _quiet(argv) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import inspect

            asked, recipe = read_recipe("inspect", inspect.add_arguments, argv, screen.stdout)
        with user_errors():
            return inspect.run(recipe, asked, screen.stdout)


def _group(argv: list[str]) -> int:
    """fit groups ahead of training, or assign new rows to saved groups"""
    with _quiet(argv) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import group

            asked, recipe = read_recipe("group", group.add_arguments, argv, screen.stdout)
        with user_errors():
            return group.run(recipe, asked, screen)


def _compare(argv: list[str]) -> int:
    """train with several metrics and seeds, and compare held-out losses"""
    # A single run trains, so it prints the messages of libraries, as `commonit sft` does.
    is_run = any(part.split("=")[0] == "--only" for part in argv)
    with _quiet(argv, verbose=is_run) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import compare, launch

            asked, options, launch_flags = read_comparison(argv, screen.stdout)
            processes = launch.prepare(launch_flags, "compare", argv) if asked.only is not None else None
        with user_errors():
            if processes is not None:
                launch.start(processes)
                return 0
            _check_paths(options.training)
            return compare.run(asked, options, launch_flags, argv, screen)


def _demo(argv: list[str]) -> int:
    """show the method on generated data: no GPU, no download"""
    # The demo sets its own grouping options, so its user cannot act on warnings about them.
    with _quiet(argv, level=logging.ERROR) as screen:
        from commonit_trl.cli import demo

        parser = Parser(prog="commonit demo", description=_demo.__doc__, stdout=screen.stdout)
        demo.add_arguments(parser)
        with user_errors():
            asked = parser.parse_args(argv)
            check_number("max_steps", asked.max_steps, 1)
            check_number("seed", asked.seed, 0, 2**32 - 1)
            check_output_dir(asked.output_dir)
        return demo.run(asked, screen)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sft": _sft,
    "inspect": _inspect,
    "group": _group,
    "compare": _compare,
    "demo": _demo,
}


class _Formatter(logging.Formatter):
    """Escapes names of files and groups, which must not act on the terminal; messages may have several lines."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n")


@contextlib.contextmanager
def _messages(stderr: TextIO, level: int = logging.INFO) -> Iterator[None]:
    """Print this package's messages to `stderr`: on rank 0 from `level` up, on other ranks warnings."""
    logger, handler = logging.getLogger("commonit_trl"), logging.StreamHandler(stderr)
    handler.setFormatter(_Formatter("%(levelname)s commonit: %(message)s"))
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _quiet(argv: list[str], *, verbose: bool = False, level: int = logging.INFO) -> Iterator[Screen]:
    """Log the messages of libraries, unless `verbose` or the option `--verbose` is set; print this package's."""
    with quiet.quiet_libraries(verbose=verbose or "--verbose" in argv) as screen, _messages(screen.stderr, level):
        yield screen


def read_recipe(
    command: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: list[str],
    stdout: TextIO | None = None,
) -> tuple[argparse.Namespace, "Recipe"]:
    """Return the options of `command` itself, and the recipe that the data and the other options describe."""
    from commonit_trl.cli import recipes
    from commonit_trl.cli.group import asked_strategies

    parser = Parser(
        prog=f"commonit {command}",
        usage=f"commonit {command} [DATA ...] [--config FILE.yaml | --axolotl FILE.yml] [OPTIONS]",
        description=COMMANDS[command].__doc__,
        epilog="DATA: hub names, directories or files. Takes all options of commonit sft too: see its --help.",
        stdout=stdout,
    )
    recipes.add_arguments(parser)
    add_arguments(parser)
    data = list(itertools.takewhile(lambda part: not part.startswith("-"), argv))
    asked, flags = parser.parse_known_args(argv[len(data) :])
    if asked.axolotl is not None:
        if data or flags:
            raise ValueError(
                f"--axolotl {asked.axolotl} and {(data or flags)[0]}: the recipe sets data and options. Remove one."
            )
        return asked, recipes.read_foreign_recipe("axolotl", asked.axolotl)
    flags = [*recipes.data_flags(data), *flags, *recipes.FLAGS]
    options, launch_flags = parse_sft(flags, recipes.PreparationConfig, f"commonit {command}")
    strategies = asked_strategies(options.training.commonit_metric, asked.compare, asked.load)
    return asked, recipes.sft_recipe(
        options,
        metrics=[strategy.metric for strategy in strategies],
        tokenizer=asked.tokenizer,
        world_size=recipes.num_processes(launch_flags),
    )


def read_comparison(argv: list[str], stdout: TextIO | None = None) -> tuple[argparse.Namespace, Options, list[str]]:
    """Return the options of `commonit compare` itself, and the result of `parse_sft` for the others."""
    from commonit_trl.cli import compare, recipes

    parser = Parser(
        prog="commonit compare",
        usage="commonit compare [--config FILE.yaml] [OPTIONS]",
        description=_compare.__doc__,
        epilog="Takes all options of commonit sft too: see its --help.",
        stdout=stdout,
    )
    compare.add_arguments(parser)
    asked, flags = parser.parse_known_args(argv)
    return asked, *parse_sft([*flags, *compare.FLAGS], recipes.SFTRecipeConfig, "commonit compare")


def _check_paths(args: Any) -> None:
    """Refuse an output directory that cannot be written and a missing checkpoint, before anything is loaded."""
    check_output_dir(args.output_dir)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r}: not a directory. Name a checkpoint, such as "
            f"{Path(args.output_dir) / 'checkpoint-500'}."
        )
