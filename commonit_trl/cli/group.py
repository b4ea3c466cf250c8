"""Fit groups ahead of training, or assign new rows to saved groups: `commonit group`.

It writes the groups (`groups.json` and its arrays, for `load_grouper`) and the assignment of the rows:
`assignment.parquet`, with one row per row of the source data, in its order.

| column | type | value |
|---|---|---|
| `row` | int64 | row number in the source data; null if the front end does not trace rows |
| `group` | int64 | group id; null for dropped and unassigned rows |
| `name` | string | group name; null likewise |
| `dropped` | string | reason why training drops the row; else null |

Fitting also fills the cache of groups, so a training run on the same rows and options loads them. Under `torchrun` or
`accelerate launch` the ranks share the encoding of texts through that cache, and rank 0 writes.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console

from commonit_trl.cli.quiet import Screen
from commonit_trl.cli.recipes import Recipe
from commonit_trl.compare.strategies import Strategy, parse_strategies
from commonit_trl.config import (
    METRICS,
    NO_METRIC,
    OPTIONS,
    CommonITArguments,
    check_choice,
    check_metric,
    is_read,
    parts_of,
)
from commonit_trl.files import replacing
from commonit_trl.grouping import Grouper, build_grouper, fit_assign_cached, load_grouper
from commonit_trl.grouping.dropped import DroppedRows
from commonit_trl.grouping.joined import JoinedGrouper
from commonit_trl.report import print_sizes
from commonit_trl.sanitize import sanitize

logger = logging.getLogger(__name__)

ASSIGNMENT_FILE = "assignment.parquet"
# The options that affect how groups are fitted -> the groupers' names for them.
FITTED_WITH = {
    "commonit_task_column": "columns",
    "commonit_task_file": "columns",
    "commonit_column": "column",
    "commonit_embedding_column": "column",
    "commonit_num_groups": "num_groups",
    "commonit_length_of": "of",
    "commonit_length_edges": "edges",
    "commonit_embedding_model": "model",
    "commonit_embedding_text": "text",
    "commonit_embedding_dtype": "dtype",
    "commonit_reference_dataset": "reference",
    "commonit_reference_task_column": "reference_task_column",
    "commonit_min_group_size": "min_size",
}


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """The rows of a recipe in the groups of one metric."""

    options: CommonITArguments
    grouper: Grouper
    group_ids: NDArray[np.int64]
    """(rows,) group ids; -1 for unassigned rows: no loaded group takes them."""
    dropped: DroppedRows
    """Rows that training cannot use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `commonit group` has."""
    parser.add_argument("--output", metavar="DIR", required=True, help="directory for the groups and the assignment")


def run(recipe: Recipe, asked: argparse.Namespace, screen: Screen) -> int:
    """Fit or load the groups, assign the rows, save both; return the exit code."""
    (strategy,) = asked_strategies(recipe.options.commonit_metric, load=asked.load)
    grouped = group_rows(recipe, options_of(recipe, strategy), asked.load)
    if os.environ.get("RANK", "0") != "0":
        return 0
    directory = Path(asked.output)
    try:
        grouped.grouper.save(directory)
        with replacing(directory / ASSIGNMENT_FILE) as temporary:
            pq.write_table(assignment(recipe, grouped), temporary)
    except OSError as error:
        raise ValueError(
            f"--output {directory}: cannot be written ({error.strerror}). Name a directory that this user may write."
        ) from error
    screen.log_dir = directory
    console = Console(file=screen.stdout, highlight=False)
    print_sizes(grouped.grouper, grouped.group_ids, grouped.dropped, console)
    print(f"Saved in {sanitize(str(directory))}.", file=screen.stdout)
    return 0


def assignment(recipe: Recipe, grouped: Grouped) -> pa.Table:
    """Return the group of each source row, as `assignment.parquet` holds it."""
    group_ids = grouped.group_ids
    names = pa.array([*grouped.grouper.names, None], pa.string())  # -1 takes the last
    parts = [
        {
            "row": pa.nulls(len(group_ids), pa.int64()) if recipe.source_rows is None else pa.array(recipe.source_rows),
            "group": pa.array(group_ids, mask=group_ids < 0),
            "name": names.take(pa.array(group_ids % len(names))),
            "dropped": pa.nulls(len(group_ids), pa.string()),
        }
    ]
    for part in recipe.traced:
        count = len(part.numbers)
        parts.append(
            {
                "row": pa.array(part.numbers),
                "group": pa.nulls(count, pa.int64()),
                "name": pa.nulls(count, pa.string()),
                "dropped": pa.repeat(part.reason, count),
            }
        )
    table = pa.concat_tables(map(pa.table, parts))
    return table if recipe.source_rows is None else table.sort_by("row")


def asked_strategies(given: str | None, compare: str | None = None, load: str | None = None) -> list[Strategy]:
    """Return what the options select: one metric, or the strategies of `--compare`.

    Args:
        given: `commonit_metric`.
        compare: `--compare`.
        load: `--load`, a directory of saved groups, whose metric is used.
    """
    if load is not None:
        metric = load_grouper(load).metric
        for option, other in (("commonit_metric", given), ("compare", compare)):
            if other not in (None, metric):
                raise ValueError(f"{option}={other}: --load {load} has groups of {metric!r}. Remove one of the two.")
        return [Strategy(name=metric, metric=metric)]
    if compare is not None:
        strategies = parse_strategies("--compare", compare)
        for strategy in strategies:
            if strategy.metric == NO_METRIC:
                raise ValueError(
                    f"--compare {compare}: 'none' has no groups; random batches are shown anyway. Remove it."
                )
        return strategies
    if given is None:
        raise ValueError(f"commonit_metric is not set. Write --commonit_metric {', '.join(METRICS)}.")
    check_metric("commonit_metric", given)
    if given == NO_METRIC:
        check_choice("commonit_metric", given, METRICS)
    return [Strategy(name=given, metric=given)]


def options_of(recipe: Recipe, strategy: Strategy, *, compared: bool = False) -> CommonITArguments:
    """Return the checked options of a strategy.

    Args:
        compared: whether others share the recipe's options; it then ignores those that its metric does not read.
    """
    if compared:
        return strategy.arguments(recipe.options)
    values = {name: getattr(recipe.options, name) for name in OPTIONS}
    return CommonITArguments(**values | {"commonit_metric": strategy.metric})


def group_rows(recipe: Recipe, options: CommonITArguments, load: str | None = None) -> Grouped:
    """Fit groups as training does, or load groups, and assign the rows.

    Raises:
        ValueError: when the rows lack what the metric reads, or the options contradict the loaded groups.
    """
    rows, metric = recipe.rows, options.commonit_metric
    if "length" in parts_of(metric) and not rows.tokenized:
        raise ValueError(
            f"commonit_metric={metric!r}: the rows are not tokenised. Add --tokenizer with a hub name or a directory."
        )
    if load is None:
        asked = build_grouper(options, rows.columns, seed=recipe.seed)
        grouper, group_ids = fit_assign_cached(asked, rows, options.commonit_cache_dir)
        grouper.log_notices()
        return Grouped(options=options, grouper=grouper, group_ids=group_ids, dropped=recipe.count_dropped(grouper))
    grouper = load_grouper(load)
    _check_loaded(grouper, load, options, rows.columns)
    group_ids = grouper.assign(rows)
    unassigned = int(np.count_nonzero(group_ids < 0))
    if unassigned == len(group_ids):
        raise ValueError(
            f"--load {load}: all {unassigned} rows are unassigned, in none of {len(grouper.names)} groups. Fit groups "
            "to these rows instead."
        )
    if unassigned:
        logger.warning(
            "--load %s: %d of %d rows are unassigned.",
            load,
            unassigned,
            len(group_ids),
        )
    return Grouped(options=options, grouper=grouper, group_ids=group_ids, dropped=recipe.count_dropped(grouper))


def _check_loaded(grouper: Grouper, load: str, options: CommonITArguments, columns: Sequence[str]) -> None:
    """Refuse an option that contradicts how the loaded groups were fitted."""
    if all(getattr(options, name) == OPTIONS[name].default for name in FITTED_WITH):
        return
    asked = build_grouper(options, columns)
    for name, key in FITTED_WITH.items():
        for wanted, fitted in zip(_parts(asked), _parts(grouper), strict=True):
            is_given = getattr(options, name) != OPTIONS[name].default and is_read(name, wanted.metric)
            if is_given and wanted.options[key] != fitted.options[key]:
                raise ValueError(
                    f"{name}={getattr(options, name)!r}: the groups of --load {load} were fitted with "
                    f"{fitted.options[key]!r}. Remove one of the two."
                )


def _parts(grouper: Grouper) -> tuple[Grouper, ...]:
    return grouper.parts if isinstance(grouper, JoinedGrouper) else (grouper,)
