"""Train kinds of `kinds.py` on this rank, one after another, and save the models' inputs.

    python rank_worker.py runs.json            torchrun --nproc_per_node 2 rank_worker.py runs.json

`runs.json` is a list of runs with `name`, `kind`, `metric` (null for the parent) and `options` of `Kind.make`. A run
may have `rows` (a JSON Lines file, instead of the kind's rows) and `resume` (a checkpoint), both as paths from the
folder of `runs.json`. Each writes `<name>.rank<r>.pt` there, for `kinds.load`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import load_dataset

from helpers.kinds import KINDS, save, train
from helpers.toys import accept_cpu_ranks


def main() -> None:
    torch.set_num_threads(1)
    accept_cpu_ranks()
    path = Path(sys.argv[1])
    for run in json.loads(path.read_text(encoding="utf-8")):
        options = dict(run["options"])
        if "rows" in run:
            files = {"data_files": str(path.parent / run["rows"]), "cache_dir": str(path.parent / "datasets")}
            options["extra"] = lambda files=files: {"train_dataset": load_dataset("json", split="train", **files)}
        trainer = KINDS[run["kind"]].make(path.parent / run["name"], run["metric"], **options)
        resume = path.parent / run["resume"] if "resume" in run else None
        record = train(trainer, evaluates="evaluated" in run["options"], resume=resume)
        save(record, path.with_name(f"{run['name']}.rank{os.environ['RANK']}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # a gloo process may abort the interpreter at exit


if __name__ == "__main__":
    main()
