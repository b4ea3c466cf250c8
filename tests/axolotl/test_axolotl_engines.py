"""I1 to I3 and I5 with Axolotl under DeepSpeed ZeRO-1, 2 and 3 and under FSDP2, on two ranks.

The batches are those of DDP, and a resumed run trains the remaining ones.
"""

import json

import pytest
from helpers.axolotl_recipes import axolotl, launch, make_rows, recipe, result, seen, write_recipe, write_rows
from helpers.toys import rows_in

pytestmark = pytest.mark.slow

ROWS = make_rows({"x": 13, "y": 7, "z": 1})
STAGES = (1, 2, 3)
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


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

    def train(engine, runs):
        launch([{**run, "engine": engine} for run in runs], directory, 2)

    plain = run("plain")
    prepared = axolotl("preprocess", directory / "plain.yml")
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    launch([plain], directory, 2)
    half = result(directory / "plain")["global_step"] // 2
    checkpoint = f"checkpoint-{half}"
    train("deepspeed", [run(f"zero{stage}", **zero(stage)) for stage in STAGES])
    resume = {"resume_from_checkpoint": str(directory / "zero2-out" / checkpoint)}
    train("deepspeed", [run("zero2-resumed", **zero(2), **resume)])
    resume = {"resume_from_checkpoint": str(directory / "fsdp2-out" / checkpoint)}
    train("fsdp2", [run("fsdp2", **FSDP2), run("fsdp2-resumed", **FSDP2, **resume)])
    return directory


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_engine_is_used(directory, stage):
    outcome = result(directory / f"zero{stage}")
    assert (outcome["wrapped"], outcome["stage"], outcome["world_size"]) == ("DeepSpeedEngine", stage, 2)


def test_fsdp2_shards_the_model(directory):
    outcome = result(directory / "fsdp2")
    assert (outcome["shards"], outcome["world_size"]) == ([2], 2)


@pytest.mark.parametrize("name", [*(f"zero{stage}" for stage in STAGES), "fsdp2"])
def test_engine_does_not_change_batches_and_losses(name, directory):
    steps = seen(directory / name, 2)
    assert steps == seen(directory / "plain", 2)
    for step in steps.values():
        assert len({ROWS[number]["task"] for number in rows_in([step])}) == 1
    assert losses(directory / name) == pytest.approx(losses(directory / "plain"), rel=1e-4)


@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_resumed_run_trains_second_epoch(name, directory):
    whole, resumed = seen(directory / name, 2), seen(directory / f"{name}-resumed", 2)
    assert resumed == {step: whole[step] for step in range(len(whole) // 2, len(whole))}
    expected = losses(directory / name)[len(whole) // 2 :]
    assert losses(directory / f"{name}-resumed")[-len(expected) :] == pytest.approx(expected, rel=1e-5)


def losses(path):
    return [entry["loss"] for entry in result(path)["log"] if "loss" in entry]
