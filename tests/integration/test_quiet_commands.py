"""The real commands of a user without any environment variable print their own lines only.

Invariants: (1) stdout holds the result; (2) every line on stderr is this package's; (3) the messages of libraries are
in the log that stderr names, or on stderr with `--verbose`; (4) warnings of this package reach the user. The libraries
are real, and transformers warns about `gradient_checkpointing`, which is on by default in TRL.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.trainers import rows_of_task, write_jsonl

OWN_LINE = re.compile(
    r"(INFO|WARNING) commonit: |Library messages: |commonit: error: |none@42: done|task@42: done|runs ━+ 2/2 "
)
VARIABLES = ("HF_", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_", "TQDM_", "PYTHONWARNINGS", "DS_", "ACCELERATE_")

LIBRARIES = re.compile("FutureWarning|torchao|UserWarning")
"""Words of messages that libraries print on import or use, in one version or another."""


@pytest.fixture
def commonit(tmp_path, model):
    """Runs a command as a new user, on rows of three tasks; returns stdout and the lines of stderr."""
    for split, count in (("train", 10), ("test", 3)):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = [row for task in ("add", "sort", "spell") for row in rows_of_task(task, count)]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    instructions = [{"instruction": f"Do {n}", "output": "yes " * (n % 5 + 1)} for n in range(20)]
    write_jsonl(tmp_path / "instructions.jsonl", instructions)
    (tmp_path / "temp").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temp")}

    def run(*arguments, code=0):
        command = [sys.executable, "-m", "commonit_trl", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr.splitlines()

    return run


def check_own(lines):
    foreign = [line for line in lines if line and not OWN_LINE.match(line)]
    assert not foreign


def logged(lines, directory):
    """The text of the log that one line names."""
    (path,) = (line.removeprefix("Library messages: ") for line in lines if line.startswith("Library messages: "))
    return (directory / path).read_text(encoding="utf-8")


def test_inspect(commonit, model, tmp_path):
    out, lines = commonit("inspect", "--help")
    assert "--html FILE" in out and "--verbose" in out
    check_own(lines)

    options = ("inspect", "data", "--commonit_metric", "length", "--tokenizer", model, "--json")
    out, lines = commonit(*options)
    assert json.loads(out)["inspections"][0]["rows"] == 30
    check_own(lines)
    log = logged(lines, tmp_path)
    assert LIBRARIES.search(log) and "real_accelerator" not in log

    out, lines = commonit(*options, "--verbose")
    assert json.loads(out)["inspections"][0]["rows"] == 30
    assert any(map(LIBRARIES.search, lines))
    assert not any(line.startswith("Library messages") for line in lines)


def test_group_with_an_encoder_and_packing(commonit, model, minilm, tmp_path):
    encoder = ("--commonit_embedding_model", minilm, "--commonit_num_groups", 3)
    packing = ("--packing", "true", "--max_length", 64)
    out, lines = commonit(
        "group", "data", "--commonit_metric", "embedding", *encoder, *packing, "--model_name_or_path", model,
        "--output", "groups",
    )  # fmt: skip
    assert out.splitlines()[-1] == "Saved in groups."
    assert not re.search(r"warning|%\|", out, re.IGNORECASE)
    check_own(lines)
    assert LIBRARIES.search(logged(lines, tmp_path))
    assert (tmp_path / "groups" / "libraries.log").exists()


@pytest.mark.slow
def test_compare(commonit, model, tmp_path):
    out, lines = commonit(
        "compare", "--dataset_name", "data", "--metrics", "none,task", "--seeds", 1, "--model_name_or_path", model,
        "--num_train_epochs", 1, "--use_cpu", "true", "--bf16", "false", "--output_dir", "out", "--json",
    )  # fmt: skip
    assert [strategy["name"] for strategy in json.loads(out)["strategies"]] == ["none", "task"]
    check_own(lines)
    assert {"none@42: done", "task@42: done"} <= {*lines}
    assert LIBRARIES.search(logged(lines, tmp_path))
    assert (tmp_path / "out" / "compare" / "libraries.log").exists()


@pytest.mark.slow
def test_our_warnings_and_errors_reach_the_user(commonit, model):
    options = ("inspect", "instructions.jsonl", "--commonit_metric", "length", "--tokenizer")
    _, lines = commonit(*options, model)
    assert any(line.startswith("WARNING commonit: ") and "instruction" in line for line in lines)
    check_own(lines)
    out, lines = commonit(*options, "nowhere", code=2)
    assert out == ""
    assert any(line.startswith("commonit: error: --tokenizer='nowhere'") for line in lines)
    check_own(lines)


def test_sft_keeps_messages_but_hides_an_unused_deepspeed(commonit, model):
    out, lines = commonit(
        "sft", "--dataset_name", "data", "--commonit_metric", "task", "--model_name_or_path", model, "--max_steps", 1,
        "--use_cpu", "true", "--bf16", "false", "--output_dir", "out", "--report_to", "none",
    )  # fmt: skip
    assert any(map(LIBRARIES.search, lines))
    assert "real_accelerator" not in out + "\n".join(lines)
