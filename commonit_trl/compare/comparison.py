"""What the runs of a comparison say together: each strategy beside plain batches, overall and group by group."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.compare.runs import RunResult
from commonit_trl.compare.statistics import Interval, paired_difference
from commonit_trl.compare.strategies import BASELINE

UNSEEN = "(in no group)"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A mean over seeds of what was measured on some held-out rows, and its paired difference to the baseline."""

    value: float
    difference: Interval | None
    """None for the baseline, and where there are too few rows."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The held-out rows of one of a strategy's groups."""

    name: str
    rows: int
    loss: Measure
    """Mean loss of a token."""
    accuracy: Measure
    """Share of the tokens that were the likeliest."""


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """One strategy over all seeds that it and the baseline have finished with."""

    name: str
    seeds: list[int]
    loss: Measure
    """Mean loss of a token, of all held-out rows."""
    accuracy: Measure
    """Share of the tokens that were the likeliest."""
    exact: Measure | None
    """Share of the rows in which greedy decoding gave the expected answer, where that was asked for."""
    steps: float
    tokens: float
    """Of the data that the model saw, without padding."""
    padding: float
    """Share of the computed tokens that were padding."""
    tokens_per_second: float
    """Of the data, while it trained."""
    lost: int
    """Rows of an epoch that were left out."""
    repeated: int
    """Rows of an epoch that came once more."""
    groups: list[GroupResult]
    """The held-out rows in the strategy's groups, as its first seed fitted them."""
    curves: dict[str, list[tuple[float, float]]]
    """`loss` and `eval_loss` as training logged them: (epoch, mean over seeds)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All strategies, the baseline first."""

    strategies: list[StrategyResult]
    train_rows: int
    held_out_rows: int
    """Those that preparing them has left."""
    epochs: float
    failed: dict[str, str]
    """Run -> why it has no result."""
    at_a_time: int
    """Runs that shared the machine."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    results: Sequence[RunResult], *, train_rows: int, failed: Mapping[str, str], at_a_time: int = 1
) -> Comparison:
    """Put the results of the runs together.

    Args:
        results: of the runs that have finished; those of a seed without its baseline are left out.
        train_rows: that the runs were given.
        failed: the others, and why.
        at_a_time: runs that shared the machine.

    Raises:
        ValueError: where there is no finished run of the baseline, and where runs were not trained on the same rows
            from the same weights: their differences would mean nothing.
    """
    _check_paired(results)
    by_strategy: dict[str, dict[int, RunResult]] = {}
    for result in results:
        by_strategy.setdefault(result.run.strategy.name, {})[result.run.seed] = result
    if BASELINE not in by_strategy:
        said = "; ".join(f"{run}: {why}" for run, why in failed.items())
        raise ValueError(f"No run of {BASELINE!r}, which the others are compared to, has finished. {said}")
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
        for key, what, same_for in (
            ("weights", "weights at the start", result.run.seed),
            ("train_rows", "training rows", None),
            ("held_out_rows", "held-out rows", None),
        ):
            other = first.setdefault((key, same_for), result)
            if result.written[key] != other.written[key]:
                raise ValueError(
                    f"The runs {other.run.name} and {result.run.name} had other {what}, so they cannot be compared: "
                    "the model or the data have changed in between. Name another output_dir."
                )


def _strategy(runs: Mapping[int, RunResult], baseline: Mapping[int, RunResult] | None) -> StrategyResult:
    results = list(runs.values())
    first, written = results[0], [result.written for result in results]
    beside = None if baseline is None else [baseline[seed] for seed in runs]
    everything = np.arange(len(first.tokens))
    entry = first.written["ledger"] or {"lost": 0, "repeated": 0}
    names = [*first.written["groups"], UNSEEN]
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
    what: str,
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> Measure:
    values = np.stack([getattr(result, what)[rows] for result in ours]).astype(float)
    value = float(values.sum() / weights.sum() / len(ours)) if weights.sum() else float("nan")
    if baseline is None:
        return Measure(value=value, difference=None)
    others = np.stack([getattr(result, what)[rows] for result in baseline]).astype(float)
    return Measure(value=value, difference=paired_difference(values, others, weights))


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves that were logged at the same steps."""
    return [tuple(np.mean(points, axis=0).tolist()) for points in zip(*curves)]
