"""Time an evaluation with the loss of each group, relative to the parent's, for 1, 60 and 500 groups.

Steps: (1) make the demo's model and rows of as many tasks; (2) evaluate them by `SFTTrainer` and by
`CommonITSFTTrainer` in turns, without and with dataloader workers; (3) take the median of the rounds' ratios.

    python -m benchmarks evaluation --size full

Cost: a few minutes of one CPU core; nothing is downloaded.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.common import Report, Settings, Table
from benchmarks.overhead import runs
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer

TITLE = "What the loss of each group costs in an evaluation"
SIZES = {
    "quick": {"rows": 500, "rounds": 3},
    "full": {"rows": 2000, "rounds": 7},
}
GROUPS = (1, 60, 500)
WORKERS = (0, 2)
BATCH = 8


def make(kind: Any, config: Any, model: Any, rows: Dataset, folder: Path, **options: Any) -> Any:
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        **options,
    )
    trainer = kind(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=model.tokenizer)
    trainer.log = lambda *args, **kwargs: None
    return trainer


def seconds(trainer: Any) -> float:
    start = time.perf_counter()
    trainer.evaluate()
    return time.perf_counter() - start


def run(settings: Settings) -> Report:
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, each in runs(folder, settings["rows"]).items():
            for groups in GROUPS:
                rows = each.dataset.select_columns(["input_ids"])
                rows = rows.add_column("task", [f"task {number % groups}" for number in range(len(rows))])
                for workers in WORKERS:
                    model = each.make_model(0)
                    model.tokenizer = each.tokenizer
                    options = {"dataloader_num_workers": workers}
                    parent = make(SFTTrainer, SFTConfig, model, rows, folder, **options)
                    ours = make(
                        CommonITSFTTrainer,
                        CommonITSFTConfig,
                        model,
                        rows,
                        folder,
                        **options,
                        commonit_metric="task",
                        commonit_report=False,
                        commonit_cache_dir=str(folder / "cache"),
                    )
                    seconds(parent), seconds(ours)
                    rounds = [(seconds(parent), seconds(ours)) for _ in range(settings["rounds"])]
                    results[f"{size}, {groups} groups, {workers} workers"] = {
                        "parent_seconds": statistics.median(first for first, _ in rounds),
                        "seconds": statistics.median(second for _, second in rounds),
                        "ratio": statistics.median(second / first for first, second in rounds),
                    }
    table = Table(
        heading="Evaluation by the parent and with the loss of each group",
        header=["model, groups, workers", "parent, s", "with group losses, s", "ratio"],
        rows=[
            [case, f"{row['parent_seconds']:.2f}", f"{row['seconds']:.2f}", f"{row['ratio']:.2f}"]
            for case, row in results.items()
        ],
    )
    head = {"figures": f"medians of {settings['rounds']} rounds of both; batches of {BATCH} rows, one thread"}
    return Report(head=head, parts=[table], results=results)
