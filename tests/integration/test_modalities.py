"""A mixture of rows with and without images under a real ZeRO-3 engine, on two CPU ranks.

Under ZeRO-3 the ranks gather the weights of each layer together. In a micro-step where one rank has images and the
other has none, only one of them gathers the vision encoder, and the two wait for each other.
"""

import json
import subprocess

import pytest
from helpers.kinds import image_rows
from helpers.launch import WORKER, start

pytest.importorskip("PIL")

ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
BY_MODALITY = {"commonit_metric": "task", "commonit_task_column": ["modality"]}


def launch(directory, options, timeout=300, **run):
    spec = [{"dir": str(directory), "options": options, "deepspeed": ZERO_3, **run}]
    return start(WORKER.with_name("modality_worker.py"), spec, directory, world_size=2, timeout=timeout)


def seen(directory):
    """Return `[optimizer step, modality, row numbers]` of each micro-batch of each rank."""
    paths = [directory / f"seen.rank{rank}" for rank in range(2)]
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]


@pytest.mark.slow
def test_steps_of_one_modality_train_under_zero_3(tmp_path):
    """I1 and I2 by modality; an evaluation on a set per modality, and a resume at the exact next micro-batch."""
    options = {**BY_MODALITY, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}
    ended = launch(tmp_path / "whole", options, evaluates=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["engine"], result["stage"], result["world_size"]) == ("DeepSpeedEngine", 3, 2)

    modalities, ranks = image_rows()["modality"], seen(tmp_path / "whole")
    steps = {}
    for step, modality, numbers in (entry for rank in ranks for entry in rank):
        assert {modalities[number] for number in numbers} == {modality}
        steps.setdefault(step, set()).add(modality)
    assert (
        len(steps) == result["global_step"] and sorted(map(tuple, steps.values())) == [("image",)] * 3 + [("text",)] * 2
    )
    assert sorted(number for rank in ranks for *_, numbers in rank for number in numbers) == list(
        range(len(modalities))
    )
    evaluated = {name for entry in result["log"] for name in entry if name.endswith("_loss")}
    assert {"eval_image_loss", "eval_text_loss"} <= evaluated

    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-3")
    ended = launch(tmp_path / "resumed", BY_MODALITY, resume=checkpoint)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert seen(tmp_path / "resumed") == [[entry for entry in rank if entry[0] >= 3] for rank in ranks]


@pytest.mark.slow
def test_the_baseline_does_not_end_under_zero_3(tmp_path):
    """The test above can fail: baseline batches stop at the first micro-step in which the modalities differ."""
    try:
        codes = launch(tmp_path, {"commonit_metric": "none"}, timeout=40).codes
    except subprocess.TimeoutExpired:
        codes = None
    assert codes is None or any(codes)
    assert not (tmp_path / "result.json").exists()
    last = [rank[-1] for rank in seen(tmp_path)]
    assert {modality for _, modality, _ in last} == {"image", "text"}
