"""Strategies to compare, such as `length` or `length:num_groups=16`; each trains once with every seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from commonit_trl.config import NO_METRIC, OPTIONS, CommonITArguments, check_metric, check_option_names, is_read

BASELINE = NO_METRIC


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A metric, and the `commonit_*` options that it sets in addition to the recipe's."""

    name: str
    metric: str
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, recipe: Any) -> dict[str, Any]:
        """Return all `commonit_*` options of the strategy, checked.

        Args:
            recipe: has the user's options as attributes; those that the metric reads apply.

        Raises:
            ValueError: on options that contradict each other.
        """
        read = {name: getattr(recipe, name) for name in OPTIONS if is_read(name, self.metric)}
        checked = CommonITArguments(**{**read, "commonit_metric": self.metric, **self.options})
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


def parse_strategies(text: str) -> list[Strategy]:
    """Parse the strategies of `--metrics`.

    Args:
        text: `METRIC[:OPTION=VALUE...]`, separated by commas; values as in YAML, names with or without `commonit_`.

    Raises:
        ValueError: on an unknown metric or option, on a repeated strategy, and without the baseline `none`.
    """
    strategies: dict[str, Strategy] = {}
    for name in (part.strip() for part in text.split(",")):
        metric, *given = name.split(":")
        check_metric("--metrics", metric)
        options = dict(_option(part, name) for part in given)
        check_option_names(options)
        if name in strategies:
            raise ValueError(f"--metrics {text}: {name!r} appears twice. Remove one.")
        strategies[name] = Strategy(name=name, metric=metric, options=options)
    if BASELINE not in strategies:
        raise ValueError(f"--metrics {text}: the baseline {BASELINE!r} is missing. Add it.")
    return list(strategies.values())


def _option(part: str, strategy: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip() or "/" in value:
        raise ValueError(f"--metrics {strategy}: {part!r} is not an option. Write for example length:num_groups=16.")
    return f"commonit_{name.strip().removeprefix('commonit_')}", yaml.safe_load(value)


def runs_of(strategies: Sequence[Strategy], first_seed: int, seeds: int) -> Iterator[Run]:
    """Yield the runs seed by seed, so that an interrupted comparison has complete pairs."""
    for seed in range(first_seed, first_seed + seeds):
        for strategy in strategies:
            yield Run(strategy=strategy, seed=seed)
