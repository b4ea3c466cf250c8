"""Evaluation and logging on two ranks, beside the parent's."""

import json
import os
from pathlib import Path

import pytest
from helpers import forked

WORKER = Path(forked.__file__).with_name("evaluation_worker.py")


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world_size: f"W{world_size}")
def results(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = forked.run(
        [str(WORKER), str(directory)], env=environment, cwd=directory, world_size=request.param, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((directory / "result.json").read_text(encoding="utf-8"))


def test_i8_eval_loss_is_the_parents_and_group_losses_are_those_of_the_rows(results):
    """I8: `eval_loss` to the last digit; group losses token-weighted, each row once, although the last batches are
    filled with rows of the first ones."""
    assert results["ours"]["eval_loss"] == results["parent"]["eval_loss"]
    for group, loss in results["expected"].items():
        assert results["ours"][f"eval_{group}_loss"] == pytest.approx(loss, rel=1e-5)


def test_user_code_may_log_on_the_first_rank_alone(results):
    """`log` has no collective, so a loss that a callback logs on rank 0 neither hangs nor shifts the group metrics."""
    assert results["logged alone"] == 3 and results["group losses"] == 3
