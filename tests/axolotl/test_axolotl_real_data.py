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
EFFICIENCY_MARGIN = 0.03
SMALL_STEP = 32  # sequences of 2,048 tokens in a step: a fortieth of the data

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


def test_less_padding_without_packing(found):
    unpacked = found["trained"]["unpacked"]
    assert unpacked["ours"]["cost"] < unpacked["axolotl"]["cost"]


def test_packing_by_task_is_nearly_as_efficient(found):
    """For steps that are small relative to the data, or micro-batches that may hold fewer bins."""
    losses = {
        (row["micro_batch_size"], row["multipack_real_batches"], int(micro_batches)): row["axolotl"] - efficiency
        for row in found["packed"]
        for micro_batches, efficiency in row["ours"]["task"].items()
    }
    compared = {key: loss for key, loss in losses.items() if key[1] or key[0] * key[2] <= SMALL_STEP}
    assert len(compared) == 12
    assert max(compared.values()) < EFFICIENCY_MARGIN, compared
