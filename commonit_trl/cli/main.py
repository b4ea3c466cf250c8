"""The command line: `commonit sft` trains as `trl sft` does, in group-pure batches; `inspect` and `group` show and fix
the groups beforehand; `compare` tells whether it helps; `demo` shows it all on generated data.

Parses and calls, no logic. What a user can put right (options, files, settings that do not go together) ends
as one line on stderr and exit code 2. Other exceptions, and any once training has begun, keep their traceback.
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
from typing import Any, NoReturn, get_args, get_type_hints

from commonit_trl import __version__
from commonit_trl.config import OPTIONS, check_option_names, nearest
from commonit_trl.sanitize import escape, sanitize


class UserError(Exception):
    """What the user can put right; `main` shows it as one line."""


@contextlib.contextmanager
def user_errors(*also: type[Exception], when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """In here, ValueError, OSError (a file or hub out of reach) and `also` are user errors, while `when`."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        yield
    except kinds as error:
        if not when():
            raise
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` (default: the arguments of the process) names; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="commonit",
        usage="commonit [--help] [--version] COMMAND [OPTIONS]",
        description="Instruction tuning in which every optimizer step holds samples of one group.",
        epilog="\n".join(f"commonit {name:9}{command.__doc__}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"commonit-trl {__version__}")
    # The deepspeed launcher gives this before the command; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="see commonit COMMAND --help")
    try:
        given = _parse(parser, argv)
        with _messages():
            return COMMANDS[given.command](given.options)
    except UserError as error:
        print(f"commonit: error: {sanitize(str(error))}", file=sys.stderr)
        return 2


def _sft(argv: list[str]) -> int:
    """train as `trl sft` does, with its flags and YAML files, and commonit_* options"""
    with user_errors(TypeError):  # a YAML value of the wrong type, which TRL's dataclasses do not check
        (script_args, training_args, model_args, mixture), launch_flags = _parse_sft(argv)
        from commonit_trl.cli import launch
        from commonit_trl.cli.data import check_model, check_rows, load_splits, make_trainer, named_data

        processes = launch.prepare(launch_flags, "sft", argv)
    with user_errors():
        if processes is not None:
            launch.start(processes)
            return 0
        _check_places(training_args)
        check_model(model_args, training_args)
        train, evaluation = load_splits(script_args, mixture, training_args)
        for rows in (train, evaluation):
            check_rows(rows, named_data(script_args, mixture), training_args.dataset_text_field)
        trainer = make_trainer(model_args, training_args, train, evaluation)
    begun = _begun_callback()
    trainer.add_callback(begun)
    with user_errors(when=lambda: not begun.training):
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {sanitize(training_args.output_dir)}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.end_training()
    return 0


def _inspect(argv: list[str]) -> int:
    """show what metrics do to the data: groups, steps, batches"""
    with user_errors(TypeError):
        from commonit_trl.cli import inspect as inspecting

        asked, recipe = _read_recipe("inspect", inspecting.add_arguments, argv)
    with user_errors():
        return inspecting.run(recipe, asked)


def _group(argv: list[str]) -> int:
    """fit the groups ahead of training, or give new rows to fitted ones"""
    with user_errors(TypeError):
        from commonit_trl.cli import group

        asked, recipe = _read_recipe("group", group.add_arguments, argv)
    with user_errors():
        return group.run(recipe, asked)


def _compare(argv: list[str]) -> int:
    """train by several metrics with several seeds, and tell whether they help"""
    with user_errors(TypeError):
        from commonit_trl.cli import compare as comparing
        from commonit_trl.cli import launch

        asked, arguments, launch_flags = _read_comparison(argv)
        processes = launch.prepare(launch_flags, "compare", argv) if asked.only is not None else None
    with user_errors():
        if processes is not None:
            launch.start(processes)
            return 0
        _check_places(arguments[1])
        return comparing.run(asked, *arguments, launch_flags=launch_flags, argv=argv)


def _demo(argv: list[str]) -> int:
    """show the method on generated data: no GPU, no download"""
    from commonit_trl.cli import demo

    parser = argparse.ArgumentParser(prog="commonit demo", description=_demo.__doc__, allow_abbrev=False)
    demo.add_arguments(parser)
    return demo.run(_parse(parser, argv))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sft": _sft,
    "inspect": _inspect,
    "group": _group,
    "compare": _compare,
    "demo": _demo,
}


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    parser.error = _raise_value_error  # type: ignore[method-assign]
    with user_errors():
        return parser.parse_args(argv)


def _raise_value_error(message: str) -> NoReturn:
    """In the place of `ArgumentParser.error`, which prints the usage too: pages, with TRL's options."""
    raise ValueError(message)


class _Formatter(logging.Formatter):
    """The names of files and groups in a message do not act on the terminal; a message may have several lines."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n")


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Show this package's messages on stderr: on rank 0 from INFO up, on the others warnings."""
    logger, handler = logging.getLogger("commonit_trl"), logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s commonit: %(message)s"))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _read_recipe(
    command: str, add_arguments: Callable[[argparse.ArgumentParser], None], argv: list[str]
) -> tuple[argparse.Namespace, Any]:
    """The options of `command` itself, and the `Recipe` that the data and the other options describe."""
    from commonit_trl.cli import recipes
    from commonit_trl.cli.group import asked_metrics

    parser = argparse.ArgumentParser(
        prog=f"commonit {command}",
        usage=f"commonit {command} [DATA ...] [--config FILE.yaml | --axolotl FILE.yml] [OPTIONS]",
        description=COMMANDS[command].__doc__,
        epilog="DATA: hub names, directories or files. All options of commonit sft may be given too: see its --help.",
        allow_abbrev=False,
    )
    recipes.add_arguments(parser)
    add_arguments(parser)
    parser.error = _raise_value_error  # type: ignore[method-assign]
    data = list(itertools.takewhile(lambda part: not part.startswith("-"), argv))
    asked, flags = parser.parse_known_args(argv[len(data) :])
    if asked.axolotl is not None:
        if data or flags:
            raise ValueError(
                f"--axolotl {asked.axolotl} and {(data or flags)[0]}: options and data stand in the recipe."
            )
        with contextlib.redirect_stdout(sys.stderr):
            return asked, recipes.read_foreign_recipe("axolotl", asked.axolotl)
    before, after = recipes.sft_flags(data)
    with contextlib.redirect_stdout(sys.stderr):  # for the libraries' messages: stdout may be JSON
        arguments, launch_flags = _parse_sft(
            [*before, *flags, *after], recipes.PreparationConfig, f"commonit {command}"
        )
        recipe = recipes.sft_recipe(
            *arguments,
            metrics=asked_metrics(arguments[1].commonit_metric, asked.compare, asked.load),
            tokenizer=asked.tokenizer,
            world_size=recipes.num_processes(launch_flags),
        )
    return asked, recipe


def _read_comparison(argv: list[str]) -> tuple[argparse.Namespace, Any, list[str]]:
    """The options of `commonit compare` itself, and what `_parse_sft` gives of the others."""
    from commonit_trl.cli import compare as comparing
    from commonit_trl.cli import recipes

    parser = argparse.ArgumentParser(
        prog="commonit compare",
        usage="commonit compare [--config FILE.yaml] [OPTIONS]",
        description=_compare.__doc__,
        epilog="All options of commonit sft may be given too: see its --help.",
        allow_abbrev=False,
    )
    comparing.add_arguments(parser)
    parser.error = _raise_value_error  # type: ignore[method-assign]
    asked, flags = parser.parse_known_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # for the libraries' messages: stdout may be JSON
        return asked, *_parse_sft([*flags, *comparing.FLAGS], recipes.SFTRecipeConfig, "commonit compare")


def _parse_sft(
    argv: list[str], training_config: type | None = None, prog: str = "commonit sft"
) -> tuple[Any, list[str]]:
    """TRL's script, training, model and mixture arguments, and the flags for `accelerate launch`; unlike in `trl sft`,
    an option that is none of these is an error."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
    from trl.scripts.utils import DatasetConfig

    from commonit_trl.cli import launch
    from commonit_trl.trainer.sft import CommonITSFTConfig

    kinds: Any = (ScriptArguments, training_config or CommonITSFTConfig, ModelConfig, DatasetMixtureConfig)
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    parser = TrlParser(
        kinds,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]",
        description="Options may stand in the YAML file too; the command line overrides it.",
        allow_abbrev=False,
    )
    config_parser.error = parser.error = _raise_value_error  # type: ignore[method-assign]
    known = [option.name for kind in kinds for option in fields(kind) if option.init]

    given, flags = config_parser.parse_known_args(argv)
    _, launch_flags = parser.parse_known_args(flags)
    from_launch = launch.option_names()
    for place, flag in enumerate(launch_flags):
        if flag.startswith("--"):
            _check_names([_name(flag)], known, from_launch)
        elif not place or not launch_flags[place - 1].startswith("--"):
            raise ValueError(f"{flag!r} is neither an option nor the value of one.")
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
        raise ValueError(f"datasets={entries!r} is no list: write '- path: NAME_OR_FILE' for each entry.")
    for entry in entries:
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"datasets: the entry {entry!r} has no path: write '- path: NAME_OR_FILE'.")
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
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): name a YAML file of options.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second: not UTF-8
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} holds no options: write lines such as 'commonit_metric: length'.")
    return config


def _check_types(config: dict[str, Any], hints: dict[str, Any], place: str = "") -> None:
    """Check the values of a YAML file, which neither argparse nor TRL's dataclasses do."""
    from pydantic import TypeAdapter, ValidationError

    for name, value in config.items():
        try:
            TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{place}{name}={value!r} in the YAML file: {reason}. Change or remove it.") from None


def _scalars(kind: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass of TRL's that are a text or a number; others it reads in its own ways, and
    our own are checked with the other options."""
    scalar = {str, int, float, bool, type(None)}
    hints = get_type_hints(kind).items()
    return {name: hint for name, hint in hints if name not in OPTIONS and {*(get_args(hint) or [hint])} <= scalar}


def _check_names(names: Iterable[str], known: list[str], also_known: Iterable[str] = ()) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"Unknown option {name!r}: options are names, such as commonit_metric.")
    check_option_names(names)
    for name in names:
        if name not in known and name not in also_known:
            raise ValueError(f"Unknown option {name}: did you mean {nearest(name, [*known, *also_known])}?")


def _check_numbers(args: Any) -> None:
    """Refuse what would fail when the model is loaded, or train something else: TRL cuts at a negative length too."""
    limits = {name: (1, math.inf) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    limits |= {"max_length": (1, math.inf), "seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            up_to = f" and at most {most}" if most < math.inf else ""
            raise ValueError(f"{name}={value} must be at least {least}{up_to}.")


def _check_places(args: Any) -> None:
    """Refuse an output directory that cannot be made, and a checkpoint that is not there, before anything is loaded."""
    path = Path(args.output_dir)
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"output_dir={args.output_dir!r} cannot be written ({error.strerror}): name a directory that this user may "
            "write."
        ) from error
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is no directory: name a checkpoint, such as "
            f"{path / 'checkpoint-500'}."
        )


def _begun_callback() -> Any:
    """A callback whose `training` says whether training has begun."""
    from transformers import TrainerCallback

    class Begun(TrainerCallback):
        training = False

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.training = True

    return Begun()
