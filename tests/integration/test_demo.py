"""`commonit demo` as a user runs it, in its own process, with few steps; and the data that it generates.

Invariants: (1) generated answers are correct, by rules written anew here; (2) the data depend on the seed only, and no
held-out question is trained on; (3) the run prints one report of all three metrics, in which every step holds one group
and no row is dropped or repeated, and nothing else; (4) its models load and answer; (5) the command that it recommends
runs. Wrong options are in test_bad_input.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from commonit_trl.cli.demo import FAMILIES, METRICS, batch_quality, generate_rows
from commonit_trl.plan import plan_epoch

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


def test_batch_quality_against_counting():
    rng = np.random.default_rng(0)
    group_ids, lengths = rng.integers(0, 3, size=50), rng.integers(1, 30, size=50)
    for ids, expected_pure in ((group_ids, 1.0), (np.zeros_like(group_ids), None)):
        plan = plan_epoch(ids, micro_batch_size=2, accumulation_steps=2)
        batches = list(plan.batches(0))
        steps = [batches[start] + batches[start + 1] for start in range(0, len(batches), 2)]
        pure = np.mean([len(set(group_ids[step])) == 1 for step in steps])
        padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
        pads = sum(max(lengths[batch]) - lengths[row] for batch in batches for row in batch)
        quality = batch_quality(plan, group_ids, lengths)
        assert quality.pure_steps == pytest.approx(pure)
        assert quality.padding == pytest.approx(pads / padded)
        assert expected_pure is None or quality.pure_steps == expected_pure


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


def test_report_shows_pure_lossless_steps_of_every_metric(demo):
    output, result = demo
    assert result.stderr in ("", f"Library messages: {output / 'libraries.log'}\n")
    assert not re.search("warning|traceback", result.stdout, re.IGNORECASE)
    for metric in METRICS:
        assert re.search(rf"^{metric}\s+━+ 5/5 loss ", result.stdout, re.MULTILINE)
        epoch = re.search(
            rf"^\s+{metric}\s+(\d+)\s+(\d+) \(105\)\s+100% \(0%\)\s+(\d+)% \((\d+)%\)\s+0\s+0\s*$",
            result.stdout,
            re.MULTILINE,
        )
        assert epoch, result.stdout
        groups, steps, padding, baseline_padding = map(int, epoch.groups())
        assert groups >= 5
        assert 105 <= steps <= 105 + groups
        assert padding < baseline_padding / 2
    losses = re.findall(r"\s(\d+\.\d\d)\s+(\d+\.\d\d)\s*$", result.stdout, re.MULTILINE)
    assert len(losses) >= 15
    assert all(float(after) < float(before) for before, after in losses)


def test_files_hold_the_data_and_models_that_answer(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = demo
    train, held_out = generate_rows(SEED)
    for name, rows in (("train", train), ("test", held_out)):
        lines = (output / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert list(map(json.loads, lines)) == rows
    weights = {}
    for name in ("initial", *METRICS):
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        model = AutoModelForCausalLM.from_pretrained(output / name)
        text = train[0]["prompt"] + train[0]["completion"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        inputs = tokenizer(held_out[0]["prompt"], return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=1, do_sample=False)
        assert answer.shape[1] > inputs["input_ids"].shape[1]
        weights[name] = model.get_input_embeddings().weight.detach().numpy()
    assert len({array.tobytes() for array in weights.values()}) == 4
    for name in METRICS:
        report = (output / name / "commonit" / "report.html").read_text(encoding="utf-8")
        assert "Order of the groups in the epoch" in report


@pytest.mark.slow
def test_recommended_command_runs(demo, tmp_path):
    _, result = demo
    command = shlex.split(result.stdout[result.stdout.index("commonit sft") :].replace("\\\n", ""))
    trained = commonit(*command[1:], "--max_steps", "1", "--output_dir", str(tmp_path / "sft"), home=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "sft" / "model.safetensors").exists()
