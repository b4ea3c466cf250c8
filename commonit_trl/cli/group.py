"""`commonit group`: groups fitted, or loaded and given new rows, ahead of training.

What it writes is what `load_grouper` reads, `groups.json` with its arrays, and the assignment of the rows beside it.
Fitting also fills the cache of groups, so that a training run on the same rows and options loads them. Started by
`torchrun` or `accelerate launch`, the ranks share the encoding of texts through that cache, and the first one writes.
"""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.cli.recipes import Recipe
from commonit_trl.config import METRICS, OPTIONS, READ_BY, CommonITArguments, check_choice
from commonit_trl.files import write_arrays
from commonit_trl.grouping import Grouper, build_grouper, fit_assign_cached, load_grouper
from commonit_trl.report import print_sizes
from commonit_trl.sanitize import shown

logger = logging.getLogger(__name__)

ASSIGNMENT_FILE = "assignment.safetensors"
# The options that decide how groups are fitted, and their names among those of the groupers.
FITTED_WITH = {
    "commonit_task_column": "columns",
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
    """(rows,) group ids; -1 for rows that belong to none of the groups, which were loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `commonit group` alone."""
    parser.add_argument("--output", metavar="DIR", required=True, help="directory for the groups and the assignment")


def run(recipe: Recipe, asked: argparse.Namespace) -> int:
    """Fit or load the groups, assign the rows, save both; returns the exit code."""
    (metric,) = asked_metrics(recipe.options.commonit_metric, load=asked.load)
    grouped = group_rows(recipe, metric, load=asked.load)
    if os.environ.get("RANK", "0") != "0":
        return 0
    directory = Path(asked.output)
    try:
        grouped.grouper.save(directory)
        write_arrays(directory / ASSIGNMENT_FILE, {"group_ids": grouped.group_ids})
    except OSError as error:
        raise ValueError(
            f"--output {directory} cannot be written ({error.strerror}): name a directory that this user may write."
        ) from error
    print_sizes(grouped.grouper, grouped.group_ids)
    print(f"Saved in {shown(str(directory))}.")
    return 0


def asked_metrics(given: str | None, compare: str | None = None, load: str | None = None) -> list[str]:
    """The metrics that the options ask for: `compare` names them, separated by commas, else the loaded groups do, else
    `commonit_metric`, which is `given`."""
    known = [metric for metric in METRICS if metric != "none"]
    if load is not None:
        metric = load_grouper(load).metric
        for option, other in (("commonit_metric", given), ("compare", compare)):
            if other not in (None, metric):
                raise ValueError(f"{option}={other} and --load {load}, which has groups of {metric!r}: remove one.")
        return [metric]
    if compare is not None:
        metrics = list(dict.fromkeys(name.strip() for name in compare.split(",")))
        for metric in metrics:
            check_choice("--compare", metric, known)
        return metrics
    if given is None:
        raise ValueError(f"commonit_metric is not set: write --commonit_metric {', '.join(known)}, or --compare some.")
    check_choice("commonit_metric", given, known)
    return [given]


def options_for(given: Any, metric: str, *, compared: bool = False) -> CommonITArguments:
    """The checked options of one metric.

    Args:
        given: has the `commonit_*` options as attributes.
        compared: to other metrics, which read other options: those that this one does not read keep their defaults.
    """
    values = {name: getattr(given, name) for name in OPTIONS} | {"commonit_metric": metric}
    if compared:
        values = {name: value for name, value in values.items() if metric in READ_BY.get(name, METRICS)}
    return CommonITArguments(**values)


def group_rows(recipe: Recipe, metric: str, *, compared: bool = False, load: str | None = None) -> Grouped:
    """Fit the groups of `metric` to the rows, as training does, or load groups; and assign the rows.

    Raises:
        ValueError: where the metric needs what the rows do not have, and where the options ask for other groups than
            the loaded ones.
    """
    options, rows = options_for(recipe.options, metric, compared=compared), recipe.rows
    if metric == "length" and not rows.tokenized:
        raise ValueError(
            "commonit_metric='length' counts tokens and the rows have none: add --tokenizer, a hub name or directory."
        )
    if load is None:
        asked = build_grouper(options, rows.columns, seed=recipe.seed)
        grouper, group_ids = fit_assign_cached(asked, rows, options.commonit_cache_dir)
        grouper.log_notices()
        return Grouped(options=options, grouper=grouper, group_ids=group_ids)
    grouper = load_grouper(load)
    _check_loaded(grouper, load, options)
    group_ids = grouper.assign(rows)
    homeless = int(np.count_nonzero(group_ids < 0))
    if homeless == len(group_ids):
        raise ValueError(
            f"--load {load}: none of the {homeless} rows belongs to one of its {len(grouper.names)} groups."
        )
    if homeless:
        logger.warning("--load %s: %d of %d rows belong to none of its groups.", load, homeless, len(group_ids))
    return Grouped(options=options, grouper=grouper, group_ids=group_ids)


def _check_loaded(grouper: Grouper, load: str, options: CommonITArguments) -> None:
    """Refuse an option that says how groups are fitted, where the loaded ones were fitted in another way."""
    for name, key in FITTED_WITH.items():
        value = getattr(options, name)
        if value != OPTIONS[name].default and value != grouper.options[key]:
            raise ValueError(
                f"{name}={value!r} and --load {load}, whose groups were fitted with {grouper.options[key]!r}: remove "
                "one of the two."
            )
