"""The recipes of the paper's runs: they are those that the script writes, `commonit sft` takes each of them as it
stands, and every model family trains by every metric, with tiny parts in the place of what is large.

Axolotl's half: tests/axolotl/test_paper_axolotl.py.
"""

import json
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers import Seen, as_argv, groups_of_steps
from toys import tiny_model, tiny_tokenizer

from commonit_trl.cli import launch
from commonit_trl.cli import main as cli
from commonit_trl.cli.data import load_splits
from commonit_trl.cli.sft import make_trainer

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "example_configs" / "paper"
sys.path.append(str(PAPER))

import make_data  # noqa: E402
import make_recipes  # noqa: E402

RECIPES = sorted(PAPER.glob("trl/*.yaml"))
FAMILIES = {"llama-7b": "llama", "qwen2-7b": "qwen2", "bloom-7b": "bloom"}
TOPICS = {"geography": "Which city is the capital of country", "arithmetic": "What is the sum of the numbers 7 and"}
ROWS_PER_TOPIC = 48
WITHOUT_GPU = {"use_cpu": True, "bf16": False, "tf32": False, "deepspeed": ""}


def parse(path, **options):
    (script, training, model, mixture), launch_flags = cli.parse_sft(["--config", str(path), *as_argv(options)])
    return (script, training, model, mixture), launch_flags


# --- the files ----------------------------------------------------------------------------------------------


def test_the_script_writes_these_files():
    made = make_recipes.recipes()
    files = [path for path in PAPER.rglob("*") if path.suffix in (".yaml", ".yml")]
    assert {path.relative_to(PAPER).as_posix(): path.read_text(encoding="utf-8") for path in files} == made
    assert len(made) == 5 * 3 * 3 * 2


def test_the_readme_explains_each_setting_that_is_ours():
    marked = {
        line.split("#")[0].strip().removeprefix("- ").split(":")[0]
        for text in make_recipes.recipes().values()
        for line in text.splitlines()
        if line.endswith("  # ours")
    }
    section = (PAPER / "README.md").read_text(encoding="utf-8").split("## What is ours")[1].split("\n## ")[0]
    explained = [name for line in section.splitlines() if line[:3] == "| `" for name in line.split("|")[1].split(",")]
    assert sorted(name.strip(" `") for name in explained) == sorted(marked)


def test_both_front_ends_are_told_the_same():
    names = {"model_name_or_path": "base_model", "max_length": "sequence_len", "num_train_epochs": "num_epochs"}
    names |= {"per_device_train_batch_size": "micro_batch_size", "lr_scheduler_type": "lr_scheduler"}
    names |= {"warmup_steps": "warmup_ratio"}
    for path in RECIPES:
        trl = yaml.safe_load(path.read_text(encoding="utf-8"))
        axolotl = yaml.safe_load((PAPER / "axolotl" / path.with_suffix(".yml").name).read_text(encoding="utf-8"))
        assert axolotl["datasets"][0]["path"] == trl.pop("dataset_name")
        assert trl.pop("num_processes") == 4
        assert trl.pop("output_dir").replace("/trl/", "/axolotl/") == axolotl["output_dir"]
        for name, value in trl.items():
            assert axolotl[names.get(name, name)] == value, (path.name, name)


# --- the options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_commonit_sft_takes_it_and_it_says_what_the_authors_scripts_say(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    (script, training, model, mixture), launch_flags = parse(path, **WITHOUT_GPU)
    large = "13b" in path.stem
    assert (training.per_device_train_batch_size, training.learning_rate) == ((4, 2.5e-6) if large else (8, 5e-6))
    assert (training.gradient_accumulation_steps, training.num_train_epochs, training.max_length) == (1, 3, 2048)
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("linear", 0.03, 0)
    assert (training.save_steps, training.save_total_limit, training.gradient_checkpointing) == (500, 1, True)
    assert written["bf16"] is written["tf32"] is True
    sharding = json.loads(Path(written["deepspeed"]).read_text(encoding="utf-8"))
    assert sharding["zero_optimization"]["stage"] == (2 if large else 3)
    assert launch_flags == ["--num_processes", "4"]

    _, data, metric = path.stem.rsplit("-", 2)
    assert script.dataset_name == f"out/paper/data/{data}.jsonl" and not mixture.datasets
    assert training.commonit_metric == metric and training.commonit_purity == "step"
    assert training.commonit_min_group_size == (1 if metric == "length" else 4 * training.per_device_train_batch_size)
    assert model.model_name_or_path.count("/") == 1


def test_the_commands_at_the_top_and_in_the_readme_start_four_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = [path.read_text(encoding="utf-8") for path in (*RECIPES, PAPER / "README.md")]
    lines = [line for text in texts for line in re.findall(r"^(?:#   )?(commonit sft .*)$", text, re.MULTILINE)]
    assert len(lines) == len(RECIPES) + 1
    named = set()
    for line in lines:
        *words, path = shlex.split(line)
        assert words == ["commonit", "sft", "--config"]
        _, launch_flags = parse(path, **WITHOUT_GPU)
        assert launch.prepare(launch_flags, "sft", ["--config", path]).num_processes == 4
        named.add(ROOT / path)
    assert named == set(RECIPES)


# --- the data -----------------------------------------------------------------------------------------------


def raw_rows(name):
    """Rows with the columns of the hub's datasets: 48 of each topic, whose responses differ in length too."""
    rows = []
    for topic, question in TOPICS.items():
        length = {"geography": 4, "arithmetic": 60}[topic]
        for number in range(ROWS_PER_TOPIC):
            said, answer = f"{question} {number}?", "a" * (length + number % 40)
            if name == "alpaca":
                rows.append({"instruction": f"{topic}: {said}", "input": "", "output": answer, "text": ""})
            else:
                labels = {"task_source": "Flan2021", "task_name": topic, "template_type": "zs_opt"}
                rows.append({"inputs": said, "targets": answer, **labels})
    return Dataset.from_list(rows)


def raw_reference():
    return Dataset.from_list(
        [
            {"question": f"{question}?", "subject": topic, "choices": ["one", "two"], "answer": 1}
            for topic, question in TOPICS.items()
        ]
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the four files, made by the script's own functions from rows like the hub's."""
    folder = tmp_path_factory.mktemp("data")
    for name, (_, convert) in make_data.SOURCES.items():
        raw = raw_reference() if name == "mmlu_dev" else raw_rows(name)
        make_data.make(raw, convert).to_json(folder / f"{name}.jsonl")
    return folder


def test_the_data_have_what_the_recipes_read(data):
    for name in make_data.SOURCES:
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {column for row in rows for column in row} == {"prompt", "completion", "task"}
        assert Counter(row["task"] for row in rows) == dict.fromkeys(TOPICS, 1 if name == "mmlu_dev" else 48)
    alpaca = {"instruction": "Edit, please: ", "input": " x\n", "output": " y "}
    assert make_data.from_alpaca(alpaca) == {"prompt": "Edit, please:\nx\n", "completion": "y", "task": "edit"}
    question = {"question": "1 + 1?", "subject": "maths", "choices": ["1", "2"], "answer": 1}
    assert make_data.from_mmlu(question) == {"prompt": "1 + 1?\n1\n2", "completion": "2", "task": "maths"}


def test_rows_are_chosen_at_random_and_those_without_a_response_left_out(monkeypatch):
    monkeypatch.setattr(make_data, "ROWS", 50)
    raw = Dataset.from_list([{"inputs": f"{n}", "targets": "a" if n % 2 else " ", "task_name": "t"} for n in range(99)])
    made = make_data.make(raw, make_data.from_flan)
    assert 10 < len(made) < 40
    assert all(int(prompt) % 2 for prompt in made["prompt"]) and made["prompt"][:] != sorted(made["prompt"], key=int)


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of a tiny model of each family, by the name that a recipe has for it."""
    folder = tmp_path_factory.mktemp("models")
    for name, architecture in FAMILIES.items():
        tiny_model(architecture).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def topic_of(row):
    return next(topic for topic, said in TOPICS.items() if said in row.text)


# Each dataset once with each family, and once by each metric.
@pytest.mark.parametrize(
    ("model", "data_name", "metric"),
    [
        (model, list(make_recipes.DATASETS)[(i + j) % 3], metric)
        for i, model in enumerate(FAMILIES)
        for j, metric in enumerate(make_recipes.METRICS)
    ],
)
@pytest.mark.usefixtures("in_tmp_path")
def test_it_trains_steps_of_one_group_of_its_metric(model, data_name, metric, data, models, minilm):
    """I1: as the topics differ in task, in meaning and in the length of the response, a group is of one topic."""
    options = {
        **WITHOUT_GPU,
        "model_name_or_path": models / model,
        "dataset_name": data / f"{data_name}.jsonl",
        "output_dir": "out",
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    if metric == "embedding":
        options |= {"commonit_embedding_model": minilm, "commonit_reference_dataset": data / "mmlu_dev.jsonl"}
    recipe = PAPER / "trl" / f"{model}-{data_name}-{metric}.yaml"
    (script, training, model_arguments, mixture), _ = parse(recipe, **options)
    trainer = make_trainer(model_arguments, training, *load_splits(script, mixture, training))
    assert trainer.model.config.model_type == FAMILIES[model]
    seen = Seen(trainer)
    trainer.train()

    assert len(groups_of_steps(seen, topic_of)) == 2
    assert all(0 < len(rows) <= 8 for rows in seen.steps)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    saved = json.loads(Path("out/commonit/groups.json").read_text(encoding="utf-8"))
    assert saved["metric"] == metric
    if metric == "length":
        assert len(saved["names"]) == 8
    else:
        assert sorted(saved["names"]) == sorted(TOPICS)
