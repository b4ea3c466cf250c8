"""`examples/finetune_smollm2.py` with a tiny model in the place of SmolLM2."""

import os
import re
from pathlib import Path

from helpers import forked
from helpers.toys import tiny_model, tiny_tokenizer
from helpers.trainers import write_jsonl

ROOT = Path(__file__).parents[2]


def test_the_first_run_of_a_newcomer(tmp_path):
    base = tmp_path / "out" / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    problems = [
        {"question": f"What is {number} + 1?", "answer": f"#### {number + 1}" * (number % 5 + 1)}
        for number in range(80)
    ]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    arguments = ["--data", "problems.jsonl", "--rows", "16", "--output_dir", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forked.run([str(ROOT / "examples" / "finetune_smollm2.py"), *arguments], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[before]") == done.stdout.count("[after]") == 3
    before, after = map(float, re.search(r"Held-out loss: ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    assert after < before
    assert (tmp_path / "out" / "trained" / "commonit" / "report.html").exists()
    assert (tmp_path / "out" / "trained" / "model.safetensors").exists()
