"""Axolotl features with CommonIT: padding, packed evaluation, LoRA, token counts, `max_steps` and the output folder."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.axolotl_recipes import launch, make_rows, recipe, result, seen, write_recipe, write_rows

ROWS = make_rows({"x": 31, "y": 17, "z": 9})
LENGTH = 512
PACKED = {"sample_packing": True, "sequence_len": LENGTH}
RUNS = {
    "padded": {"pad_to_sequence_len": True, "sequence_len": LENGTH, "micro_batch_size": 4},
    "packed-padded": {**PACKED, "pad_to_sequence_len": True, "multipack_real_batches": False},
    "packed-eval": {**PACKED, "eval_sample_packing": True, "val_set_size": 12, "eval_strategy": "epoch"},
    "lora": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),  # they need a GPU
        "gradient_checkpointing": True,
        "include_tkps": True,
        "commonit_report": True,
        "save_strategy": "epoch",
    },
    "max-steps": {"max_steps": 5, "warmup_ratio": 0.4, "num_epochs": 4},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("features")
    data = write_rows(directory / "rows.jsonl", ROWS)
    runs = []
    for name, keys in RUNS.items():
        keys = {"commonit_metric": "task", "num_epochs": 1, "output_dir": str(directory / f"{name}-out"), **keys}
        path = write_recipe(directory / f"{name}.yml", recipe(directory, data, **keys))
        runs.append({"name": name, "recipe": str(path)})
    launch(runs, directory)
    return directory


def shapes(directory, name):
    lines = Path(f"{directory / name}.ids.rank0").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["shape"] for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_each_step_has_one_task(directory, name):
    for step in seen(directory / name).values():
        assert len({ROWS[number]["task"] for batch in step[0] for number in batch}) == 1


def test_padding_to_fixed_length_keeps_micro_batch_size(directory):
    """Rows padded to one length must not be balanced by their unpadded lengths."""
    for rows, tokens in shapes(directory, "padded"):
        assert tokens == LENGTH and rows <= 4
    assert {tokens for _, tokens in shapes(directory, "packed-padded")} <= {LENGTH, 2 * LENGTH}


def test_lora_with_checkpointing_counts_tokens(directory):
    outcome, trained = result(directory / "lora"), defaultdict(int)
    for line in Path(f"{directory / 'lora'}.ids.rank0").read_text(encoding="utf-8").splitlines():
        trained[json.loads(line)["step"]] += json.loads(line)["trained"]
    logged = [entry["tokens/trainable"] for entry in outcome["log"] if "tokens/trainable" in entry]
    assert logged[-1] == sum(trained.values())
    assert (directory / "lora-out" / "adapter_model.safetensors").exists()


def test_output_contains_groups_and_report(directory):
    output = directory / "lora-out"
    (checkpoint,) = output.glob("checkpoint-*")
    files = {file.name for file in (output / "commonit").iterdir()}
    assert files == {"groups.json", "run.json", "report.html"}
    assert {"groups.json", "run.json"} <= {file.name for file in (checkpoint / "commonit").iterdir()}
    assert (output / "README.md").read_text(encoding="utf-8").count("## CommonIT") == 1


def test_max_steps_sets_warmup(directory):
    outcome = result(directory / "max-steps")
    assert (outcome["global_step"], outcome["max_steps"], outcome["warmup_steps"]) == (5, 5, 2)
