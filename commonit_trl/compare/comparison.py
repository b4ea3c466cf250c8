"""Compare each strategy to the baseline, overall and group by group."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.compare.runs import RunResult
from commonit_trl.compare.statistics import Interval, paired_difference
from commonit_trl.compare.strategies import BASELINE

UNASSIGNED = "(unassigned)"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measured value of some held-out rows, mean over seeds, and its paired difference to the baseline."""

    value: float
    difference: Interval | None
    """None for the baseline, and with too few rows."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The held-out rows of one of a strategy's groups."""

    name: str
    rows: int
    loss: Measure
    """Mean loss per token."""
    accuracy: Measure
    """Share of the tokens that the model ranks first."""


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """One strategy over the seeds that both it and the baseline have finished."""

    name: str
    seeds: list[int]
    loss: Measure
    """Mean loss per token of all held-out rows."""
    accuracy: Measure
    """Share of the tokens that the model ranks first."""
    exact: Measure | None
    """Share of the rows for which greedy decoding gives the expected answer; None without `--eval_generate`."""
    steps: float
    tokens: float
    """Tokens that the model saw in training, without padding."""
    padding: float
    """Share of the computed tokens that are padding."""
    tokens_per_second: float
    """Training speed, without padding."""
    lost: int
    """Rows that an epoch leaves out."""
    repeated: int
    """Rows that an epoch repeats."""
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
        ValueError: without a finished run of the baseline, and for runs of different rows or initial weights, whose
            differences mean nothing.
    """
    _check_paired(results)
    by_strategy: dict[str, dict[int, RunResult]] = {}
    for result in results:
        by_strategy.setdefault(result.run.strategy.name, {})[result.run.seed] = result
    if BASELINE not in by_strategy:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise ValueError(f"No run of the baseline {BASELINE!r} has finished. {reasons}")
    baseline = by_strategy.pop(BASELINE)
    strategies = [_strategy(baseline, None)]
    for runs in by_strategy.values():
        if seeds := runs.keys() & baseline.keys():
            strategies.append(_strategy({seed: runs[seed] for seed in sorted(seeds)}, baseline))
    return Comparison(
        strategies=strategies,
        train_rows=train_rows,
        held_out_rows=len(next(iter(baseline.values())).tokens),
        epochs=next(iter(baseline.values())).written["epochs"],
        failed=dict(failed),
        at_a_time=at_a_time,
    )


def _check_paired(results: Sequence[RunResult]) -> None:
    first: dict[Any, RunResult] = {}
    for result in results:
        for key, name, same_for in (
            ("weights", "initial weights", result.run.seed),
            ("train_rows", "training rows", None),
            ("held_out_rows", "held-out rows", None),
        ):
            other = first.setdefault((key, same_for), result)
            if result.written[key] != other.written[key]:
                raise ValueError(
                    f"The runs {other.run.name} and {result.run.name} have different {name}: the model or the data "
                    "changed between them. Name another output_dir."
                )


def _strategy(runs: Mapping[int, RunResult], baseline: Mapping[int, RunResult] | None) -> StrategyResult:
    results = list(runs.values())
    first, written = results[0], [result.written for result in results]
    beside = None if baseline is None else [baseline[seed] for seed in runs]
    everything = np.arange(len(first.tokens))
    entry = first.written["ledger"] or {"lost": 0, "repeated": 0}
    names = [*first.written["groups"], UNASSIGNED]
    groups = []
    for group in np.unique(first.group_ids) if first.written["groups"] else ():
        members = np.flatnonzero(first.group_ids == group)
        loss, accuracy = _by_token(results, beside, members)
        groups.append(GroupResult(name=names[group], rows=len(members), loss=loss, accuracy=accuracy))
    loss, accuracy = _by_token(results, beside, everything)
    return StrategyResult(
        name=first.run.strategy.name,
        seeds=sorted(runs),
        loss=loss,
        accuracy=accuracy,
        exact=None if first.exact is None else _measure(results, beside, "exact", everything, np.ones(len(everything))),
        steps=float(np.mean([entry["steps"] for entry in written])),
        tokens=float(np.mean([entry["tokens"] for entry in written])),
        padding=float(
            1 - sum(entry["tokens"] for entry in written) / sum(entry["computed_tokens"] for entry in written)
        ),
        tokens_per_second=float(np.mean([entry["tokens"] / entry["seconds"] for entry in written])),
        lost=entry["lost"],
        repeated=entry["repeated"],
        groups=groups,
        curves={curve: _mean_curve([entry["curves"][curve] for entry in written]) for curve in written[0]["curves"]},
    )


def _by_token(
    ours: Sequence[RunResult], baseline: Sequence[RunResult] | None, rows: NDArray[np.int64]
) -> tuple[Measure, Measure]:
    tokens = ours[0].tokens[rows].astype(float)
    return _measure(ours, baseline, "loss", rows, tokens), _measure(ours, baseline, "correct", rows, tokens)


def _measure(
    ours: Sequence[RunResult],
    baseline: Sequence[RunResult] | None,
    name: str,
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> Measure:
    values = np.stack([getattr(result, name)[rows] for result in ours]).astype(float)
    value = float(values.sum() / weights.sum() / len(ours)) if weights.sum() else float("nan")
    if baseline is None:
        return Measure(value=value, difference=None)
    others = np.stack([getattr(result, name)[rows] for result in baseline]).astype(float)
    return Measure(value=value, difference=paired_difference(values, others, weights))


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of curves that were logged at the same steps."""
    return [tuple(np.mean(points, axis=0).tolist()) for points in zip(*curves)]
