"""`commonit compare` trains paired runs, measures every held-out row, resumes, and names failed runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.toys import QUIET, row_losses
from helpers.trainers import Seen, as_argv, make_trainer, rows_of_task, write_jsonl
from safetensors.numpy import load_file

from commonit_trl.cli import main as cli
from commonit_trl.compare import one_run
from commonit_trl.compare.one_run import measure_rows, padded_collator
from commonit_trl.compare.runs import claimed
from commonit_trl.compare.tasks import check_tasks, evaluate_tasks

EXAMPLES = Path(__file__).parents[2] / "example_configs"
STRATEGIES = ("none", "task", "length:num_groups=2")
SEEDS = (7, 8)
RUNS = [f"{strategy}@{seed}" for seed in SEEDS for strategy in STRATEGIES]

pytestmark = [pytest.mark.usefixtures("in_tmp_path"), pytest.mark.slow]


@pytest.fixture
def recipe(model, tmp_path):
    """24 training and 9 held-out rows of three tasks, in steps of one task without repeats."""
    (tmp_path / "data").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = [row for task in ("add", "sort", "spell") for row in rows_of_task(f"{task} {split}", count)]
        for row in rows:
            row["task"] = row["task"].split()[0]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    given = {
        **{name: value for name, value in QUIET.items() if name not in ("report_to", "save_strategy", "max_length")},
        "model_name_or_path": model,
        "dataset_name": "data",
        "output_dir": "out",
        "dtype": "float32",
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "seed": SEEDS[0],
        "metrics": ",".join(STRATEGIES),
        "seeds": len(SEEDS),
        "jobs": 2,
    }
    return given


def compare(recipe, *more):
    return cli.main(["compare", *as_argv(recipe), *more])


def written(run):
    directory = Path("out/compare/runs") / run.replace(":", ",")
    return json.loads((directory / "result.json").read_text(encoding="utf-8")), load_file(
        directory / "rows.safetensors"
    )


@pytest.fixture
def seen(recipe, monkeypatch):
    """Does all runs in this process; records for each the model's initial weights, training steps and held-out rows."""
    records = {}

    def recorded(model_args, training_args, train, held_out):
        trainer = make(model_args, training_args, train, held_out)
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        record = {"weights": weights, "trained": Seen(trainer), "held_out": Counter()}

        def count(model, args, inputs):
            if not model.training:
                mask = inputs["attention_mask"].bool()
                record["held_out"].update(tuple(ids[kept].tolist()) for ids, kept in zip(inputs["input_ids"], mask))

        trainer.model.register_forward_pre_hook(count, with_kwargs=True)
        records[run] = record
        return trainer

    make = one_run.make_trainer
    monkeypatch.setattr(one_run, "make_trainer", recorded)
    for run in RUNS:
        assert compare(recipe, "--only", run) == 0
    return records


def test_the_runs_are_paired(seen, recipe, capfd):
    baseline = seen["none@7"]
    rows = baseline["trained"].rows
    assert len(rows) == 24 and set(rows.values()) == {2}  # epochs
    for run, record in seen.items():
        for name, weight in record["weights"].items():
            assert torch.equal(weight, baseline["weights"][name])
        assert record["trained"].rows == rows
        assert record["held_out"] == baseline["held_out"]
        assert len(record["held_out"]) == 9 and set(record["held_out"].values()) == {1}
        result, arrays = written(run)
        assert result["steps"] == len(record["trained"].steps)
        assert result["tokens"] == sum(len(row.tokens) * times for row, times in rows.items())
        assert len(arrays["loss"]) == 9 and np.all(arrays["tokens"] > 0)
        assert " CPU" in result["processor"]
    orders = {run: [step for step in record["trained"].steps] for run, record in seen.items()}
    assert all(orders[one] != orders[other] for one in RUNS for other in RUNS if one < other)

    # All runs have finished, so none starts.
    assert compare(recipe, "--json") == 0
    numbers = json.loads(capfd.readouterr().out)
    assert [result["name"] for result in numbers["strategies"]] == list(STRATEGIES)
    losses = {run: written(run)[1]["loss"].sum() / written(run)[1]["tokens"].sum() for run in RUNS}
    for result in numbers["strategies"]:
        ours = [losses[f"{result['name']}@{seed}"] for seed in SEEDS]
        assert result["loss"]["value"] == pytest.approx(np.mean(ours))
        assert len(result["curves"]["loss"]) == result["steps"]
        if result["name"] != "none":
            theirs = [losses[f"none@{seed}"] for seed in SEEDS]
            assert result["loss"]["difference"]["value"] == pytest.approx(np.mean(ours) - np.mean(theirs))
            assert sum(group["rows"] for group in result["groups"]) == 9
    assert {group["name"]: group["rows"] for group in numbers["strategies"][1]["groups"]} == dict(
        add=3, sort=3, spell=3
    )
    page = Path("out/compare/compare.html").read_text(encoding="utf-8")
    assert "length:num_groups=2" in page and "http-equiv" in page


def test_new_adapters_start_with_the_same_weights(recipe):
    for run in ("none@7", "task@7", "none@8"):
        assert compare(recipe | {"use_peft": True}, "--only", run) == 0
    baseline, task, other_seed = (written(run)[0]["weights"] for run in ("none@7", "task@7", "none@8"))
    assert baseline == task != other_seed


def test_settings_that_changed_between_runs_are_named(recipe, capfd):
    assert compare(recipe, "--only", "none@7") == 0
    (directory,) = Path("out/compare/runs").iterdir()
    assert compare(recipe | {"learning_rate": 0.02}) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "learning_rate (0.01 before, 0.02 now)" in error and str(directory) in error
    assert compare(recipe, "--num_processes", "2") == 2
    assert "options of the launcher ([] before, ['--num_processes', '2'] now)" in capfd.readouterr().err
    test = Path("data/test.jsonl")
    test.write_text(test.read_text().replace("sort", "mend", 1))
    assert compare(recipe) == 2
    assert "content of the rows" in capfd.readouterr().err.strip().splitlines()[-1]
    (directory / "result.json").write_text("{", encoding="utf-8")
    assert compare(recipe) == 2
    assert "damaged" in capfd.readouterr().err.strip().splitlines()[-1]


def test_an_interrupted_comparison_resumes_and_names_a_failed_run(recipe, tmp_path):
    """In real processes: one run has finished, one was interrupted, one fails."""
    recipe = recipe | {"metrics": "none,length,embedding:embedding_model=nowhere", "seeds": 1}
    assert compare(recipe, "--only", "none@7") == 0
    before = os.stat("out/compare/runs/none@7/result.json").st_mtime_ns
    (tmp_path / "out/compare/runs/length@7").mkdir()  # of an interrupted run
    (tmp_path / "out/compare/runs/length@7/rows.safetensors").write_bytes(b"half")
    command = [sys.executable, "-m", "commonit_trl", "compare", *as_argv(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert os.stat("out/compare/runs/none@7/result.json").st_mtime_ns == before
    assert "length@7: done" in done.stderr
    assert (
        "Failed: embedding:embedding_model=nowhere@7: commonit: error: commonit_embedding_model='nowhere'"
        in done.stdout
    )
    assert "length: too few seeds" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

    # A run gives the same results in its own process and in this one.
    alone = written("length@7")[1]
    (tmp_path / "out/compare/runs/length@7/result.json").unlink()
    assert compare(recipe, "--only", "length@7") == 0
    for name, values in written("length@7")[1].items():
        assert np.array_equal(values, alone[name])


def test_a_run_is_done_by_one_process_at_a_time(recipe, capfd):
    """As when a comparison was killed and its run continues."""
    with claimed(Path("out/compare/runs/none@7")):
        assert compare(recipe, "--only", "none@7") == 2
    assert "another process" in capfd.readouterr().err.strip().splitlines()[-1]
    assert compare(recipe, "--only", "none@7") == 0


def test_runs_end_with_the_comparison(recipe):
    command = [sys.executable, "-m", "commonit_trl", "compare", *as_argv(recipe | {"num_train_epochs": 10_000})]
    comparison = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    locks = [Path("out/compare/runs") / run / "lock" for run in RUNS[:2]]
    deadline = time.monotonic() + 120
    while not all(lock.exists() for lock in locks):
        assert comparison.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    comparison.terminate()
    assert comparison.wait(timeout=60) == 128 + signal.SIGTERM
    for lock in locks:  # released by the stopped runs
        with claimed(lock.parent):
            pass


def test_two_ranks_measure_every_row_in_order(recipe, tmp_path):
    """With weights that do not change, two ranks measure what one measures, also on tasks of the harness."""
    write_tasks(QUESTIONS, [number % 3 for number in range(len(QUESTIONS))])
    recipe |= {"learning_rate": 0, "lm_eval_tasks": "answers,choices", "lm_eval_include_path": "tasks"}
    assert compare(recipe, "--only", "task@7") == 0
    alone = written("task@7")
    ranks = {"accelerate_config": EXAMPLES / "accelerate" / "ddp.yaml", "num_processes": 2, "main_process_port": 0}
    command = [sys.executable, "-m", "commonit_trl", "compare", *as_argv(recipe | ranks | {"output_dir": "two"})]
    command += ["--only", "task@7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    directory = tmp_path / "two/compare/runs/task@7"
    result, arrays = json.loads((directory / "result.json").read_text()), load_file(directory / "rows.safetensors")
    assert arrays.keys() == alone[1].keys() and sum(name.startswith("score ") for name in arrays) == 2
    for name, values in arrays.items():
        assert np.allclose(values, alone[1][name], rtol=1e-5), name
    assert result["weights"] == alone[0]["weights"]
    assert result["tokens"] == alone[0]["tokens"] and result["steps"] == alone[0]["steps"] / 2


# --- one row at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32, "eval_packing": False}])
def test_rows_are_measured_as_in_batches_of_one(options, tmp_path):
    held_out = [row for task in ("add", "sort") for row in rows_of_task(task, 6)]
    rows = Dataset.from_list(held_out)
    trainer = make_trainer(tmp_path, rows, commonit_metric="length", extra={"eval_dataset": rows}, **options)
    measured = measure_rows(trainer, trainer.eval_dataset)
    collate = padded_collator(trainer)
    model = trainer.model.eval()
    for number, row in enumerate(trainer.eval_dataset):
        inputs = collate([row])
        (loss,), (tokens,) = row_losses(model, inputs)
        assert measured["tokens"][number] == tokens > 0
        assert measured["loss"][number] == pytest.approx(loss, rel=1e-4)
        top = model(input_ids=inputs["input_ids"]).logits[0, :-1].argmax(-1)
        assert measured["correct"][number] == (top == inputs["labels"][0, 1:]).sum()


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------

QUESTIONS = [f"Is {number} a large number?" for number in range(7)]
CHOICES = ["yes", "no", "perhaps"]
TASKS = {
    "answers": """
task: answers
output_type: generate_until
generation_kwargs: {until: ["#"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "choices": """
task: choices
output_type: multiple_choice
doc_to_choice: ["yes", "no", perhaps]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
SHARED = """
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/%s.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
"""


def write_tasks(answers, choices):
    """Write two tasks for the harness: greedy decoding should give `answers`, the likeliest choices be `choices`."""
    Path("tasks").mkdir()
    for name, expected in (("answers", answers), ("choices", choices)):
        Path(f"tasks/{name}.yaml").write_text(TASKS[name] + SHARED % name, encoding="utf-8")
        rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, expected, strict=True)]
        write_jsonl(Path(f"tasks/{name}.jsonl"), rows)


def greedy(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).split("#")[0]


def favourite(model, tokenizer, prompt):
    """Return the index of the likeliest choice after the prompt."""
    start = tokenizer(prompt)["input_ids"]

    def log_likelihood(choice):
        ids = torch.tensor([[*start, *tokenizer(choice)["input_ids"]]])
        predicted = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return predicted.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum().item()

    return max(range(len(CHOICES)), key=lambda number: log_likelihood(CHOICES[number]))


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_the_trained_model(chat, tmp_path):
    """Greedy decoding and likelihoods, example by example, with the chat template for conversations."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = Dataset.from_list([row for task in ("add", "sort") for row in rows_of_task(task, 5)])
    trainer = make_trainer(tmp_path, rows, commonit_metric="length", learning_rate=3e-2)
    trainer.train()
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}="
    prompts = [f"<{question}>=" if chat else question for question in QUESTIONS]
    with torch.no_grad():
        answers = [greedy(model, tokenizer, prompt) for prompt in prompts]
        likeliest = [favourite(model, tokenizer, prompt) for prompt in prompts]
    # Every other example expects something else.
    expected = [answer if number % 2 else f"not {answer}" for number, answer in enumerate(answers)]
    write_tasks(expected, [(choice + number % 2) % 3 for number, choice in enumerate(likeliest)])
    check_tasks(["answers", "choices"], "tasks")
    scores = evaluate_tasks(trainer, ["answers", "choices"], "tasks", chat=chat)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "answers exact_match": [0, 1, 0, 1, 0, 1, 0],
        "choices acc": [1, 0, 1, 0, 1, 0, 1],
    }


# --- user errors --------------------------------------------------------------------------------------------------

WRONG = {
    "unknown metric": ({"metrics": "none,lenght"}, "--metrics='lenght' is not one of"),
    "no baseline": ({"metrics": "task,length"}, "'none' is missing. Add it"),
    "twice": ({"metrics": "none,task,task"}, "'task' appears twice. Remove one"),
    "unknown option": ({"metrics": "none,length:num_group=4"}, "did you mean commonit_num_groups?"),
    "no value": ({"metrics": "none,length:num_groups"}, "not an option. Write"),
    "seeds": ({"seeds": 0}, "--seeds=0 must be at least 1"),
    "jobs": ({"jobs": 0}, "--jobs=0 must be at least 1"),
    "steps": ({"max_steps": 10}, "max_steps=10"),
    "stream": ({"dataset_streaming": True}, "dataset_streaming=True"),
    "no such run": ({"only": "task@99"}, "--only task@99: no such run"),
    "harness": ({"lm_eval_tasks": "gsm9k"}, "--lm_eval_tasks gsm9k: "),
    "no tasks": ({"lm_eval_include_path": "data"}, "--lm_eval_include_path data: no task"),
    "no folder": ({"lm_eval_tasks": "gsm8k", "lm_eval_include_path": "nowhere"}, "nowhere: no such folder"),
    "all held out": ({"dataset_name": "data/train.jsonl", "held_out_rows": 24}, "--held_out_rows 24: "),
    "misspelt": ({"metric": "none"}, "Unknown option metric: did you mean"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_prints_one_line(case, recipe, capfd):
    options, fragment = WRONG[case]
    assert compare(recipe | options) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("commonit: error")]
    assert len(lines) == 1 and fragment in lines[0] and "Traceback" not in out + err
    assert not Path("out").exists()


def test_rows_are_held_out_of_a_file_without_a_test_split(recipe, capfd):
    recipe = recipe | {"dataset_name": "data/train.jsonl", "held_out_rows": 6, "train_rows": 10}
    assert compare(recipe, "--only", "none@7") == 0
    result, arrays = written("none@7")
    assert len(arrays["loss"]) == 6
    assert result["steps"] == 10  # two epochs of ten rows, two at a time
