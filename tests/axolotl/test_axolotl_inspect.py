"""`commonit inspect --axolotl` shows what training on the recipe does: the same groups, steps and bins as the run that
follows, without loading a model."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import forked
from helpers.axolotl_recipes import (
    ENVIRONMENT,
    launch,
    make_rows,
    process,
    recipe,
    result,
    seen,
    write_recipe,
    write_rows,
)

from axolotl_plugin.recipe import read_recipe
from commonit_trl.grouping.task import TaskGrouper

ROWS = make_rows({"x": 23, "y": 14, "z": 3})
CASES = {
    "plain": {"gradient_accumulation_steps": 2},
    "packed": {"sample_packing": True, "multipack_real_batches": False, "sequence_len": 768},
}


def commonit(*arguments, cwd, start=forked.run):
    program = str(Path(sys.executable).with_name("commonit"))
    return start([program, *map(str, arguments)], env={**os.environ, **ENVIRONMENT}, cwd=cwd)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A recipe of each case: inspected first, then trained for one epoch from what that prepared."""
    directory = tmp_path_factory.mktemp("inspect")
    data = write_rows(directory / "rows.jsonl", ROWS)
    runs = []
    for name, keys in CASES.items():
        keys = {"commonit_metric": "task", "num_epochs": 1, "output_dir": str(directory / f"{name}-out"), **keys}
        path = write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys))
        # with what another machine would train in, and this one does not have
        gpu = write_recipe(directory / f"{name}-gpu.yml", recipe(directory, data, **{**keys, "bf16": True}))
        start = process if name == "plain" else forked.run  # libraries talk as they are imported, and JSON stays JSON
        shown = commonit("inspect", "--axolotl", gpu, "--json", cwd=directory, start=start)
        assert shown.returncode == 0, shown.stderr[-3000:]
        (directory / f"{name}.shown.json").write_text(shown.stdout, encoding="utf-8")
        runs.append({"name": name, "recipe": str(path)})
    launch(runs, directory)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_training(directory, name):
    (shown,) = json.loads((directory / f"{name}.shown.json").read_text(encoding="utf-8"))["inspections"]
    steps = seen(directory / name)
    tasks = Counter(ROWS[step[0][0][0]]["task"] for step in steps.values())
    assert shown["planned"]["steps"] == result(directory / name)["global_step"] == len(steps)
    assert {group["name"]: group["steps"] for group in shown["groups"]} == tasks
    assert {group["name"]: group["rows"] for group in shown["groups"]} == Counter(row["task"] for row in ROWS)
    assert shown["planned"]["pure_steps"] == 1
    if name == "plain":
        assert shown["samples"] == len(ROWS)
    else:
        bins = sum(len(batch) > 0 for step in steps.values() for batch in step[0])
        assert shown["samples"] == bins < len(ROWS)


def test_rows_are_packed_for_the_ranks_that_are_asked_for(directory):
    read = read_recipe(str(directory / "packed.yml"))
    grouper = TaskGrouper(columns=read.options.commonit_task_column).fit(read.rows)
    for world_size in (1, 4):
        group_ids, tokens = read.pack(read.options, grouper, grouper.assign(read.rows), world_size)
        bins = np.bincount(group_ids)
        assert all(count % world_size == 0 or group == 2 for group, count in enumerate(bins)), bins  # z has three rows
        assert tokens.sum() == read.lengths.sum()
