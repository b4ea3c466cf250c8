"""Time reading the token counts and tasks of all rows of a `datasets.Dataset`.

Steps: (1) write rows of 50 to 150 random tokens, half of them masked in the labels, and one of 64 tasks, to disk, and
map them into memory as `datasets` does; (2) shuffle the same rows, which gives the dataset an indices mapping; (3) time
this package and its peers, in rounds over all cases.

    python -m benchmarks reading

Peers read row by row, so they are timed on the first `peer_rows` rows and scaled. Cost: two
minutes, 1 GB of memory and of disk for 10^6 rows.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_from_disk
from sentence_transformers.base.sampler import GroupByLabelBatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.common import Cases, Report, Settings, Table, medians, paired_rounds
from commonit_trl.rows import Rows

TITLE = "Reading lengths and labels"
SIZES = {
    "quick": {"rows": 1e6, "peer_rows": 2e4, "rounds": 2},
    "full": {"rows": 1e6, "peer_rows": 1e5, "rounds": 5},
}
GOAL_SECONDS = 2
TASKS = 64
ROWS_AT_ONCE = 1_000  # as datasets.map writes them

OURS = Cases()
PEERS = Cases()


def make_dataset(rows: int, folder: str) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 151, rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    tokens = rng.integers(0, 32_000, int(lengths.sum()), dtype=np.int32)
    labels = tokens.copy()
    starts = np.repeat(offsets.to_numpy()[:-1], lengths)
    labels[np.arange(len(labels)) - starts < np.repeat(lengths // 2, lengths)] = -100
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens)),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
            "length": pa.array(lengths),
            "task": pa.array([f"task {number}" for number in rng.integers(0, TASKS, rows)]),
        }
    )
    batches = pa.Table.from_batches(table.to_batches(max_chunksize=ROWS_AT_ONCE))
    Dataset(batches).save_to_disk(folder)
    return load_from_disk(folder)


@OURS("this package: tokens of each row")
def total(dataset: Dataset) -> Any:
    return Rows(dataset).token_counts("total")


@OURS("this package: tokens of each response")
def response(dataset: Dataset) -> Any:
    return Rows(dataset).token_counts("response")


@OURS("this package: task of each row")
def task(dataset: Dataset) -> Any:
    return Rows(dataset).labels(["task"])


@PEERS("transformers: tokens of each row, no column of lengths")
def transformers_rows(dataset: Dataset) -> Any:
    """As group_by_length and batch_rebalance do."""
    return LengthGroupedSampler(32, dataset=dataset, model_input_name="input_ids").lengths


@PEERS("transformers: group_by_length of a column of lengths")
def transformers_column(dataset: Dataset) -> Any:
    return list(LengthGroupedSampler(32, lengths=dataset["length"]))


@PEERS("sentence-transformers: task of each row")
def sentence_transformers(dataset: Dataset) -> Any:
    return GroupByLabelBatchSampler(dataset, batch_size=8, drop_last=False, valid_label_columns=["task"])


def timed(function: Callable[[Dataset], Any], dataset: Dataset, times: float) -> Callable[[int], dict[str, float]]:
    def run(number: int) -> dict[str, float]:
        start = time.perf_counter()
        function(dataset)
        return {"seconds": (time.perf_counter() - start) * times}

    return run


def run(settings: Settings) -> Report:
    rows, peer_rows = int(settings["rows"]), int(settings["peer_rows"])
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(rows, folder)
        orders = {"": dataset, ", shuffled": dataset.shuffle(seed=0)}
        ours, _ = OURS.present()
        peers, skipped = PEERS.present()
        cases = {
            f"{name}{order}": timed(function, rows_in_order, 1)
            for order, rows_in_order in orders.items()
            for name, function in ours.items()
        }
        first = dataset.select(range(peer_rows))
        cases |= {name: timed(function, first, rows / peer_rows) for name, function in peers.items()}
        results = medians(paired_rounds(cases, settings["rounds"]), "seconds", next(iter(cases)))
    return Report(
        head={
            "data": f"{rows:,} rows of 100 tokens on average and {TASKS} tasks, memory-mapped from disk",
            "figures": f"wall seconds, medians of {settings['rounds']} rounds; the peers' are those of {peer_rows:,} "
            f"rows times {rows / peer_rows:g}; goal: {GOAL_SECONDS} s",
        },
        parts=[
            Table(
                heading="Reading",
                header=["", "seconds", "× the first row", "µs a row"],
                rows=[
                    [name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['seconds'] / rows * 1e6:.2f}"]
                    for name, row in results.items()
                ],
                skipped=skipped,
                bars={name: row["seconds"] for name, row in results.items()},
                bars_of="seconds",
                goal=GOAL_SECONDS,
            )
        ],
        results=results,
        packages=("datasets", "pyarrow", "sentence-transformers"),
    )
