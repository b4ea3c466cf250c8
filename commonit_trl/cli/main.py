"""The `commonit` command: train, inspect, group, compare and demo.

This module parses and calls. User errors (options, files, settings that contradict each other) print one line to stderr
and exit with code 2. Other exceptions, and all exceptions during training, keep their traceback.
"""

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, get_args, get_type_hints

from commonit_trl import __version__
from commonit_trl.cli import quiet
from commonit_trl.cli.quiet import Screen, hide_unused_deepspeed
from commonit_trl.config import OPTIONS, check_option_names, nearest
from commonit_trl.sanitize import escape, sanitize

if TYPE_CHECKING:
    from commonit_trl.cli.recipes import Recipe


class UserError(Exception):
    """An error that the user can fix; `main` prints it as one line."""


def _fail(message: str) -> NoReturn:
    raise ValueError(message)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, without the usage: with TRL's options that is pages long."""

    screen: Screen | None = None
    """The terminal of a quiet command, where help is printed."""

    def error(self, message: str) -> NoReturn:
        _fail(message)

    def print_help(self, file: Any = None) -> None:
        super().print_help(self.screen.stdout if file is None and self.screen is not None else file)


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
    parser = _Parser(
        prog="commonit",
        usage="commonit [--help] [--version] COMMAND [OPTIONS]",
        description="Instruction tuning in which every optimizer step holds samples of one group.",
        epilog="\n".join(f"commonit {name:9}{command.__doc__}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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


def _sft(argv: list[str]) -> int:
    """train as `trl sft` does, with its flags and YAML files, and commonit_* options"""
    with _messages(sys.stderr):
        with user_errors(TypeError):  # a YAML value of the wrong type, which TRL's dataclasses do not check
            (script_args, training_args, model_args, mixture), launch_flags = parse_sft(argv)
            from commonit_trl.cli import launch
            from commonit_trl.cli.data import check_rows, load_splits, named_data
            from commonit_trl.cli.sft import TrainingStarted, check_model, make_trainer

            processes = launch.prepare(launch_flags, "sft", argv)
        with user_errors():
            if processes is not None:
                launch.start(processes)
                return 0
            _check_paths(training_args)
            check_model(model_args, training_args)
            train, evaluation = load_splits(script_args, mixture, training_args)
            for rows in (train, evaluation):
                check_rows(rows, named_data(script_args, mixture), training_args.dataset_text_field)
            trainer = make_trainer(model_args, training_args, train, evaluation)
        started = TrainingStarted()
        trainer.add_callback(started)
        with user_errors(when=lambda: not started.value):
            trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model(training_args.output_dir)
        trainer.accelerator.print(f"Model saved to {sanitize(training_args.output_dir)}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
            trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
        trainer.accelerator.end_training()
    return 0


def _inspect(argv: list[str]) -> int:
    """show the groups, steps and batches of metrics, before training"""
    with _quiet(argv) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import inspect

            asked, recipe = read_recipe("inspect", inspect.add_arguments, argv, screen)
        with user_errors():
            return inspect.run(recipe, asked, screen.stdout)


def _group(argv: list[str]) -> int:
    """fit groups ahead of training, or assign new rows to saved groups"""
    with _quiet(argv) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import group

            asked, recipe = read_recipe("group", group.add_arguments, argv, screen)
        with user_errors():
            return group.run(recipe, asked, screen)


def _compare(argv: list[str]) -> int:
    """train with several metrics and seeds, and compare held-out losses"""
    # A single run trains, so it prints the messages of libraries, as `commonit sft` does.
    is_run = any(part.split("=")[0] == "--only" for part in argv)
    with _quiet(argv, verbose=is_run) as screen:
        with user_errors(TypeError):
            from commonit_trl.cli import compare, launch

            asked, arguments, launch_flags = read_comparison(argv, screen)
            processes = launch.prepare(launch_flags, "compare", argv) if asked.only is not None else None
        with user_errors():
            if processes is not None:
                launch.start(processes)
                return 0
            _check_paths(arguments[1])
            return compare.run(asked, *arguments, launch_flags=launch_flags, argv=argv, screen=screen)


def _demo(argv: list[str]) -> int:
    """show the method on generated data: no GPU, no download"""
    # The demo sets its own grouping options, so its user cannot act on warnings about them.
    with _quiet(argv, bars=False, level=logging.ERROR) as screen:
        from commonit_trl.cli import demo

        parser = _Parser(prog="commonit demo", description=_demo.__doc__, allow_abbrev=False)
        parser.screen = screen
        demo.add_arguments(parser)
        with user_errors():
            asked = parser.parse_args(argv)
            demo.check(asked)
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
def _quiet(argv: list[str], *, verbose: bool = False, bars: bool = True, level: int = logging.INFO) -> Iterator[Screen]:
    """Log the messages of libraries, unless `verbose` or the option `--verbose` is set; print this package's."""
    with (
        quiet.quiet_libraries(verbose=verbose or "--verbose" in argv, bars=bars) as screen,
        _messages(screen.stderr, level),
    ):
        yield screen


def read_recipe(
    command: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: list[str],
    screen: Screen | None = None,
) -> tuple[argparse.Namespace, "Recipe"]:
    """Return the options of `command` itself, and the recipe that the data and the other options describe."""
    from commonit_trl.cli import recipes
    from commonit_trl.cli.group import asked_metrics

    parser = _Parser(
        prog=f"commonit {command}",
        usage=f"commonit {command} [DATA ...] [--config FILE.yaml | --axolotl FILE.yml] [OPTIONS]",
        description=COMMANDS[command].__doc__,
        epilog="DATA: hub names, directories or files. Takes all options of commonit sft too: see its --help.",
        allow_abbrev=False,
    )
    parser.screen = screen
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
    before, after = recipes.sft_flags(data)
    arguments, launch_flags = parse_sft([*before, *flags, *after], recipes.PreparationConfig, f"commonit {command}")
    recipe = recipes.sft_recipe(
        *arguments,
        metrics=asked_metrics(arguments[1].commonit_metric, asked.compare, asked.load),
        tokenizer=asked.tokenizer,
        world_size=recipes.num_processes(launch_flags),
    )
    return asked, recipe


def read_comparison(argv: list[str], screen: Screen | None = None) -> tuple[argparse.Namespace, Any, list[str]]:
    """Return the options of `commonit compare` itself, and the result of `parse_sft` for the others."""
    from commonit_trl.cli import compare, recipes

    parser = _Parser(
        prog="commonit compare",
        usage="commonit compare [--config FILE.yaml] [OPTIONS]",
        description=_compare.__doc__,
        epilog="Takes all options of commonit sft too: see its --help.",
        allow_abbrev=False,
    )
    parser.screen = screen
    compare.add_arguments(parser)
    asked, flags = parser.parse_known_args(argv)
    return asked, *parse_sft([*flags, *compare.FLAGS], recipes.SFTRecipeConfig, "commonit compare")


def parse_sft(
    argv: list[str], training_config: type | None = None, prog: str = "commonit sft"
) -> tuple[Any, list[str]]:
    """Parse the options of `commonit sft` from flags and the file of `--config`.

    Args:
        argv: the flags.
        training_config: class of the training arguments; by default `CommonITSFTConfig`.
        prog: name of the command, for its help.

    Returns:
        TRL's script, training, model and mixture arguments, and the flags for `accelerate launch`.

    Raises:
        ValueError: on an option that neither TRL, CommonIT nor `accelerate launch` has (`trl sft` ignores these).
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
    from trl.scripts.utils import DatasetConfig

    from commonit_trl.cli import launch
    from commonit_trl.trainer.sft import CommonITSFTConfig

    kinds: Any = (ScriptArguments, training_config or CommonITSFTConfig, ModelConfig, DatasetMixtureConfig)
    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    parser = TrlParser(
        kinds,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]",
        description="The YAML file takes the same options; the command line overrides it.",
        allow_abbrev=False,
    )
    parser.error = _fail  # type: ignore[method-assign]
    known = [option.name for kind in kinds for option in fields(kind) if option.init]

    given, flags = config_parser.parse_known_args(argv)
    _, launch_flags = parser.parse_known_args(flags)
    from_launch = launch.option_names()
    for before, flag in itertools.pairwise(["", *launch_flags]):
        if flag.startswith("--"):
            _check_names([_name(flag)], known, from_launch)
        elif not before.startswith("--"):
            raise ValueError(f"{flag!r} is neither an option nor the value of one. Remove it.")
    if given.config is None:
        *options, _ = parser.parse_args_and_config(flags, return_remaining_strings=True)
        _check_numbers(options[1])
        return tuple(options), launch_flags
    config = _read_yaml(given.config)
    _check_names(config, [*known, "env"], from_launch)
    for kind in kinds:
        _check_types(config, _scalars(kind))
    entries = config.get("datasets") or []
    if not isinstance(entries, list):
        raise ValueError(f"datasets={entries!r}: not a list. Write '- path: NAME_OR_FILE' for each entry.")
    for entry in entries:
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"datasets: the entry {entry!r} has no path. Write '- path: NAME_OR_FILE'.")
        _check_names(entry, [option.name for option in fields(DatasetConfig)])
        _check_types(entry, {**get_type_hints(DatasetConfig), "split": str | None}, "datasets: ")
    overridden = {_name(flag) for flag in launch_flags}
    launch_config = ((name, value) for name, value in config.items() if name not in {*known, "env", *overridden})
    *options, _ = parser.parse_args_and_config(["--config", given.config, *flags], return_remaining_strings=True)
    _check_numbers(options[1])
    return tuple(options), [*launch.as_flags(launch_config), *launch_flags]


def _name(flag: str) -> str:
    return flag.split("=")[0].removeprefix("--").replace("-", "_")


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror}). Name a YAML file of options.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ValueError(f"--config {path}: not YAML. {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: no options. Write lines such as 'commonit_metric: length'.")
    return config


def _check_types(config: dict[str, Any], hints: dict[str, Any], prefix: str = "") -> None:
    """Check the types of values in a YAML file, which neither argparse nor TRL's dataclasses do."""
    from pydantic import TypeAdapter, ValidationError

    for name, value in config.items():
        try:
            TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{prefix}{name}={value!r} in the YAML file: {reason}. Change or remove it.") from None


def _scalars(kind: Any) -> dict[str, Any]:
    """Return the types of a TRL dataclass's text and number fields, by name.

    TRL parses its other fields itself; `commonit_*` options are checked elsewhere.
    """
    scalar = {str, int, float, bool, type(None)}
    hints = get_type_hints(kind).items()
    return {name: hint for name, hint in hints if name not in OPTIONS and {*(get_args(hint) or [hint])} <= scalar}


def _check_names(names: Iterable[str], known: list[str], also_known: Iterable[str] = ()) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"Unknown option {name!r}: not a name. Write a name such as commonit_metric.")
    check_option_names(names)
    for name in names:
        if name not in known and name not in also_known:
            raise ValueError(f"Unknown option {name}: did you mean {nearest(name, [*known, *also_known])}?")


def _check_numbers(args: Any) -> None:
    """Refuse numbers that TRL accepts but that fail later, or, as a negative `max_length`, truncate wrongly."""
    limits = {name: (1, math.inf) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    limits |= {"max_length": (1, math.inf), "seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            up_to = f" and at most {most}" if most < math.inf else ""
            raise ValueError(f"{name}={value} must be at least {least}{up_to}.")


def _check_paths(args: Any) -> None:
    """Refuse an output directory that cannot be written and a missing checkpoint, before anything is loaded."""
    path = Path(args.output_dir)
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(
            f"output_dir={args.output_dir!r}: cannot be written ({error.strerror}). Name a directory that this user "
            "may write."
        ) from error
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r}: not a directory. Name a checkpoint, such as "
            f"{path / 'checkpoint-500'}."
        )
