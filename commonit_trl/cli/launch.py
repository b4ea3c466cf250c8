"""Start a command on several processes with the launch options of accelerate, as `trl sft` does.

The flags and the YAML file of a command take the options of `accelerate launch` (`--num_processes 4`,
`--accelerate_config zero2` or a file) among the training options. `start` runs
`accelerate launch ... --module commonit_trl COMMAND` with the same arguments; the processes that it starts ignore the
launch options.
"""

import os
from collections.abc import Iterable
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from commonit_trl.cli.options import raise_value_error

_LAUNCHED = "COMMONIT_LAUNCHED"


def option_names() -> set[str]:
    """Return the names of the options of `accelerate launch`, and TRL's `accelerate_config`."""
    options = vars(launch_command_parser().parse_args(["script.py"]))
    return {"accelerate_config", *options} - {"training_script", "training_script_args", "module", "no_python"}


def as_flags(options: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the launch options of a YAML file as flags; options with the value false are omitted."""
    kept = [(name, value) for name, value in options if value is not False]
    return [part for name, value in kept for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def prepare(launch_flags: list[str], command: str, argv: list[str]) -> Any:
    """Check the launch options before anything starts.

    Args:
        launch_flags: for `accelerate launch`.
        command: of `commonit`.
        argv: the arguments of the command.

    Returns:
        The arguments of accelerate's `launch_command`; None without launch flags, and in a launched process.

    Raises:
        ValueError: on an invalid value, on an `accelerate_config` that is neither a file nor one of TRL's, and if
            another launcher has started this process.
    """
    if not launch_flags or os.environ.get(_LAUNCHED):
        return None
    if "RANK" in os.environ:
        raise ValueError(
            f"{launch_flags[0]}: another launcher has started this process. Remove the option, or run commonit "
            f"{command} without a launcher."
        )
    flags = [part for flag in launch_flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    parser = launch_command_parser()
    parser.error = raise_value_error
    arguments = [*resolve_accelerate_config_argument(flags), "--module", "commonit_trl", command, *argv]
    return parser.parse_args(arguments)


def start(prepared: Any) -> None:
    """Start the processes and wait for them; `prepared` comes from `prepare`."""
    os.environ[_LAUNCHED] = "1"
    launch_command(prepared)
