"""Axolotl takes the paper's recipes; tests/integration/test_paper_recipes.py tests their settings and the script."""

import re
import sys
from itertools import product

import pytest
import yaml
from test_examples import PLUGIN, ROOT, check_command, unknown_keys
from test_examples import load as load  # the fixture

pytestmark = pytest.mark.slow

PAPER = ROOT / "example_configs" / "paper"
sys.path.append(str(PAPER))

import make_recipes  # noqa: E402


def test_every_recipe_is_valid_without_unknown_keys(load, monkeypatch):
    """Each model with each metric; recipes of the three datasets only differ in file names."""
    monkeypatch.chdir(ROOT)  # the paths of the DeepSpeed configs are relative to it
    for model, metric in product(make_recipes.MODELS, make_recipes.METRICS):
        keys = yaml.safe_load(make_recipes.make_recipe("axolotl", model, "flan", metric, PAPER))
        cfg, schema = load(keys)
        assert unknown_keys(keys, schema) == []
        assert PLUGIN in cfg.plugins and cfg.commonit_metric == metric
        assert cfg.bf16 is cfg.tf32 is cfg.gradient_checkpointing is True
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
