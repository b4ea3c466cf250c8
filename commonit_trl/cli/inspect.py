"""`commonit inspect`: the groups, steps and batches of a run before it trains, for one metric or several."""

import argparse
import contextlib
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from commonit_trl.cli.group import asked_metrics, group_rows
from commonit_trl.cli.recipes import Recipe
from commonit_trl.plan import plan_epoch
from commonit_trl.report import Inspection, inspect_groups, print_inspections, write_html
from commonit_trl.trainer.mixin import weights_by_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `commonit inspect` alone."""
    parser.add_argument("--world_size", type=int, metavar="W", help="data-parallel ranks to plan for")
    parser.add_argument("--compare", metavar="METRIC,...", help="metrics to show side by side")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a report with charts, one file that needs no network")


def run(recipe: Recipe, asked: argparse.Namespace) -> int:
    """Inspect `recipe` and show what was found; returns the exit code."""
    metrics = asked_metrics(recipe.options.commonit_metric, asked.compare, asked.load)
    if asked.world_size is not None:
        recipe = replace(recipe, world_size=asked.world_size)
    compared, embed = asked.compare is not None, asked.html is not None
    with contextlib.redirect_stdout(sys.stderr):  # for the libraries' messages: stdout may be JSON
        inspections = [
            inspect_recipe(recipe, metric, compared=compared, load=asked.load, embed=embed) for metric in metrics
        ]
    if asked.html is not None:
        try:
            write_html(Path(asked.html), inspections)
        except OSError as error:
            raise ValueError(
                f"--html {asked.html} cannot be written ({error.strerror}): name a file that this user may write."
            ) from error
    if asked.json:
        print(json.dumps({"inspections": [inspection.to_json() for inspection in inspections]}, indent=2))
    else:
        print_inspections(inspections)
    return 0


def inspect_recipe(
    recipe: Recipe, metric: str, *, compared: bool = False, load: str | None = None, embed: bool = False
) -> Inspection:
    """The numbers of one metric's groups and of their first epoch; the arguments are those of `group_rows` and
    `inspect_groups`."""
    grouped = group_rows(recipe, metric, compared=compared, load=load)
    options, grouper = grouped.options, grouped.grouper
    found = np.flatnonzero(grouped.group_ids >= 0)
    rows, lengths = recipe.rows, recipe.lengths
    homeless = len(rows) - len(found)
    if homeless:
        rows = copy.copy(rows)
        rows.dataset = rows.dataset.select(found)
        lengths = None if lengths is None else lengths[found]
    group_ids = sample_groups = grouped.group_ids[found]
    if recipe.pack is not None:
        if homeless:
            raise ValueError(f"--load {load}: packing needs every row in a group, and {homeless} are in none.")
        sample_groups, lengths = recipe.pack(grouper, group_ids, recipe.world_size)
    plan = plan_epoch(
        sample_groups,
        lengths if recipe.arranged else None,
        micro_batch_size=recipe.micro_batch_size,
        world_size=recipe.world_size,
        accumulation_steps=recipe.accumulation_steps,
        purity=options.commonit_purity,
        remainder=options.commonit_remainder,
        weights=weights_by_id(options.commonit_weights, grouper.names, sample_groups),
        seed=recipe.seed,
    )
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
    )
    if not homeless:
        return inspection
    said = f"{homeless} of {len(recipe.rows)} rows belong to none of the loaded groups and are left out here."
    return replace(inspection, warnings=(said, *inspection.warnings))
