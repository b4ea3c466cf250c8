"""I1 to I3 and I5 with Axolotl and DeepSpeed ZeRO-1, 2 and 3 on two ranks.

The batches are those without DeepSpeed, and a resumed run trains the remaining ones.
"""

import json

import pytest
from helpers.axolotl_recipes import axolotl, launch, make_rows, recipe, result, seen, write_recipe, write_rows
from helpers.toys import rows_in

pytestmark = pytest.mark.slow

ROWS = make_rows({"x": 13, "y": 7, "z": 1})
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deepspeed")
    data = write_rows(directory / "rows.jsonl", ROWS)
    keys = {"commonit_metric": "task", "gradient_accumulation_steps": 2, "save_strategy": "epoch"}

    def run(name, **more):
        more = {"output_dir": str(directory / f"{name}-out"), **more}
        return {
            "name": name,
            "recipe": str(write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys, **more))),
        }

    def zero(stage):
        config = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
        path = directory / f"zero{stage}-config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return {"deepspeed": str(path), "accelerator_config": {"use_configured_state": True}}

    plain = run("plain")
    prepared = axolotl("preprocess", directory / "plain.yml")
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    launch([plain], directory, 2)
    launch([{**run(f"zero{stage}", **zero(stage)), "deepspeed": True} for stage in STAGES], directory, 2)
    half = result(directory / "plain")["global_step"] // 2
    checkpoint = directory / "zero2-out" / f"checkpoint-{half}"
    resumed = run("resumed", **zero(2), resume_from_checkpoint=str(checkpoint))
    launch([{**resumed, "deepspeed": True}], directory, 2)
    return directory


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_engine_is_used(directory, stage):
    outcome = result(directory / f"zero{stage}")
    assert (outcome["wrapped"], outcome["stage"], outcome["world_size"]) == ("DeepSpeedEngine", stage, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_does_not_change_batches(directory, stage):
    steps = seen(directory / f"zero{stage}", 2)
    assert steps == seen(directory / "plain", 2)
    for step in steps.values():
        assert len({ROWS[number]["task"] for number in rows_in([step])}) == 1


def test_resumed_run_trains_second_epoch(directory):
    whole, resumed = seen(directory / "zero2", 2), seen(directory / "resumed", 2)
    assert resumed == {step: whole[step] for step in range(len(whole) // 2, len(whole))}
