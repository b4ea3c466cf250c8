"""The paper's recipes for Axolotl: all of them are valid, without a key that Axolotl ignores; their commands parse; and
every model family trains by every metric, with tiny parts in the place of what is large.

TRL's half, and that the files are those that the script writes: tests/integration/test_paper_recipes.py.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from recipes import launch, result, save_model, seen, write_recipe, write_rows
from test_examples import PLUGIN, ROOT, check_command, read, unknown_keys
from test_examples import load as load  # the fixture

RECIPES = sorted((ROOT / "example_configs" / "paper" / "axolotl").glob("*.yml"))
FAMILIES = {"llama-7b": "llama", "qwen2-7b": "qwen2", "bloom-7b": "bloom"}
METRICS = ("task", "length", "embedding")
DATASETS = ("flan", "cot", "alpaca")
# Each dataset once with each family, and once by each metric.
TRAINED = [
    f"{model}-{DATASETS[(i + j) % 3]}-{metric}" for i, model in enumerate(FAMILIES) for j, metric in enumerate(METRICS)
]
TOPICS = {"geography": "Which city is the capital of country", "arithmetic": "What is the sum of the numbers 7 and"}
ROWS_PER_TOPIC = 48


# --- the files --------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_model_dataset_and_metric():
    assert len(RECIPES) == 5 * 3 * 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_valid_and_axolotl_ignores_no_key_of_it(path, load, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the paths of the DeepSpeed configs begin
    cfg, schema = load(read(path))
    assert unknown_keys(read(path), schema) == []
    large, metric = "13b" in path.stem, path.stem.rsplit("-", 1)[1]
    assert PLUGIN in cfg.plugins and cfg.commonit_metric == metric
    assert (cfg.micro_batch_size, cfg.learning_rate) == ((4, 2.5e-6) if large else (8, 5e-6))
    assert (cfg.gradient_accumulation_steps, cfg.num_epochs, cfg.sequence_len) == (1, 3, 2048)
    assert (cfg.lr_scheduler, cfg.warmup_ratio, cfg.weight_decay) == ("linear", 0.03, 0)
    assert cfg.bf16 is cfg.tf32 is cfg.gradient_checkpointing is True
    assert json.loads(Path(cfg.deepspeed).read_text())["zero_optimization"]["stage"] == (2 if large else 3)
    assert not cfg.train_on_inputs and not cfg.sample_packing


def test_the_commands_are_axolotls_and_start_four_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (*RECIPES, RECIPES[0].parents[1] / "README.md"):
        lines = re.findall(r"^(?:#   )?(axolotl .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [line.split()[1] for line in lines] == ["preprocess", "train"]
        for line in lines:
            check_command(line)
            assert path.suffix == ".md" or line.split()[2] == path.relative_to(ROOT).as_posix()
        assert lines[1].endswith("--nproc_per_node 4")


# --- training ---------------------------------------------------------------------------------------------------------


def rows(topics: list[str], first: int = 0) -> list[dict[str, Any]]:
    """Rows as make_data.py makes them, with their number; the topics differ in how long the responses are."""
    return [
        {
            "prompt": f"#{number}# {TOPICS[topic]} {number}?\n",
            "completion": "a" * ({"geography": 4, "arithmetic": 60}[topic] + number % 40),
            "task": topic,
        }
        for number, topic in enumerate(topics, first)
    ]


def on_a_cpu(name: str, folder: Path, minilm: str) -> dict[str, Any]:
    """A recipe for two steps on a CPU: tiny model and data, and no more than that has to be changed."""
    keys = read(RECIPES[0].with_name(f"{name}.yml"))
    model, data, metric = name.rsplit("-", 2)
    keys |= {
        "plugins": [*keys["plugins"], "recorder.RecorderPlugin"],
        "base_model": str(folder / model),
        "datasets": [{**keys["datasets"][0], "path": str(folder / f"{data}.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / name / "out"),
        "special_tokens": {"pad_token": "<pad>"},
        "deepspeed": None,
        "bf16": False,
        "tf32": False,
        "max_steps": 2,
        "save_strategy": "no",
        "save_steps": None,
        "commonit_cache_dir": str(folder / "groups"),
    }
    if metric == "embedding":
        keys |= {
            "commonit_embedding_model": minilm,
            "commonit_reference_dataset": str(folder / "mmlu_dev.jsonl"),
        }
    return {key: value for key, value in keys.items() if value is not None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, minilm):
    """Where the recipes of TRAINED left what their models saw."""
    folder = tmp_path_factory.mktemp("paper")
    topics = [topic for topic in TOPICS for _ in range(ROWS_PER_TOPIC)]
    for name in DATASETS:
        write_rows(folder / f"{name}.jsonl", rows(topics))
    write_rows(folder / "mmlu_dev.jsonl", rows(list(TOPICS)))
    for name, architecture in FAMILIES.items():
        save_model(folder / name, architecture)
    runs = [
        {"recipe": str(write_recipe(folder / f"{name}.yml", on_a_cpu(name, folder, minilm))), "name": name}
        for name in TRAINED
    ]
    launch(runs, folder)
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_steps_of_one_group_of_its_metric(name, trained):
    """I1: as the topics differ in task, in meaning and in the length of the response, a group is of one topic."""
    steps = seen(trained / name)
    assert sorted(steps) == [0, 1]
    for [micro_batches] in steps.values():
        numbers = [row for micro_batch in micro_batches for row in micro_batch]
        assert 0 < len(numbers) <= 8
        assert len({number // ROWS_PER_TOPIC for number in numbers}) == 1
    run, metric = result(trained / name), name.rsplit("-", 1)[1]
    assert run["trainer"] == "CommonITAxolotlTrainer"
    losses = [entry["loss"] for entry in run["log"] if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    saved = json.loads((trained / name / "out" / "commonit" / "groups.json").read_text(encoding="utf-8"))
    assert saved["metric"] == metric
    if metric == "length":
        assert len(saved["names"]) == 8
    else:
        assert sorted(saved["names"]) == sorted(TOPICS)
