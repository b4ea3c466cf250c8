"""Strategies to compare, such as `length` or `length:num_groups=16`; each trains once with every seed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from commonit_trl.config import NO_METRIC, OPTIONS, CommonITArguments, check_metric, check_option_names, is_read

BASELINE = NO_METRIC
_COMMAS = re.compile(r",(?![^\[]*\])")  # outside of lists


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A metric, and the `commonit_*` options that it sets in addition to the recipe's."""

    name: str
    metric: str
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, recipe: Any) -> CommonITArguments:
        """Return the checked options of the strategy.

        Args:
            recipe: has the user's options as attributes; those that the metric reads apply.

        Raises:
            ValueError: on options that contradict each other.
        """
        read = {name: getattr(recipe, name) for name in OPTIONS if is_read(name, self.metric)}
        return CommonITArguments(**{**read, "commonit_metric": self.metric, **self.options})

    def settings(self, recipe: Any) -> dict[str, Any]:
        """Return `arguments` as option -> value."""
        checked = self.arguments(recipe)
        return {name: getattr(checked, name) for name in OPTIONS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A strategy with one seed."""

    strategy: Strategy
    seed: int

    @property
    def name(self) -> str:
        """The strategy and the seed, such as `length@0`."""
        return f"{self.strategy.name}@{self.seed}"


def parse_strategies(option: str, text: str) -> list[Strategy]:
    """Parse strategies that a command line lists.

    Args:
        option: that lists them, for messages.
        text: `METRIC[:OPTION=VALUE...]`, separated by commas; values as in YAML, names with or without `commonit_`.

    Raises:
        ValueError: on an unknown metric or option, and on a repeated strategy.
    """
    strategies: dict[str, Strategy] = {}
    for name in (part.strip() for part in _COMMAS.split(text)):
        metric, *given = name.split(":")
        check_metric(option, metric)
        options = dict(_parse_option(option, part, name) for part in given)
        check_option_names(options)
        if name in strategies:
            raise ValueError(f"{option} {text}: {name!r} appears twice. Remove one.")
        strategies[name] = Strategy(name=name, metric=metric, options=options)
    return list(strategies.values())


def _parse_option(option: str, part: str, strategy: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip() or "/" in value:
        raise ValueError(f"{option} {strategy}: {part!r} is not an option. Write for example length:num_groups=16.")
    return f"commonit_{name.strip().removeprefix('commonit_')}", yaml.safe_load(value)


def runs_of(strategies: Sequence[Strategy], first_seed: int, seeds: int) -> Iterator[Run]:
    """Yield the runs seed by seed, so that an interrupted comparison has complete pairs."""
    for seed in range(first_seed, first_seed + seeds):
        for strategy in strategies:
            yield Run(strategy=strategy, seed=seed)
