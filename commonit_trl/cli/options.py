"""Parse and check the options of `commonit sft`: flags, the YAML file of `--config`, and launch options among them."""

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, get_args, get_type_hints

from commonit_trl.config import OPTIONS, check_option_names, nearest

LIMITS = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"), (1, math.inf)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}


class Options(NamedTuple):
    """The options of `commonit sft`, in TRL's dataclasses."""

    script: Any  # ScriptArguments
    training: Any  # CommonITSFTConfig
    model: Any  # ModelConfig
    mixture: Any  # DatasetMixtureConfig


class Parser(argparse.ArgumentParser):
    """A parser that prints help to `stdout`, and whose errors are exceptions: TRL's usage is pages long."""

    def __init__(self, *, stdout: TextIO | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.stdout = stdout

    def error(self, message: str) -> NoReturn:
        raise_value_error(message)

    def print_help(self, file: Any = None) -> None:
        super().print_help(file or self.stdout)


def raise_value_error(message: str) -> NoReturn:
    """Replace `ArgumentParser.error`, which prints the usage and exits."""
    raise ValueError(message)


def parse_sft(
    argv: list[str], training_config: type | None = None, prog: str = "commonit sft"
) -> tuple[Options, list[str]]:
    """Parse the options of `commonit sft`.

    Args:
        argv: the flags.
        training_config: class of the training arguments; by default `CommonITSFTConfig`.
        prog: name of the command, for its help.

    Returns:
        The options, and the flags for `accelerate launch`.

    Raises:
        ValueError: on an option that neither TRL, CommonIT nor `accelerate launch` has (`trl sft` ignores these).
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from commonit_trl.cli import launch
    from commonit_trl.trainer.sft import CommonITSFTConfig

    kinds: Any = (ScriptArguments, training_config or CommonITSFTConfig, ModelConfig, DatasetMixtureConfig)
    config_parser = Parser(add_help=False)
    config_parser.add_argument("--config")
    parser = TrlParser(
        kinds,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]",
        description="The YAML file takes the same options; the command line overrides it.",
        allow_abbrev=False,
    )
    parser.error = raise_value_error  # type: ignore[method-assign]
    known = [option.name for kind in kinds for option in fields(kind) if option.init]
    from_launch = launch.option_names()

    given, flags = config_parser.parse_known_args(argv)
    _, launch_flags = parser.parse_known_args(flags)
    for before, flag in itertools.pairwise(["", *launch_flags]):
        if flag.startswith("--"):
            _check_names([_name(flag)], known, from_launch)
        elif not before.startswith("--"):
            raise ValueError(f"{flag!r} is neither an option nor the value of one. Remove it.")
    if given.config is not None:
        config = read_yaml("--config", given.config)
        _check_names(config, [*known, "env"], from_launch)
        _check_values(config, kinds)
        flags = ["--config", given.config, *flags]
        not_launch = {*known, "env", *map(_name, launch_flags)}
        launch_flags = [*launch.as_flags((key, config[key]) for key in config if key not in not_launch), *launch_flags]
    *parsed, _ = parser.parse_args_and_config(flags, return_remaining_strings=True)
    options = Options(*parsed)
    for name, limits in LIMITS.items():
        check_number(name, getattr(options.training, name), *limits)
    return options, launch_flags


def read_yaml(option: str, path: str) -> dict[Any, Any]:
    """Read the mapping in the YAML file `path`, which `option` names.

    Raises:
        ValueError: naming the option and the file.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be read ({error.strerror}). Name a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ValueError(f"{option} {path}: not YAML. {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{option} {path}: no options. Write lines such as 'commonit_metric: length'.")
    return config


def check_number(option: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse numbers that fail later, or, as a negative `max_length`, truncate wrongly."""
    if value is not None and not least <= value <= most:
        up_to = f" and at most {most}" if most < math.inf else ""
        raise ValueError(f"{option}={value} must be at least {least}{up_to}.")


def check_output_dir(path: str) -> None:
    """Refuse an output directory that cannot be written."""
    try:
        existing = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(
            f"output_dir={path!r}: cannot be written ({error.strerror}). Name a directory that this user may write."
        ) from error


def _name(flag: str) -> str:
    return flag.split("=")[0].removeprefix("--").replace("-", "_")


def _check_names(names: Iterable[str], known: list[str], also_known: Iterable[str] = ()) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"Unknown option {name!r}: not a name. Write a name such as commonit_metric.")
    check_option_names(names)
    for name in names:
        if name not in known and name not in also_known:
            raise ValueError(f"Unknown option {name}: did you mean {nearest(name, [*known, *also_known])}?")


def _check_values(config: dict[str, Any], kinds: Iterable[type]) -> None:
    """Check the values in a YAML file, whose types neither argparse nor TRL's dataclasses check."""
    from trl.scripts.utils import DatasetConfig

    scalar = {str, int, float, bool, type(None)}
    for kind in kinds:  # TRL parses its other fields itself; commonit_* options are checked elsewhere
        hints = get_type_hints(kind).items()
        scalars = {name: hint for name, hint in hints if {*(get_args(hint) or [hint])} <= scalar}
        _check_types(config, {name: hint for name, hint in scalars.items() if name not in OPTIONS})
    entries = config.get("datasets") or []
    if not isinstance(entries, list):
        raise ValueError(f"datasets={entries!r}: not a list. Write '- path: NAME_OR_FILE' for each entry.")
    for entry in entries:
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"datasets: the entry {entry!r} has no path. Write '- path: NAME_OR_FILE'.")
        _check_names(entry, [option.name for option in fields(DatasetConfig)])
        _check_types(entry, {**get_type_hints(DatasetConfig), "split": str | None}, "datasets: ")


def _check_types(config: dict[str, Any], hints: dict[str, Any], prefix: str = "") -> None:
    from pydantic import TypeAdapter, ValidationError

    for name, value in config.items():
        try:
            TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{prefix}{name}={value!r} in the YAML file: {reason}. Change or remove it.") from None
