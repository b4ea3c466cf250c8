"""Download the data of the paper's runs and write them to out/paper/data.

    python example_configs/paper/make_data.py

Writes flan.jsonl, cot.jsonl and alpaca.jsonl, and as reference set mmlu_dev.jsonl, five dev questions of each of MMLU's
57 tasks. Columns: prompt, completion, task. README.md explains the selection, because the authors' rows and prompt
format are unknown. The dataset cards give a download of 5.6 GB, nearly all of it FLAN.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

FOLDER = Path("out/paper/data")
ROWS = 100_000
"""Maximum per dataset; FLAN and CoT exceed it."""


def from_flan(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["inputs"].strip() + "\n", "completion": row["targets"].strip(), "task": row["task_name"]}


def from_alpaca(row: dict[str, Any]) -> dict[str, str]:
    """Convert a row of Alpaca, which has no task labels: use the first word of the instruction instead."""
    prompt = "\n".join(filter(None, (row["instruction"].strip(), row["input"].strip())))
    task = row["instruction"].split()[0].strip(",.:;!?\"'").lower()
    return {"prompt": prompt + "\n", "completion": row["output"].strip(), "task": task}


def from_mmlu(row: dict[str, Any]) -> dict[str, str]:
    prompt = "\n".join((row["question"].strip(), *row["choices"]))
    return {"prompt": prompt, "completion": row["choices"][row["answer"]], "task": row["subject"]}


SOURCES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, str]]]] = {
    "flan": ({"path": "DataProvenanceInitiative/flan2021_submix_original", "split": "train"}, from_flan),
    "cot": ({"path": "DataProvenanceInitiative/cot_submix_original", "split": "train"}, from_flan),
    "alpaca": ({"path": "tatsu-lab/alpaca", "split": "train"}, from_alpaca),
    "mmlu_dev": ({"path": "cais/mmlu", "name": "all", "split": "dev"}, from_mmlu),
}


def make(raw: Dataset, convert: Callable[[dict[str, Any]], dict[str, str]], seed: int = 42) -> Dataset:
    """Convert at most `ROWS` random rows and drop rows without a completion."""
    chosen = raw.shuffle(seed).select(range(ROWS)) if len(raw) > ROWS else raw
    made = chosen.map(convert, remove_columns=chosen.column_names)
    return made.filter(lambda row: row["completion"] != "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"Download the data and write {FOLDER}/*.jsonl.")
    parser.add_argument("names", nargs="*", default=list(SOURCES), help=f"default: {', '.join(SOURCES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().names:
        source, convert = SOURCES[name]
        rows = make(load_dataset(**source), convert)
        rows.to_json(FOLDER / f"{name}.jsonl")
        print(f"{name}: {len(rows)} rows of {len(set(rows['task']))} tasks")
