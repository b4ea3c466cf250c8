"""Shared parts of the benchmarks: cases, paired rounds, and reports (tables, JSON, plot) that name the machine.

A benchmark is a module of this folder with `TITLE`, `SIZES` (the parameters of each size, by their names) and
`run(settings) -> Report`; benchmarks/__main__.py runs it. Its cases are functions in a `Cases`:

    CASES = Cases()

    @CASES("transformers' own", package="transformers")
    def theirs(inputs): ...

The report lists skipped cases (package not installed, or too slow for the size) with the reason. Each round runs every
case once, and cases are compared within a round, so a temporary slowdown of the machine affects all of them.
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FLOAT_DIGITS = 6
WIDE = 50  # times the shortest bar; beyond, the axis is logarithmic


class Skipped(Exception):
    """Raised when a benchmark or case cannot run here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one benchmark run."""

    size: str
    """`quick`, `full` or `gpu`."""
    given: dict[str, Any]
    """Parameters of that size, with changes from the command line."""
    folder: Path | None
    """Directory of the real data."""
    out: Path
    """Directory of the results."""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    @property
    def data(self) -> Path:
        """Return the directory of the real data.

        Raises:
            Skipped: if it is not set.
        """
        if self.folder is None:
            raise Skipped("needs real data: set --data or COMMONIT_REAL_DATA to its directory")
        return self.folder


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., Any]
    package: str | None
    least: float
    most: float


class Cases:
    """Cases, the rows of a table, in order of registration."""

    def __init__(self) -> None:
        self.all: list[Case] = []

    def __call__(
        self, name: str, *, package: str | None = None, least: float = 0, most: float = float("inf")
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function.

        Args:
            name: the row's name.
            package: distribution that it needs beyond this project's own.
            least, most: bounds of the input size.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.all.append(Case(name, function, package, least, most))
            return function

        return register

    def present(self, size: float = float("nan")) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
        """Return the cases that can run for inputs of `size` (default: any), and name -> reason for the others."""
        functions, skipped = {}, {}
        for case in self.all:
            if case.package is not None and installed(case.package) is None:
                skipped[case.name] = f"{case.package} is not installed"
            elif size < case.least:
                skipped[case.name] = f"for {case.least:,.0f} or more"
            elif size > case.most:
                skipped[case.name] = f"too slow for more than {case.most:,.0f}"
            else:
                functions[case.name] = case.function
        return functions, skipped


def installed(package: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Round = dict[str, dict[str, float]]
"""case -> figure -> value"""


def paired_rounds(cases: Mapping[str, Callable[[int], dict[str, float]]], rounds: int) -> list[Round]:
    """Run every case once per round, with the round's number; each round starts with a different case."""
    names = list(cases)
    results = []
    for number in range(rounds):
        first = number % len(names)
        measured = {name: cases[name](number) for name in (*names[first:], *names[:first])}
        results.append({name: measured[name] for name in names})
    return results


def medians(rounds: Sequence[Round], ratio_of: str, base: str) -> Round:
    """Return the median of each figure over the rounds.

    `ratio` is the median of `ratio_of` relative to the case `base` in the same round; `ratio_low` and `ratio_high` are
    the extremes.
    """
    results = {}
    for name in rounds[0]:
        ratios = [each[name][ratio_of] / each[base][ratio_of] for each in rounds]
        results[name] = {
            figure: statistics.median(each[name][figure] for each in rounds) for figure in rounds[0][name]
        } | {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return results


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report; `bars` are plotted."""

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Rows that were not measured, and the reasons."""
    bars: Mapping[str, float] = field(default_factory=dict)
    bars_of: str = ""
    """Measure and unit of the bars."""
    goal: float | None = None
    """A line across the bars."""

    def markdown(self) -> str:
        parts = [f"## {self.heading}", markdown_table(self.header, self.rows)]
        if self.skipped:
            reasons = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
            parts.append(f"Not measured here: {reasons}.")
        return "\n\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a benchmark."""

    head: Mapping[str, str]
    """Name -> description of data, model and method."""
    parts: Sequence[Table | str]
    """Tables, and Markdown paragraphs between them."""
    results: Any
    """All figures, for the JSON file."""
    packages: Sequence[str] = ()
    """Distributions whose versions the report names, beyond torch, transformers and TRL."""
    label: str = ""
    """Suffix that distinguishes result files of the same day."""


def write_report(name: str, title: str, size: str, command: str, report: Report, out: Path) -> Path:
    """Write `report` as Markdown, JSON and, if matplotlib is installed, a plot; return the Markdown path."""
    today = date.today().isoformat()
    head = {"command": command, "machine": machine(report.packages), **report.head}
    stem = "-".join(filter(None, (name, today, size, report.label)))
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}, {today}", "\n".join(f"- {key}: {value}" for key, value in head.items())]
    parts += [part.markdown() if isinstance(part, Table) else part for part in report.parts]
    plotted = [part for part in report.parts if isinstance(part, Table) and part.bars]
    if plotted and installed("matplotlib"):
        _plot(title, plotted, out / f"{stem}.png")
        parts.append(f"![{title}]({stem}.png)")
    path = out / f"{stem}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = json.dumps({"date": today, **head, "results": _rounded(report.results)}, indent=2)
    (out / f"{stem}.json").write_text(content + "\n", encoding="utf-8")
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def machine(packages: Sequence[str] = ()) -> str:
    """Describe processor, cores, GPU and versions."""
    import torch

    from commonit_trl.compare.processor import processor

    gpu = processor(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores of an {processor(torch.device('cpu'))}, {gpu}"
    versions = ((package, installed(package)) for package in ("torch", "transformers", "trl", *packages))
    named_versions = ", ".join(f"{package} {number}" for package, number in versions if number)
    return f"{cores}; Python {platform.python_version()}, {named_versions}"


def _rounded(value: Any) -> Any:
    """Round floats to `FLOAT_DIGITS` significant digits; more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.{FLOAT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _plot(title: str, tables: Sequence[Table], path: Path) -> None:
    """Draw one panel of bars per table; bars of this package are darker."""
    from matplotlib.figure import Figure

    heights = [0.8 + 0.3 * len(table.bars) for table in tables]
    figure = Figure(figsize=(8, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(tables), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for table, panel in zip(tables, panels):
        colors = ["#1f5fa8" if name.startswith("this package") else "#9db8d6" for name in table.bars]
        drawn = panel.barh(list(table.bars), list(table.bars.values()), color=colors)
        panel.bar_label(drawn, fmt=_short, padding=3, fontsize=8)
        panel.invert_yaxis()
        if max(table.bars.values()) > WIDE * min(table.bars.values()):
            panel.set_xscale("log")
        panel.margins(x=0.12)
        panel.tick_params(labelsize=8)
        panel.set_title(f"{table.heading}: {table.bars_of}", fontsize=9, loc="left")
        if table.goal is not None:
            panel.axvline(table.goal, color="#c0392b", linewidth=1, linestyle="--")
    figure.savefig(path, dpi=110)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1_000 else f"{value:,.0f}"
