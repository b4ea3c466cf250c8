"""The paper's recipes for Axolotl: Axolotl validates each, and one trains a tiny model.

tests/integration/test_paper_recipes.py tests the script and the recipes for TRL.
"""

import json
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from helpers.axolotl_recipes import launch, result, save_model, seen, write_recipe, write_rows
from test_examples import PLUGIN, ROOT, check_command, unknown_keys
from test_examples import load as load  # the fixture

pytestmark = pytest.mark.slow

PAPER = ROOT / "example_configs" / "paper"
sys.path.append(str(PAPER))

import make_recipes  # noqa: E402

TOPICS = {"geography": "Which city is the capital of country", "arithmetic": "What is the sum of the numbers 7 and"}
ROWS_PER_TOPIC = 48


def test_every_recipe_is_valid_without_unknown_keys(load, monkeypatch):
    """Each model with each metric; recipes of the three datasets only differ in file names."""
    monkeypatch.chdir(ROOT)  # the paths of the DeepSpeed configs are relative to it
    for model, metric in product(make_recipes.MODELS, make_recipes.METRICS):
        keys = yaml.safe_load(make_recipes.make_recipe("axolotl", model, "flan", metric, PAPER))
        cfg, schema = load(keys)
        assert unknown_keys(keys, schema) == []
        large = model == "llama-13b"
        assert PLUGIN in cfg.plugins and cfg.commonit_metric == metric
        assert (cfg.micro_batch_size, cfg.learning_rate) == ((4, 2.5e-6) if large else (8, 5e-6))
        assert (cfg.gradient_accumulation_steps, cfg.num_epochs, cfg.sequence_len) == (1, 3, 2048)
        assert (cfg.lr_scheduler, cfg.warmup_ratio, cfg.weight_decay) == ("linear", 0.03, 0)
        assert cfg.bf16 is cfg.tf32 is cfg.gradient_checkpointing is True
        assert json.loads(Path(cfg.deepspeed).read_text())["zero_optimization"]["stage"] == (2 if large else 3)
        assert not cfg.train_on_inputs and not cfg.sample_packing


def test_commands_start_four_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = {path: text for path, text in make_recipes.shipped_recipes().items() if path.suffix == ".yml"}
    texts[PAPER / "README.md"] = (PAPER / "README.md").read_text(encoding="utf-8")
    for path, text in texts.items():
        lines = re.findall(r"^(?:#   )?(axolotl .*)$", text, re.MULTILINE)
        assert [line.split()[1] for line in lines] == ["preprocess", "train"]
        for line in lines:
            check_command(line)
            assert path.suffix == ".md" or line.split()[2] == str(path)
        assert lines[1].endswith("--nproc_per_node 4")


def test_recipe_trains_pure_steps(tmp_path):
    """I1 by task on BLOOM, which only has eager attention."""
    rows = [
        {"prompt": f"#{number}# {TOPICS[topic]} {number}?\n", "completion": "a" * (4 + number % 40), "task": topic}
        for number, topic in enumerate(topic for topic in TOPICS for _ in range(ROWS_PER_TOPIC))
    ]
    keys = yaml.safe_load(make_recipes.make_recipe("axolotl", "bloom-7b", "cot", "task", PAPER))
    for key in ("deepspeed", "save_steps"):
        del keys[key]
    keys |= {
        "plugins": [*keys["plugins"], "helpers.axolotl_recorder.RecorderPlugin"],
        "base_model": save_model(tmp_path / "model", "bloom"),
        "datasets": [{**keys["datasets"][0], "path": str(write_rows(tmp_path / "cot.jsonl", rows))}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run" / "out"),
        "special_tokens": {"pad_token": "<pad>"},
        "bf16": False,
        "tf32": False,
        "max_steps": 2,
        "save_strategy": "no",
        "commonit_cache_dir": str(tmp_path / "groups"),
    }
    launch([{"recipe": str(write_recipe(tmp_path / "run.yml", keys)), "name": "run"}], tmp_path)

    steps = seen(tmp_path / "run")
    assert sorted(steps) == [0, 1]
    for [micro_batches] in steps.values():
        numbers = [row for micro_batch in micro_batches for row in micro_batch]
        assert 0 < len(numbers) <= 8
        assert len({number // ROWS_PER_TOPIC for number in numbers}) == 1
    assert result(tmp_path / "run")["trainer"] == "CommonITAxolotlTrainer"
    saved = json.loads((tmp_path / "run" / "out" / "commonit" / "groups.json").read_text(encoding="utf-8"))
    assert saved["metric"] == "task" and sorted(saved["names"]) == sorted(TOPICS)
