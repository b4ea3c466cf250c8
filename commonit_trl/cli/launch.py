"""A command on several processes by itself: the launch options of accelerate, taken as `trl sft` takes them.

Options of `accelerate launch` (`--num_processes 4`, `--accelerate_config zero2` or a file) may stand among the training
options, as flags or in the YAML file. `start` then runs `accelerate launch ... --module commonit_trl COMMAND` with the
same arguments, and the processes that it starts pass the launch options over.
"""

import os
from collections.abc import Iterable
from typing import Any, NoReturn

from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

_STARTED_BY_US = "COMMONIT_LAUNCHED"


def option_names() -> set[str]:
    """The options of `accelerate launch`, and TRL's `accelerate_config`."""
    options = vars(launch_command_parser().parse_args(["script.py"]))
    return {"accelerate_config", *options} - {"training_script", "training_script_args", "module", "no_python"}


def as_flags(options: Iterable[tuple[str, Any]]) -> list[str]:
    """Launch options of a YAML file as the flags that they stand for; a switch that is off is left out."""
    given = [(name, value) for name, value in options if value is not False]
    return [part for name, value in given for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def prepare(launch_flags: list[str], command: str, argv: list[str]) -> Any:
    """What accelerate's `launch_command` needs to run `commonit COMMAND` with `argv` on the processes that
    `launch_flags` describe; None where there are no such flags, or this process is one of those.

    Raises:
        ValueError: on a value that accelerate does not take, an `accelerate_config` that is neither a file nor one of
            TRL's, or when another launcher has started this process already.
    """
    if not launch_flags or os.environ.get(_STARTED_BY_US):
        return None
    if "RANK" in os.environ:
        raise ValueError(
            f"{launch_flags[0]} is for starting processes, and a launcher has started this one already: remove it, or "
            f"start with commonit {command} alone."
        )
    flags = [part for flag in launch_flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    parser = launch_command_parser()
    parser.error = _raise_value_error
    arguments = [*resolve_accelerate_config_argument(flags), "--module", "commonit_trl", command, *argv]
    return parser.parse_args(arguments)


def start(prepared: Any) -> None:
    """Start the processes that `prepare` described, and wait for them."""
    os.environ[_STARTED_BY_US] = "1"
    launch_command(prepared)


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)
