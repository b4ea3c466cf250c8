"""I1 and I2 on a real mixture with three entries of `datasets:`, by `benchmarks/axolotl_real_data.py`.

Rows and tasks are identified by the model's input tokens; by the same count, Axolotl's own batches are mixed.
"""

import json
import os
from pathlib import Path

import pytest
from helpers import forked
from helpers.axolotl_recipes import ENVIRONMENT

ROOT = Path(__file__).parents[2]
ROWS = 150

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    command = [ROOT / "benchmarks" / "__main__.py", "axolotl_real_data", "--data", real_data]
    command += ["--set", f"rows={ROWS}", "--out", folder]
    done = forked.run([*map(str, command)], env={**os.environ, **ENVIRONMENT}, cwd=ROOT, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("name", ["unpacked", "packed", "packed, multipack_real_batches"])
def test_steps_are_pure_and_cover_every_row(name, found):
    ours, axolotls = found["trained"][name]["ours"], found["trained"][name]["axolotl"]
    assert ours["rows"] == axolotls["rows"] == ROWS
    assert ours["pure_steps"] == 1.0
    assert (ours["lost"], ours["repeated"]) == (0, 0)
    assert axolotls["pure_steps"] < 0.5
