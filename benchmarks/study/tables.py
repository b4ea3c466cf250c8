"""Report the study as tables and a plot of differences with their intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.common import Report, Settings, Table, installed
from commonit_trl.compare.runs import ROWS_FILE, directory_of
from commonit_trl.compare.statistics import paired_difference
from commonit_trl.compare.strategies import Run, parse_strategies

HEADER = (
    "strategy",
    "steps",
    "held-out loss",
    "difference (95 %)",
    "token accuracy, difference (95 %)",
    "rows left out / repeated",
    "padding",
    "tokens/s relative to baseline",
)


def report(
    settings: Settings, work: Path, comparisons: Mapping[int, Mapping[str, Any]], seconds: Mapping[str, float]
) -> Report:
    """Return the report of the study.

    Args:
        work: folder of the study, with the losses of each held-out row.
        comparisons: accumulation -> content of `compare.json`, and the learning rates tried.
        seconds: part of the study -> wall time.
    """
    one = next(iter(comparisons.values()))
    head = {
        "model": "SmolLM2-135M-Instruct" if settings["model"] == "smollm2" else settings["model"],
        "fine-tuning": f"{one['train_rows']:,} rows of the mixture, one epoch, micro-batches of {settings['batch']} "
        f"rows, {settings['seeds']} seeds; measured on {one['held_out_rows']:,} other rows",
        "trained on": "; ".join(
            f"accumulation {accumulation}: {', '.join(_processors(comparison))}"
            for accumulation, comparison in comparisons.items()
        ),
        "took": ", ".join(f"{name} {value / 60:.0f} min" for name, value in seconds.items()),
    }
    return Report(
        head=head,
        parts=list(_parts(settings, work, comparisons)),
        results={"seconds": seconds, "comparisons": comparisons},
        packages=("scipy", "lm_eval"),
    )


def _processors(comparison: Mapping[str, Any]) -> list[str]:
    return sorted({*comparison["processors"], *(comparison["more_seeds"] or comparison)["processors"]})


def _parts(settings: Settings, work: Path, comparisons: Mapping[int, Mapping[str, Any]]) -> Iterator[Table | str]:
    for accumulation, comparison in comparisons.items():
        yield _by_strategy(f"Accumulation {accumulation}, learning rate {comparison['rate']:g}", comparison)
        yield _by_task(f"Held-out loss by task, accumulation {accumulation}", work, accumulation, comparison)
        if more := comparison["more_seeds"]:
            seeds = f"{settings['more_seeds']} seeds, accumulation {accumulation}"
            yield _by_strategy(f"Intervals that nearly touch zero, with {seeds}", more)
            yield _by_task(f"Held-out loss by task, with {seeds}", work, accumulation, more)
        yield _by_score(accumulation, comparison["strategies"])
        if comparison["failed"]:
            yield "Failed: " + "; ".join(f"{run} ({why})" for run, why in comparison["failed"].items())
    yield Table(
        heading="Held-out loss of the baseline by learning rate, one seed",
        header=("accumulation", *(f"{rate:g}" for rate in settings["rates"])),
        rows=[
            [str(accumulation), *(f"{loss:.4f}" for loss in comparison["rates"].values())]
            for accumulation, comparison in comparisons.items()
        ],
    )
    yield (
        "*difference*: the paired difference from the baseline, its mean over seeds, and half the width of the 95 % "
        "interval; **bold** if the interval excludes zero. Below zero is better for the loss, above zero for "
        "the accuracy. *steps*: optimizer steps of the epoch; more if groups do not fill a step. "
        "*tokens*: of the data, without padding."
    )
    if installed("matplotlib"):
        picture = f"study-{date.today().isoformat()}-{settings.size}-intervals.png"
        draw(comparisons, settings.out / picture)
        yield f"![Differences from the baseline]({picture})"


def _by_strategy(heading: str, comparison: Mapping[str, Any]) -> Table:
    results = comparison["strategies"]
    return Table(heading=heading, header=HEADER, rows=[_row(result, results[0]) for result in results])


def _by_task(heading: str, work: Path, accumulation: int, comparison: Mapping[str, Any]) -> Table:
    """Return each strategy's held-out loss on the rows of each task of the mixture."""
    lines = (work / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    task_of_row = np.array([json.loads(line)["task"] for line in lines])
    tasks = np.unique(task_of_row)
    baseline = comparison["strategies"][0]
    rows = []
    for result in comparison["strategies"]:
        ours, theirs = (
            [_measured(work, accumulation, name, seed) for seed in result["seeds"]]
            for name in (result["name"], baseline["name"])
        )
        cells = []
        for task in tasks:
            chosen = task_of_row == task
            tokens = ours[0]["tokens"][chosen].astype(float)
            losses, baseline_losses = (np.stack([one["loss"][chosen] for one in each]) for each in (ours, theirs))
            difference = paired_difference(losses, baseline_losses, tokens)
            cells.append(f"{losses.sum() / tokens.sum() / len(losses):.4f}")
            cells.append("" if result is baseline or difference is None else _difference(asdict(difference)))
        rows.append([_name(result), *cells])
    header = [
        cell for task in tasks for cell in (f"{task} ({np.sum(task_of_row == task)} rows)", f"{task}, difference")
    ]
    return Table(heading=heading, header=("strategy", *header), rows=rows)


def _measured(work: Path, accumulation: int, strategy: str, seed: int) -> dict[str, NDArray[Any]]:
    (run,) = (Run(strategy=one, seed=seed) for one in parse_strategies("--metrics", strategy))
    return load_file(directory_of(work / f"accumulation-{accumulation}" / "compare", run) / ROWS_FILE)


def _by_score(accumulation: int, results: Sequence[Mapping[str, Any]]) -> Table:
    scores = list(results[0]["scores"])
    return Table(
        heading=f"Scores of lm-evaluation-harness, accumulation {accumulation}",
        header=("strategy", *(cell for score in scores for cell in (score, f"{score}, difference"))),
        rows=[
            [_name(result)]
            + [
                cell
                for score in scores
                for cell in (
                    f"{result['scores'][score]['value']:.3f}",
                    _difference(result["scores"][score]["difference"]),
                )
            ]
            for result in results
        ],
    )


def _name(result: Mapping[str, Any]) -> str:
    return result["name"].replace("reference_dataset=reference.jsonl:min_group_size=16", "MMLU reference")


def _row(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    return [
        _name(result),
        f"{result['steps']:,.0f}",
        f"{result['loss']['value']:.4f}",
        _difference(result["loss"]["difference"]),
        _difference(result["accuracy"]["difference"]),
        f"{result['left_out']} / {result['repeated']}",
        f"{result['padding']:.0%}",
        f"{result['tokens_per_second'] / baseline['tokens_per_second']:.2f}",
    ]


def _difference(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    if interval["low"] is None:  # too few seeds
        return f"{interval['value']:+.4f}"
    difference = f"{interval['value']:+.4f} ± {interval['high'] - interval['value']:.4f}"
    return difference if interval["low"] <= 0 <= interval["high"] else f"**{difference}**"


def has_interval(result: Mapping[str, Any]) -> bool:
    """Return whether a strategy's loss difference has an interval.

    The baseline has no difference, and one or two seeds give none.
    """
    difference = result["loss"]["difference"]
    return difference is not None and difference["low"] is not None


def draw(comparisons: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Draw one panel of intervals per accumulation."""
    from matplotlib.figure import Figure

    results = {
        accumulation: [result for result in comparison["strategies"] if has_interval(result)]
        for accumulation, comparison in comparisons.items()
    }
    heights = [0.9 + 0.28 * len(each) for each in results.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for (accumulation, each), panel in zip(results.items(), panels):
        differences = [result["loss"]["difference"] for result in each]
        names = [_name(result) for result in each]
        values = [difference["value"] for difference in differences]
        reach = [difference["high"] - difference["value"] for difference in differences]
        panel.errorbar(values, names, xerr=reach, fmt="o", color="#1f5fa8", ecolor="#9db8d6", capsize=3)
        panel.axvline(0, color="#c0392b", linewidth=1, linestyle="--")
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.set_title(f"accumulation {accumulation}", fontsize=9, loc="left")
    panels[-1].set_xlabel("held-out loss less that of the baseline (left is better), 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=110)
