"""Compare each strategy to the baseline, overall and group by group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.compare.runs import RunResult
from commonit_trl.compare.statistics import Difference, paired_difference
from commonit_trl.compare.strategies import BASELINE

UNASSIGNED = "(unassigned)"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measured value of some held-out rows, mean over seeds, and its paired difference to the baseline."""

    value: float
    difference: Difference | None
    """None for the baseline, and without a trained token."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Some held-out rows: all, or those of one of a strategy's groups."""

    name: str
    rows: int
    loss: Measure
    """Mean loss per token."""
    accuracy: Measure
    """Share of the tokens that the model ranks first."""


@dataclass(frozen=True, kw_only=True)
class StrategyResult(GroupResult):
    """One strategy on all held-out rows, over the seeds that both it and the baseline have finished."""

    seeds: list[int]
    scores: dict[str, Measure]
    """Score of lm-evaluation-harness -> its mean over the examples; empty without `--lm_eval_tasks`."""
    steps: float
    tokens: float
    """Tokens that the model saw in training, without padding."""
    padding: float
    """Share of the computed tokens that are padding."""
    tokens_per_second: float
    """Training speed, without padding."""
    left_out: int
    """Samples that an epoch leaves out."""
    repeated: int
    """Repeats of samples in an epoch."""
    groups: list[GroupResult]
    """The held-out rows by the groups that the strategy's first seed fitted."""
    curves: dict[str, list[tuple[float, float]]]
    """The logged `loss` and `eval_loss`: points of (epoch, mean over seeds)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All strategies, the baseline first."""

    strategies: list[StrategyResult]
    train_rows: int
    held_out_rows: int
    """Rows that remain after TRL's preparation."""
    epochs: float
    failed: dict[str, str]
    """Run -> reason of its failure."""
    at_a_time: int
    """Runs that shared the machine at a time."""
    processors: dict[str, list[str]]
    """Name of a processor -> the runs that were made on it."""

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def compare(
    results: Sequence[RunResult], *, train_rows: int, failed: Mapping[str, str], at_a_time: int = 1
) -> Comparison:
    """Compare the results of the runs.

    Args:
        results: of the finished runs; a seed whose baseline is missing does not count.
        train_rows: number of training rows that the runs were given.
        failed: failed run -> reason.
        at_a_time: runs that shared the machine at a time.

    Raises:
        ValueError: without a finished run of the baseline, and for runs of one seed with different initial weights,
            whose differences mean nothing.
    """
    by_strategy: dict[str, dict[int, RunResult]] = {}
    first_of_seed: dict[int, RunResult] = {}
    processors: dict[str, list[str]] = {}
    for result in results:
        by_strategy.setdefault(result.run.strategy.name, {})[result.run.seed] = result
        processors.setdefault(result.written["processor"], []).append(result.run.name)
        other = first_of_seed.setdefault(result.run.seed, result)
        if result.written["weights"] != other.written["weights"]:
            raise ValueError(
                f"The runs {other.run.name} and {result.run.name} have different initial weights: the model changed "
                "between them. Name another output_dir."
            )
    if BASELINE not in by_strategy:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise ValueError(f"No run of the baseline {BASELINE!r} has finished. {reasons}")
    baseline = by_strategy.pop(BASELINE)
    strategies = [_strategy(list(baseline.values()), None)]
    for runs in by_strategy.values():
        if seeds := sorted(runs.keys() & baseline.keys()):
            strategies.append(_strategy([runs[seed] for seed in seeds], [baseline[seed] for seed in seeds]))
    one = next(iter(baseline.values()))
    return Comparison(
        strategies=strategies,
        train_rows=train_rows,
        held_out_rows=len(one.tokens),
        epochs=one.written["epochs"],
        failed=dict(failed),
        at_a_time=at_a_time,
        processors=processors,
    )


def _strategy(results: Sequence[RunResult], baseline: Sequence[RunResult] | None) -> StrategyResult:
    first = results[0]
    everything, names = np.arange(len(first.tokens)), first.written["groups"]

    def measure(values_of: Callable[[RunResult], NDArray[Any]], weights: NDArray[np.float64]) -> Measure:
        def of(runs: Sequence[RunResult]) -> NDArray[np.float64]:
            return np.stack([values_of(result) for result in runs]).astype(float)

        value = float(of(results).sum() / weights.sum() / len(results)) if weights.sum() else float("nan")
        difference = None if baseline is None else paired_difference(of(results), of(baseline), weights)
        return Measure(value=value, difference=difference)

    def by_token(name: str, rows: NDArray[np.int64]) -> dict[str, Any]:
        tokens = first.tokens[rows].astype(float)
        loss = measure(lambda result: result.loss[rows], tokens)
        accuracy = measure(lambda result: result.correct[rows], tokens)
        return {"name": name, "rows": len(rows), "loss": loss, "accuracy": accuracy}

    def score(name: str) -> Measure:
        return measure(lambda result: result.scores[name], np.ones(len(first.scores[name])))

    def mean(name: str) -> float:
        return float(np.mean([result.written[name] for result in results]))

    return StrategyResult(
        **by_token(first.run.strategy.name, everything),
        seeds=sorted(result.run.seed for result in results),
        scores={name: score(name) for name in first.scores},
        steps=mean("steps"),
        tokens=mean("tokens"),
        padding=1 - mean("tokens") / mean("computed_tokens"),
        tokens_per_second=mean("tokens_per_second"),
        left_out=first.written["left_out"],
        repeated=first.written["repeated"],
        groups=[
            GroupResult(**by_token([*names, UNASSIGNED][group], np.flatnonzero(first.group_ids == group)))
            for group in (np.unique(first.group_ids) if names else ())
        ],
        curves={  # all seeds log at the same steps
            name: np.mean(list(zip(*(result.written["curves"][name] for result in results))), axis=1).tolist()
            for name, points in first.written["curves"].items()
            if points
        },
    )
