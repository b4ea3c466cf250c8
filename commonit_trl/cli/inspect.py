"""Show the groups, steps and batches of a run before it trains, for one metric or several: `commonit inspect`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console

from commonit_trl.cli.group import asked_strategies, group_rows, options_of
from commonit_trl.cli.recipes import Recipe
from commonit_trl.config import CommonITArguments
from commonit_trl.plan import PlanSpec
from commonit_trl.report import Inspection, inspect_groups, print_inspections, write_html


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `commonit inspect` has."""
    parser.add_argument("--world_size", type=int, metavar="W", help="data-parallel ranks to plan for")
    parser.add_argument("--compare", metavar="METRIC[:OPTION=VALUE...],...", help="show these side by side")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a report with charts, one self-contained file")


def run(recipe: Recipe, asked: argparse.Namespace, stdout: TextIO) -> int:
    """Inspect `recipe`, print the numbers to `stdout` and return the exit code."""
    strategies = asked_strategies(recipe.options.commonit_metric, asked.compare, asked.load)
    if asked.world_size is not None:
        recipe = replace(recipe, world_size=asked.world_size)
    compared, embed = asked.compare is not None, asked.html is not None
    inspections = [
        replace(
            inspect_recipe(recipe, options_of(recipe, strategy, compared=compared), load=asked.load, embed=embed),
            name=strategy.name,
        )
        for strategy in strategies
    ]
    if asked.html is not None:
        try:
            write_html(Path(asked.html), inspections)
        except OSError as error:
            raise ValueError(
                f"--html {asked.html}: cannot be written ({error.strerror}). Name a file that this user may write."
            ) from error
    if asked.json:
        print(json.dumps({"inspections": [inspection.to_json() for inspection in inspections]}, indent=2), file=stdout)
    else:
        print_inspections(inspections, Console(file=stdout, highlight=False))
    return 0


def inspect_recipe(
    recipe: Recipe, options: CommonITArguments, *, load: str | None = None, embed: bool = False
) -> Inspection:
    """Return the numbers of the groups and of their first epoch.

    The arguments are those of `group_rows` and `inspect_groups`.
    """
    grouped = group_rows(recipe, options, load)
    grouper = grouped.grouper
    assigned = np.flatnonzero(grouped.group_ids >= 0)
    rows, lengths = recipe.rows, recipe.lengths
    unassigned = len(rows) - len(assigned)
    if unassigned:
        rows = rows.select(assigned)
        lengths = None if lengths is None else lengths[assigned]
    group_ids = sample_groups = grouped.group_ids[assigned]
    if recipe.pack is not None:
        if unassigned:
            raise ValueError(
                f"--load {load}: {unassigned} rows are unassigned, and packing needs a group for every row. Fit groups "
                "to these rows, or set packing=False."
            )
        sample_groups, lengths = recipe.pack(options, grouper, group_ids, recipe.world_size)
    spec = PlanSpec.from_options(
        options,
        grouper.names,
        sample_groups,
        positions=grouper.positions(),
        row_counts=np.bincount(group_ids, minlength=len(grouper.names)),
        tokens=lengths,
        lengths=lengths if recipe.balanced else None,
        micro_batch_size=recipe.micro_batch_size,
        world_size=recipe.world_size,
        accumulation_steps=recipe.accumulation_steps,
        seed=recipe.seed,
    )
    plan = spec.plan()
    inspection = inspect_groups(
        grouper,
        group_ids,
        rows,
        plan,
        options=options,
        lengths=lengths,
        padding_free=recipe.padding_free,
        seed=recipe.seed,
        embed=embed,
        dropped=grouped.dropped,
    )
    if not unassigned:
        return inspection
    note = f"{unassigned} of {len(recipe.rows)} rows are unassigned (in no loaded group) and not counted here."
    return replace(inspection, warnings=(note, *inspection.warnings))
