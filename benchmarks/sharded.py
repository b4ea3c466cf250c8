"""Compare grouping by embedding on two ranks with one: time, and equality of the groups.

Steps: (1) write prompts of the mixture to a file; (2) in rounds, run `commonit group` with k-means clusters in one
process and on two ranks under torchrun, each with one thread and an empty cache; (3) time each from start to end,
imports included, and compare the saved groups.

    python -m benchmarks sharded --size full --data FOLDER

Cost: two to four minutes on two cores for 4,000 prompts in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.common import Report, Settings, Table, medians, paired_rounds
from benchmarks.mixture import encoder, read_mixture

TITLE = "Grouping by embedding on two ranks"
SIZES = {"quick": {"prompts": 2_000, "rounds": 1}, "full": {"prompts": 4_000, "rounds": 3}}
ONE = "1 rank of 1 thread"
RANKS = {ONE: 1, "this package on 2 ranks of 1 thread": 2}


def group(rows: Path, ranks: int, number: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        out = rows.with_name(f"{ranks}-ranks-{number}")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        options = {
            "metric": "embedding",
            "embedding_model": encoder(),
            "embedding_dtype": "float32",
            "cache_dir": cache,
        }
        command = [sys.executable, *launcher, "-m", "commonit_trl", "group", str(rows), "--output", str(out)]
        command += [word for name, value in options.items() for word in (f"--commonit_{name}", value)]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return {"seconds": time.perf_counter() - start}


def run(settings: Settings) -> Report:
    mixture = read_mixture(settings.data)
    chosen = np.random.default_rng(0).permutation(len(mixture))[: settings["prompts"]]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(mixture[number]) + "\n" for number in chosen), encoding="utf-8")
        rounds = paired_rounds({name: partial(group, rows, ranks) for name, ranks in RANKS.items()}, settings["rounds"])
        saved = {
            path.parent.name: load_file(path)["group_ids"] for path in Path(folder).glob("*/assignment.safetensors")
        }
    first, *others = saved.values()
    same = min(float((first == other).mean()) for other in others)
    results = medians(rounds, "seconds", ONE)
    return Report(
        head={
            "data": f"{settings['prompts']:,} prompts of GSM8K, CodeAlpaca and APIBench; all-MiniLM-L6-v2 in float32; "
            "32 clusters",
            "figures": f"medians of {settings['rounds']} rounds; seconds from start to end; *ratio*: to one rank, "
            "inside a round",
            "same group": f"{same:.2%} of the rows, over all runs",
        },
        parts=[
            Table(
                heading="`commonit group`",
                header=["", "seconds", "ratio"],
                rows=[[name, f"{row['seconds']:.1f}", f"{row['ratio']:.2f}"] for name, row in results.items()],
                bars={name: row["seconds"] for name, row in results.items()},
                bars_of="seconds",
            )
        ],
        results={**results, "same group": same},
        packages=("sentence-transformers",),
    )
