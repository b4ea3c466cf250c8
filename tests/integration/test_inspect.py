"""`commonit inspect` shows the rows, groups and plan of a training run, and ends with one line on an error."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from helpers.bad_input import error_of
from helpers.toys import tiny_tokenizer
from helpers.trainers import SFT_FLAGS, rows_of_task, write_jsonl

from commonit_trl import CommonITSFTTrainer
from commonit_trl.cli import main as cli

TASKS = ("add", "sort", "spell")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def wide_terminal(in_tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture
def data(tmp_path):
    """Write 60 rows of three tasks."""
    rows = [row for n, task in enumerate(TASKS) for row in rows_of_task(task, 10 + 10 * n)]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def inspect(*argv):
    return cli.main(["inspect", *map(str, argv)])


def numbers(capsys, *argv):
    """Return the inspections that `--json` prints."""
    assert inspect(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)["inspections"]


# --- it shows the run --------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "packing"), [("task", None), ("task", "bfd"), ("length", "wrapped")])
def test_a_recipe_is_inspected_as_it_is_trained(metric, packing, model, data, tmp_path, capsys, monkeypatch):
    options = {
        "commonit_metric": metric,
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": "out",
        **SFT_FLAGS,
        "gradient_accumulation_steps": 2,
        "max_length": 48,
        "packing": packing is not None,
        "packing_strategy": packing or "bfd",
        "seed": 3,
        "eval_strategy": "no",
        "max_steps": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    trained = []
    monkeypatch.setattr(CommonITSFTTrainer, "train", lambda self, **kwargs: trained.append(self))
    monkeypatch.setattr(CommonITSFTTrainer, "save_model", lambda *args: None)
    (shown,) = numbers(capsys, "--config", "run.yaml")
    assert not (tmp_path / "out").exists()

    assert cli.main(["sft", "--config", "run.yaml"]) == 0
    assert "Loaded groups from" in capsys.readouterr().err
    (trainer,) = trained
    plan, summary = trainer.commonit_plan(), trainer.commonit_plan().summary()
    groups = [group for group, samples in enumerate(summary.group_samples) if samples]
    assert [group["name"] for group in shown["groups"]] == [trainer.commonit_grouper.names[group] for group in groups]
    assert [group["repeated"] for group in shown["groups"]] == summary.group_repeated[groups].tolist()
    assert (shown["planned"]["steps"], shown["samples"]) == (plan.num_steps, len(trainer.train_dataset))
    assert shown["rows"] == 60
    counts = trainer.commonit.spec.lengths
    padded = sum(counts[batch].max() * len(batch) for batch in plan.batches(0))
    real = counts[plan.indices].sum()
    assert shown["planned"]["padding_ratio"] == pytest.approx(1.0 if packing == "bfd" else padded / real)


def test_flags_override_the_geometry_of_the_recipe(model, data, tmp_path, capsys):
    recipe = {"model_name_or_path": model, "commonit_metric": "task", "num_processes": 3, "dataset_name": data}
    recipe |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True, "fsdp": "full_shard"}
    recipe |= {"eval_strategy": "steps", "load_best_model_at_end": True, "report_to": "wandb"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = ["--world_size", 1, "--per_device_train_batch_size", 5]
    for more, geometry in (([], [2, 3, 2]), (flags, [5, 1, 2])):
        (shown,) = numbers(capsys, "--config", "run.yaml", *more)
        assert [shown[name] for name in ("micro_batch_size", "world_size", "accumulation_steps")] == geometry


@pytest.mark.parametrize(
    "row",
    [
        lambda n: {"instruction": f"Add {n}", "input": "" if n % 2 else "now", "output": "a" * (n + 1)},
        lambda n: {"text": f"Add {'a' * n}"},
        lambda n: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a" * (n + 1)}]},
        lambda n: {"input_ids": [1] * (n + 3), "labels": [-100, *[1] * (n + 2)]},
    ],
    ids=["alpaca", "text", "messages", "tokens"],
)
def test_columns_are_read(row, tokenizer, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", map(row, range(20)))
    options = ["--commonit_metric", "length", "--commonit_num_groups", 2, "--tokenizer", tokenizer]
    (shown,) = numbers(capsys, data, *options)
    short, long = shown["groups"]
    assert short["rows"] + long["rows"] == 20 and short["examples"]
    assert short["response_tokens"]["median"] < long["response_tokens"]["median"]


@pytest.mark.parametrize("packing", [False, True])
def test_dropped_rows_are_counted_by_group(packing, model, tmp_path, capsys):
    rows = [row for task in TASKS for row in rows_of_task(task, 20)]
    long = "x" * 60
    rows = [row | {"prompt": long} if n >= 40 or n % 5 == 0 else row for n, row in enumerate(rows)]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    options = ["--tokenizer", model, "--max_length", 40, "--packing", packing, "--html", "report.html"]
    options += ["--commonit_length_edges", 12, "--per_device_train_batch_size", 2]
    task, length = numbers(capsys, data, "--compare", "task,length", *options)
    lengths = [len(row["completion"]) + 1 for row in rows]  # and the end of the text
    short = sum(tokens < 12 for tokens, row in zip(lengths, rows, strict=True) if row["prompt"] == long)
    assert task["dropped"]["rows"] == length["dropped"]["rows"] == 28 and task["rows"] == length["rows"] == 32
    assert task["dropped"]["by_group"] == {"add": 4, "sort": 4, "spell": 20}
    assert length["dropped"]["by_group"] == {"response 12 and more": 28 - short, "response under 12": short}
    (reason,) = task["dropped"]["by_reason"]
    assert "no token to train on" in reason
    shown = [(group["name"], group["rows"], group["dropped"]) for group in task["groups"]]
    assert shown == [("add", 16, 4), ("sort", 16, 4)]
    assert any("28 of 60 rows" in warning and "'spell' (20)" in warning for warning in task["warnings"])
    assert "spell" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert inspect(data, "--commonit_metric", "task", *options[:6]) == 0
    assert re.search(r"spell +0 +0.0% +- +- +0 +20 +0 +0 *\n", capsys.readouterr().out)


def test_rows_without_a_trained_token_are_dropped(tokenizer, tmp_path, capsys):
    """Also rows that the preparation keeps: the first token of a row is never predicted."""
    masked = {"input_ids": [1, 2, 3], "labels": [1, -100, -100], "task": "masked"}
    rows = [{"input_ids": [1] * 4, "labels": [-100, *[1] * 3], "task": "seen"}] * 8
    data = write_jsonl(tmp_path / "tokens.jsonl", [masked, *rows, masked])
    (shown,) = numbers(capsys, data, "--commonit_metric", "task", "--tokenizer", tokenizer)
    assert [(group["name"], group["rows"]) for group in shown["groups"]] == [("seen", 8)]
    assert shown["dropped"]["by_group"] == {"masked": 2}


def test_data_without_a_trained_token_are_an_error(tokenizer, tmp_path, capfd):
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x" * 60, "completion": "y"}] * 4)
    line = error_of(
        capfd, ["inspect", data, "--commonit_metric", "length", "--tokenizer", tokenizer, "--max_length", 40]
    )
    assert "max_length=40" in line and "4 rows" in line


# --- output -----------------------------------------------------------------------------------------------


def test_without_a_tokenizer_task_works_and_tokens_are_a_dash(data, capsys):
    assert inspect(data, "--commonit_metric", "task", "--per_device_train_batch_size", 4) == 0
    out = capsys.readouterr().out
    for n, task in enumerate(TASKS):
        rows = 10 + 10 * n
        assert re.search(rf"{task} +{rows} +{rows / 60:.1%} +- +- +{-(-rows // 4)} +0 +0", out), out
    assert re.search(r"Padding ratio .* -", out)
    assert re.search("Do spell [0-9]+: → spell", out)


def test_several_files_are_a_mixture(data, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", rows_of_task("add", 12))
    (shown,) = numbers(capsys, data, other, "--commonit_metric", "task")
    assert [(group["name"], group["rows"]) for group in shown["groups"]] == [("data", 60), ("other", 12)]


def test_compare_gives_each_metric_its_options(data, tokenizer, minilm, capsys, tmp_path):
    options = ["--commonit_num_groups", 4, "--commonit_embedding_model", minilm, "--commonit_length_of", "total"]
    options += ["--tokenizer", tokenizer, "--per_device_train_batch_size", 4]
    html = tmp_path / "new" / "report.html"
    shown = numbers(capsys, data, "--compare", "task,length,embedding", *options, "--html", html)
    assert [one["metric"] for one in shown] == ["task", "length", "embedding"]
    assert [one["possible_groups"] for one in shown] == [3, 4, 4]
    assert shown[1]["groups"][0]["name"].startswith("total under")
    text = html.read_text(encoding="utf-8")
    assert text.count("Map of the embeddings, 60 of 60 rows</h3>") == 1
    assert inspect(data, "--compare", "task,length", *options) == 0
    assert re.search(r"task +length\s", capsys.readouterr().out)


def test_nothing_but_json_is_on_stdout(data, tokenizer):
    """Also while libraries are imported, which needs a new process."""
    command = [sys.executable, "-m", "commonit_trl", "inspect", data, "--commonit_metric", "length", "--json"]
    done = subprocess.run([*command, "--tokenizer", tokenizer], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["inspections"][0]["rows"] == 60


def test_saved_groups_are_loaded(data, tokenizer, tmp_path, capsys):
    assert cli.main(["group", data, "--commonit_metric", "task", "--output", "saved"]) == 0
    capsys.readouterr()
    new = write_jsonl(tmp_path / "new.jsonl", [*rows_of_task("add", 20), *rows_of_task("walk", 5)])
    (shown,) = numbers(capsys, new, "--load", "saved", "--tokenizer", tokenizer)
    assert [(group["name"], group["rows"]) for group in shown["groups"]] == [("add", 20)]
    assert shown["warnings"][0].startswith("5 of 25 rows are unassigned")


# --- other front ends ------------------------------------------------------------------------------------------------


def test_other_front_ends_come_from_installed_packages(tmp_path, monkeypatch, capfd):
    """An entry point names the reader of their recipes; tests/axolotl/test_axolotl_inspect.py reads real ones."""
    monkeypatch.setattr("commonit_trl.cli.recipes.ENTRY_POINTS", "commonit.test_recipes")
    line = error_of(capfd, ["inspect", "--axolotl", "recipe.yml"])
    assert "--axolotl recipe.yml: " in line and "pip install 'commonit-trl[axolotl]'" in line

    info = tmp_path / "site" / "other-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[commonit.test_recipes]\naxolotl = other_reader:read\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "No module named 'other_reader'" in error_of(capfd, ["inspect", "--axolotl", "recipe.yml"])


def test_rows_are_not_changed(data, tmp_path):
    before = (tmp_path / data).read_bytes()
    assert inspect(data, "--commonit_metric", "task") == 0
    assert (tmp_path / data).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl"]
