"""`commonit demo` as a user runs it, in its own process, with few steps; and the data that it generates.

Invariants: (1) generated answers are correct, by rules written anew here; (2) the data depend on the seed only, and no
held-out question is trained on; (3) the run prints one table of all three metrics, in which every step holds one group;
(4) its models load; (5) the command that it recommends runs. Wrong options are in test_bad_input.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from commonit_trl.cli.demo import FAMILIES, METRICS, generate_rows

ROOT = Path(__file__).resolve().parents[2]
SEED = 3

SOLUTIONS = {
    r"Which is larger, (\d+) or (\d+)\?": lambda a, b: a if int(a) > int(b) else b,
    r"Rocket \w+ starts in (\d+) seconds\. Count down\.": lambda n: " ".join(
        str(int(n) - passed) for passed in range(int(n))
    ),
    r"How many letters are in (\w+)\?": lambda word: str(sum(1 for _ in word)),
    r"Is (\d+) even or odd\?": lambda n: "even" if n[-1] in "02468" else "odd",
    r"Reverse the word (\w+)\.": lambda word: "".join(reversed(word)),
    r"Sort the digits ([\d ]+)\.": lambda digits: " ".join(d for d in "0123456789" if d in digits),
}


def solve(question):
    """Return the answer by the only pattern that matches the question."""
    found = [(re.fullmatch(pattern, question), rule) for pattern, rule in SOLUTIONS.items()]
    [(match, rule)] = [(match, rule) for match, rule in found if match]
    return rule(*match.groups())


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_generated_answers_are_correct(seed):
    train, held_out = generate_rows(seed)
    assert {row["task"] for row in train} == {row["task"] for row in held_out} == set(FAMILIES)
    assert len(FAMILIES) >= 5
    for row in train + held_out:
        assert row["completion"] == f" {solve(row['prompt'])}", row


def test_the_seed_determines_the_data_and_held_out_questions_are_new():
    train, held_out = generate_rows(SEED)
    assert generate_rows(SEED) == (train, held_out)
    assert generate_rows(SEED + 1)[0] != train
    questions = [row["prompt"] for row in train + held_out]
    assert len(set(questions)) == len(questions)
    assert 2_000 <= len(train) <= 4_000
    assert len({len(row["completion"].split()) for row in train}) >= 10


def commonit(*arguments, home):
    """Run a command in its own process, from the repository's root."""
    variables = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")  # a new user has none of them
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    return subprocess.run(
        [sys.executable, "-m", "commonit_trl", *arguments],
        cwd=ROOT,
        env=environment | {"HF_HOME": str(home), "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output directory and the finished process of a short run."""
    directory = tmp_path_factory.mktemp("demo")
    output = directory / "out"
    result = commonit(
        "demo", "--max_steps", "5", "--seed", str(SEED), "--output_dir", str(output), home=directory / "home"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


def test_report_shows_pure_steps_of_every_metric(demo):
    output, result = demo
    assert result.stderr in ("", f"Library messages: {output / 'libraries.log'}\n")
    assert not re.search("warning|traceback", result.stdout, re.IGNORECASE)
    ratio = r"(\d+\.\d+)"
    for metric in METRICS:
        assert len(re.search(rf"^{metric}: (.+)$", result.stdout, re.MULTILINE)[1].split(", ")) >= 5
        line = rf"^\s+{metric}\s+(\d) +(\d+) \(105\) +100% \(0%\) +{ratio} \({ratio}\) +{ratio} → {ratio} *$"
        found = re.search(line, result.stdout, re.MULTILINE)
        assert found, result.stdout
        groups, steps, padding, baseline_padding, before, after = map(float, found.groups())
        assert groups >= 5
        assert 105 <= steps <= 105 + groups
        assert padding - 1 < (baseline_padding - 1) / 2
        assert after < before


def test_files_hold_the_data_models_and_reports(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = demo
    train, held_out = generate_rows(SEED)
    for name, rows in (("train", train), ("test", held_out)):
        lines = (output / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert list(map(json.loads, lines)) == rows
    weights = set()
    for name in ("initial", *METRICS):
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        model = AutoModelForCausalLM.from_pretrained(output / name)
        text = train[0]["prompt"] + train[0]["completion"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        weights.add(model.get_input_embeddings().weight.detach().numpy().tobytes())
    assert len(weights) == 4
    for name in METRICS:
        assert (output / name / "commonit" / "report.html").stat().st_size


@pytest.mark.slow
def test_recommended_command_runs(demo, tmp_path):
    _, result = demo
    command = shlex.split(result.stdout[result.stdout.index("commonit sft") :].replace("\\\n", ""))
    trained = commonit(*command[1:], "--max_steps", "1", "--output_dir", str(tmp_path / "sft"), home=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "sft" / "model.safetensors").exists()
