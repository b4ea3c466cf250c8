"""`examples/ray_embeddings.py` on two workers: the rows in their order, with the vectors of our encoder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from helpers.axolotl_recipes import ENVIRONMENT
from helpers.trainers import rows_of_task, write_jsonl

from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.rows import Rows

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"{row['prompt']} {number}", "completion": "a"} for number, row in enumerate(rows_of_task("sum", 60))
]


def embed(directory, *flags):
    command = [sys.executable, ROOT / "examples" / "ray_embeddings.py", "rows.jsonl", "embedded", *flags]
    environment = os.environ | ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = list(map(str, command))
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900)


def test_vectors_equal_our_encoders(tmp_path, minilm):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    done = embed(tmp_path, "--model", minilm, "--workers", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(map(str, (tmp_path / "embedded").glob("*.parquet")))
    embedded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert embedded.remove_columns("vector").to_list() == ROWS
    (vectors,) = Rows(embedded).vector_chunks("vector")
    ours = EmbeddingGrouper(model=minilm, dtype="float32").encode([row["prompt"] for row in ROWS])
    np.testing.assert_allclose(vectors, ours, atol=1e-5)


def test_more_workers_than_cpus_are_refused(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    done = embed(tmp_path, "--model", "none", "--workers", 1000)
    assert done.returncode != 0 and "--workers=1000" in done.stderr
