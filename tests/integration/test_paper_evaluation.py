"""The script that evaluates the paper's runs: on local tasks and a tiny model it gives the scores that are known
beforehand, runs no generated code unasked, and ends a mistake as one line."""

import json
import os
import sys
from pathlib import Path

import forked
import pytest
import torch
from toys import tiny_model, tiny_tokenizer

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
WRITING_TASK = """
task: toy_writing
tag: toy_pair
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_gen_toks: 3, until: ["<never>"], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def favourite(model, tokenizer, question):
    """The choice of the highest likelihood after the question."""
    start = tokenizer(question)["input_ids"]

    def log_likelihood(choice):
        tokens = torch.tensor([[*start, *tokenizer(f" {choice}")["input_ids"]]])
        predicted = model(tokens).logits[0, :-1].log_softmax(-1)
        return predicted.gather(1, tokens[0, 1:, None])[len(start) - 1 :].sum().item()

    return max(range(len(CHOICES)), key=lambda number: log_likelihood(CHOICES[number]))


def written(model, tokenizer, question):
    tokens = torch.tensor([tokenizer(question)["input_ids"]])
    made = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, tokens.shape[1] :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and tasks of which it answers 9 of 12 and 3 of 12 questions as the data say."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    with torch.no_grad():
        favourites = [favourite(model, tokenizer, question) for question in QUESTIONS]
        texts = [written(model, tokenizer, question) for question in QUESTIONS]
    rows = {
        "choice": [
            {"question": question, "choices": CHOICES, "answer": best if number < 9 else (best + 1) % len(CHOICES)}
            for number, (question, best) in enumerate(zip(QUESTIONS, favourites))
        ],
        "writing": [
            {"question": question, "answer": text if number < 3 else "never that"}
            for number, (question, text) in enumerate(zip(QUESTIONS, texts))
        ],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task), encoding="utf-8")
    choices = folder / "choice.jsonl"
    for name, text in {
        "toy_choice": CHOICE_TASK.format(name="toy_choice", tag="toy_pair", file=choices, unsafe="false"),
        "toy_unsafe": CHOICE_TASK.format(name="toy_unsafe", tag="toy_alone", file=choices, unsafe="true"),
        "toy_writing": WRITING_TASK.format(file=folder / "writing.jsonl"),
    }.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return evaluate_model.find_tasks(["toy_choice"], folder / "tasks")[1]


def test_it_gives_the_known_scores(folder):
    """An area that has no score of its own, as tydiqa, shows those of its tasks."""
    arguments = ["--areas", "toy_choice", "toy_pair", "--include_path", "tasks", "--output", "scores.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = forked.run([str(SCRIPT), "model", *arguments], env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    areas = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["areas"]
    assert areas["toy_choice"]["scores"]["toy_choice"]["acc,none"] == 9 / 12
    assert areas["toy_pair"]["scores"]["toy_writing"]["exact_match,none"] == 3 / 12
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[:5] for row in table] == [
        ["toy_choice", "toy_choice", "acc", "none", "0.7500"],
        ["toy_pair", "toy_choice", "acc", "none", "0.7500"],
        ["toy_pair", "toy_writing", "exact_match", "none", "0.2500"],
    ]


def scores(folder, manager, *arguments):
    asked = evaluate_model.parse([str(folder / "model"), "--areas", "toy_unsafe", *arguments])
    return evaluate_model.evaluate(asked, {"toy_unsafe": ("toy_unsafe", None)}, manager)["toy_unsafe"]["scores"]


def test_generated_code_runs_only_where_it_is_asked_for(folder, manager, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(ValueError, match="marked as unsafe"):
        scores(folder, manager)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    found = scores(folder, manager, "--run_generated_code", "--limit", "10")
    assert found["toy_unsafe"]["acc,none"] == 9 / 10
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_the_harness_has_what_the_readme_says(manager):
    missing = {area for area, (task, _) in evaluate_model.AREAS.items() if task not in manager.all_tasks}
    assert missing <= {"tydiqa"}  # the lowest supported version has none
    names = " ".join(manager.all_tasks).lower()
    assert not any(word in names for word in ("openfunction", "function_call", "apibench", "gorilla", "bfcl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "--areas", "toy_chioce", "--include_path", "tasks"], ["toy_chioce", "'toy_choice'"]),
        (["model", "--areas", "humaneval"], ["--run_generated_code"]),
        (["gone", "--areas", "mmlu"], ["gone", "output_dir"]),
        (["model", "--areas", "mmlu", "--include_path", "gone"], ["--include_path gone"]),
        (["model", "--areas", "mmlu", "--limit", "0"], ["--limit 0"]),
        (["model", "--areas", "mmlu", "--output", "gone/scores.json"], ["gone/scores.json"]),
        (["model"], ["--areas"]),
    ],
)
def test_a_mistake_ends_as_one_line(arguments, said, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert evaluate_model.main(arguments) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("evaluate_model.py: error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in said)
