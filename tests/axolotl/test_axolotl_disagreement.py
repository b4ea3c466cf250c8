"""I3 with Axolotl: ranks with different values of `commonit_metric` stop before the first batch."""

import pytest
from helpers.axolotl_recipes import axolotl, launch, make_rows, recipe, write_recipe, write_rows


@pytest.mark.parametrize("metrics", [("length", "none"), ("none", "length")], ids="-".join)
def test_ranks_stop_when_one_disables_commonit(metrics, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", make_rows({"x": 6, "y": 6}))
    recipes = [
        str(write_recipe(tmp_path / f"rank{rank}.yml", recipe(tmp_path, data, commonit_metric=metric)))
        for rank, metric in enumerate(metrics)
    ]
    prepared = axolotl("preprocess", tmp_path / "rank0.yml")
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    run = {"name": "run", "recipe": recipes[0], "rank_recipes": {"1": recipes[1]}}
    output = launch([run], tmp_path, world_size=2, code=1).stderr
    error = "ValueError: The ranks would train different batches: rank 1 differs from rank 0 in commonit_metric. Give"
    assert output.count(error) == 2 and "RuntimeError" not in output, output
    assert not list(tmp_path.glob("run.ids.*"))
