"""What is compared: strategies, such as `length` or `length:num_groups=16`, each trained once with every seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from commonit_trl.config import METRICS, OPTIONS, READ_BY, CommonITArguments, check_choice, check_option_names

BASELINE = "none"


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A metric, and the `commonit_*` options that it has beside those of the recipe."""

    name: str
    metric: str
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, recipe: Any) -> dict[str, Any]:
        """All `commonit_*` options, checked: of `recipe`, which has them as attributes, those that the metric reads.

        Raises:
            ValueError: on options that do not go together.
        """
        read = {name: getattr(recipe, name) for name in OPTIONS if self.metric in READ_BY.get(name, METRICS)}
        checked = CommonITArguments(**{**read, "commonit_metric": self.metric, **self.options})
        return {name: getattr(checked, name) for name in OPTIONS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A strategy with one seed."""

    strategy: Strategy
    seed: int

    @property
    def name(self) -> str:
        """Also that of its directory."""
        return f"{self.strategy.name}@{self.seed}"


def parse_strategies(text: str) -> list[Strategy]:
    """`METRIC[:OPTION=VALUE...]`, separated by commas; options as in YAML, with or without `commonit_` before them.

    Raises:
        ValueError: on an unknown metric or option, on one that stands twice, and where `none` is missing.
    """
    strategies: dict[str, Strategy] = {}
    for name in (part.strip() for part in text.split(",")):
        metric, *given = name.split(":")
        check_choice("--metrics", metric, METRICS)
        options = dict(_option(part, name) for part in given)
        check_option_names(options)
        if name in strategies:
            raise ValueError(f"--metrics names {name!r} twice: remove one.")
        strategies[name] = Strategy(name=name, metric=metric, options=options)
    if BASELINE not in strategies:
        raise ValueError(f"--metrics {text} has no {BASELINE!r}, which the others are compared to: add it.")
    return list(strategies.values())


def _option(part: str, strategy: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip() or "/" in value:
        raise ValueError(f"--metrics {strategy}: {part!r} is no option: write for example length:num_groups=16.")
    return f"commonit_{name.strip().removeprefix('commonit_')}", yaml.safe_load(value)


def runs_of(strategies: Sequence[Strategy], first_seed: int, seeds: int) -> Iterator[Run]:
    """Seed by seed, so that an interrupted comparison has whole pairs."""
    for seed in range(first_seed, first_seed + seeds):
        for strategy in strategies:
            yield Run(strategy=strategy, seed=seed)
