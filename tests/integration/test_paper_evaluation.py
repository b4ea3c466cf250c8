"""`evaluate_model.py` on local tasks and a tiny model: known scores, consent to generated code, wrong arguments."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.toys import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "example_configs" / "paper" / "evaluate_model.py"
sys.path.append(str(SCRIPT.parent))

import evaluate_model  # noqa: E402

CHOICES = ["yes", "no", "perhaps"]
QUESTIONS = [f"Is {number} a large number?" for number in range(12)]
CHOICE_TASK = """
task: {name}
tag: {tag}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
unsafe_code: {unsafe}
"""


def favourite(model, tokenizer, question):
    """Return the index of the choice with the highest likelihood after the question."""
    start = tokenizer(question)["input_ids"]

    def log_likelihood(choice):
        tokens = torch.tensor([[*start, *tokenizer(f" {choice}")["input_ids"]]])
        predicted = model(tokens).logits[0, :-1].log_softmax(-1)
        return predicted.gather(1, tokens[0, 1:, None])[len(start) - 1 :].sum().item()

    return max(range(len(CHOICES)), key=lambda number: log_likelihood(CHOICES[number]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and tasks of which it answers 9 of 12 and 3 of 12 questions correctly."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    with torch.no_grad():
        favourites = [favourite(model, tokenizer, question) for question in QUESTIONS]
    for name, tag, correct, unsafe in (
        ("toy_easy", "toy_pair", 9, "false"),
        ("toy_hard", "toy_pair", 3, "false"),
        ("toy_unsafe", "toy_alone", 9, "true"),
    ):
        file = folder / f"{name}.jsonl"
        rows = [
            {"question": question, "choices": CHOICES, "answer": (best + (number >= correct)) % len(CHOICES)}
            for number, (question, best) in enumerate(zip(QUESTIONS, favourites))
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = CHOICE_TASK.format(name=name, tag=tag, file=file, unsafe=unsafe)
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def parsed(folder):
    """Options for the task that is marked as unsafe, the task, and the harness's `TaskManager`."""
    arguments = "--areas toy_unsafe --limit 10 --run_generated_code --include_path"
    return evaluate_model.parse([str(folder / "model"), *arguments.split(), str(folder / "tasks")])


def test_the_script_reports_the_known_scores(folder):
    """An area without a score of its own, such as tydiqa, shows those of its sub-tasks."""
    arguments = ["--areas", "toy_easy", "toy_pair", "--include_path", "tasks", "--output", "scores.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = forked.run([str(SCRIPT), "model", *arguments], env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    areas = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["areas"]
    assert areas["toy_easy"]["scores"]["toy_easy"]["acc,none"] == 9 / 12
    assert areas["toy_pair"]["scores"]["toy_hard"]["acc,none"] == 3 / 12
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[:5] for row in table] == [
        ["toy_easy", "toy_easy", "acc", "none", "0.7500"],
        ["toy_pair", "toy_easy", "acc", "none", "0.7500"],
        ["toy_pair", "toy_hard", "acc", "none", "0.2500"],
    ]


def test_generated_code_runs_only_with_the_flag(parsed, monkeypatch):
    options, *rest = parsed
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(ValueError, match="marked as unsafe"):
        evaluate_model.evaluate(argparse.Namespace(**{**vars(options), "run_generated_code": False}), *rest)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    areas = evaluate_model.evaluate(options, *rest)
    assert areas["toy_unsafe"]["scores"]["toy_unsafe"]["acc,none"] == 9 / 10
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
