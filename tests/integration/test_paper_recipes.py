"""The recipes of the paper's runs for TRL, and the script that writes them.

Every text that the script can write is checked, without training; one recipe then trains a tiny model. Axolotl's half:
tests/axolotl/test_paper_axolotl.py.
"""

import json
import re
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers.toys import tiny_model, tiny_tokenizer
from helpers.trainers import Seen, as_argv, groups_of_steps

from commonit_trl.cli import main as cli
from commonit_trl.cli.data import load_splits
from commonit_trl.cli.sft import make_trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "example_configs" / "paper"
README = PAPER / "README.md"
sys.path.append(str(PAPER))

import make_data  # noqa: E402
import make_recipes  # noqa: E402

RUNS = list(product(make_recipes.MODELS, make_recipes.DATASETS, make_recipes.METRICS))
TOPICS = {"geography": "Which city is the capital of country", "arithmetic": "What is the sum of the numbers 7 and"}
ROWS_PER_TOPIC = 48
WITHOUT_GPU = {"use_cpu": True, "bf16": False, "tf32": False, "deepspeed": ""}


def write(path, front_end, *run):
    path.write_text(make_recipes.make_recipe(front_end, *run, path), encoding="utf-8")
    return path


def parse(path, **options):
    return cli.parse_sft(["--config", str(path), *as_argv(options)])


# --- the script ---------------------------------------------------------------------------------------------


def test_the_script_writes_the_shipped_recipes():
    files = [path for path in PAPER.rglob("*") if path.suffix in (".yaml", ".yml")]
    shipped = make_recipes.shipped_recipes()
    assert {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files} == shipped, "use --shipped"
    assert len(shipped) == 2 * 4


@pytest.mark.usefixtures("in_tmp_path")
def test_the_script_writes_a_recipe_on_demand(capsys):
    run = ["--model", "qwen2-7b", "--data", "cot", "--metric", "length"]
    for extra, path, key in (
        ([], "out/paper/recipes/trl/qwen2-7b-cot-length.yaml", "model_name_or_path"),
        (["--front-end", "axolotl"], "out/paper/recipes/axolotl/qwen2-7b-cot-length.yml", "base_model"),
        (["--output", "new/my.yaml"], "new/my.yaml", "model_name_or_path"),
    ):
        make_recipes.main([*run, *extra])
        assert capsys.readouterr().out.strip() == path
        text = Path(path).read_text(encoding="utf-8")
        assert f" {path}\n" in text and yaml.safe_load(text)[key] == "Qwen/Qwen2-7B"
    for line in re.findall(r"make_recipes\.py (--model.*)$", README.read_text(encoding="utf-8"), re.MULTILINE):
        make_recipes.main(line.split())
    make_recipes.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*make_recipes.MODELS, *make_recipes.DATASETS, *make_recipes.METRICS))


# --- every recipe -------------------------------------------------------------------------------------------


def test_the_readme_explains_each_setting_of_ours():
    texts = [make_recipes.make_recipe(front_end, *run, PAPER) for front_end in make_recipes.FRONT_ENDS for run in RUNS]
    lines = {line for text in texts for line in text.splitlines() if line.endswith("  # ours")}
    marked = {line.split("#")[0].strip().removeprefix("- ").split(":")[0] for line in lines}
    section = README.read_text(encoding="utf-8").split("## Our choices")[1].split("\n## ")[0]
    explained = [name for line in section.splitlines() if line[:3] == "| `" for name in line.split("|")[1].split(",")]
    assert sorted(name.strip(" `") for name in explained) == sorted(marked)


def test_both_front_ends_have_the_same_settings():
    names = {"model_name_or_path": "base_model", "max_length": "sequence_len", "num_train_epochs": "num_epochs"}
    names |= {"per_device_train_batch_size": "micro_batch_size", "lr_scheduler_type": "lr_scheduler"}
    names |= {"warmup_steps": "warmup_ratio"}
    for run in RUNS:
        trl, axolotl = (yaml.safe_load(make_recipes.make_recipe(name, *run, PAPER)) for name in ("trl", "axolotl"))
        assert axolotl["datasets"][0]["path"] == trl.pop("dataset_name")
        assert trl.pop("output_dir").replace("/trl/", "/axolotl/") == axolotl["output_dir"]
        assert trl.pop("num_processes") == 4
        assert trl.items() <= {name: axolotl.get(names.get(name, name)) for name in trl}.items(), run


def test_commonit_sft_takes_every_recipe(tmp_path, monkeypatch):
    """The settings of the authors' scripts, which both front ends share, and CommonIT's."""
    monkeypatch.chdir(ROOT)  # the paths of the DeepSpeed configs are relative to it
    for model, data, metric in RUNS:
        path = write(tmp_path / "recipe.yaml", "trl", model, data, metric)
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        (script, training, model_arguments, _), launch_flags = parse(path, **WITHOUT_GPU)
        large = model == "llama-13b"
        batch, rate, stage = (4, 2.5e-6, 2) if large else (8, 5e-6, 3)
        assert (training.per_device_train_batch_size, training.learning_rate) == (batch, rate)
        assert (training.gradient_accumulation_steps, training.num_train_epochs, training.max_length) == (1, 3, 2048)
        assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("linear", 0.03, 0)
        sharding = json.loads(Path(written["deepspeed"]).read_text(encoding="utf-8"))
        assert sharding["zero_optimization"]["stage"] == stage and launch_flags == ["--num_processes", "4"]
        assert (training.commonit_metric, training.commonit_purity) == (metric, "step")
        assert training.commonit_min_group_size == (4 * batch if metric in ("task", "embedding") else 1)
        assert script.dataset_name == f"out/paper/data/{data}.jsonl"
        assert model_arguments.model_name_or_path == make_recipes.MODELS[model].hub


# --- the data -----------------------------------------------------------------------------------------------


def raw_rows(name):
    """Rows with the columns of the hub's datasets: 48 of each topic; the topics differ in response length too."""
    rows = []
    for topic, question in TOPICS.items():
        length = {"geography": 4, "arithmetic": 60}[topic]
        for number in range(ROWS_PER_TOPIC):
            prompt, answer = f"{question} {number}?", "a" * (length + number % 40)
            if name == "mmlu_dev":
                rows.append({"question": f"{question}?", "subject": topic, "choices": ["one", answer], "answer": 1})
            elif name == "alpaca":
                rows.append({"instruction": f"{topic}: {prompt}", "input": "", "output": answer, "text": ""})
            else:
                labels = {"task_source": "Flan2021", "task_name": topic, "template_type": "zs_opt"}
                rows.append({"inputs": prompt, "targets": answer, **labels})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the four files, converted by the script from rows like the hub's."""
    folder = tmp_path_factory.mktemp("data")
    for name, (_, convert) in make_data.SOURCES.items():
        make_data.make(raw_rows(name), convert).to_json(folder / f"{name}.jsonl")
    return folder


def test_the_data_have_the_columns_of_the_recipes(data):
    for name in make_data.SOURCES:
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {column for row in rows for column in row} == {"prompt", "completion", "task"}
        assert Counter(row["task"] for row in rows) == dict.fromkeys(TOPICS, ROWS_PER_TOPIC)
    alpaca = {"instruction": "Edit, please: ", "input": " x\n", "output": " y "}
    assert make_data.from_alpaca(alpaca) == {"prompt": "Edit, please:\nx\n", "completion": "y", "task": "edit"}
    question = {"question": "1 + 1?", "subject": "maths", "choices": ["1", "2"], "answer": 1}
    assert make_data.from_mmlu(question) == {"prompt": "1 + 1?\n1\n2", "completion": "2", "task": "maths"}


def test_rows_are_drawn_at_random_and_rows_without_a_response_are_dropped(monkeypatch):
    monkeypatch.setattr(make_data, "ROWS", 50)
    raw = Dataset.from_list([{"inputs": f"{n}", "targets": "a" if n % 2 else " ", "task_name": "t"} for n in range(99)])
    made = make_data.make(raw, make_data.from_flan)
    assert 10 < len(made) < 40
    assert all(int(prompt) % 2 for prompt in made["prompt"]) and made["prompt"][:] != sorted(made["prompt"], key=int)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_tmp_path")
def test_a_recipe_trains_steps_of_one_group(tmp_path, data, minilm):
    """I1, by embedding: each step holds rows of one reference task only."""
    tiny_model("qwen2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    recipe = write(tmp_path / "recipe.yaml", "trl", "qwen2-7b", "alpaca", "embedding")
    options, _ = parse(
        recipe,
        **WITHOUT_GPU,
        model_name_or_path="model",
        dataset_name=data / "alpaca.jsonl",
        commonit_embedding_model=minilm,
        commonit_reference_dataset=data / "mmlu_dev.jsonl",
        output_dir="out",
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = make_trainer(options.model, options.training, *load_splits(options))
    seen = Seen(trainer)
    trainer.train()

    steps = groups_of_steps(seen, lambda row: next(topic for topic, text in TOPICS.items() if text in row.text))
    assert len(steps) == 2 and all(0 < len(rows) <= 8 for rows in seen.steps)
    saved = json.loads(Path("out/commonit/groups.json").read_text(encoding="utf-8"))
    assert saved["metric"] == "embedding" and sorted(saved["names"]) == sorted(TOPICS)
