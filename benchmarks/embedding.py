"""Measure the cost of grouping by embedding beside a bare encoding of the same texts, and its parts.

Steps: (1) take prompts of the mixture; (2) in rounds over all cases, encode the distinct ones as sentence-transformers
does, and group all of them with this package in each precision: read, encode, cluster, assign, write the cache; then
group them again, from the cache; (3) count the rows whose group is that of float32; (4) group many rows with stored
embeddings instead of the encoder, which measures the package's own work.

    python -m benchmarks embedding --size full --data FOLDER

Cost: a minute and a half for each round of 4,000 prompts on two cores, and 8 GB of memory for the 10^6 rows of step 4.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sentence_transformers import SentenceTransformer

from benchmarks.common import Cases, Report, Settings, Table, medians, paired_rounds
from benchmarks.mixture import encoder, read_mixture, stratified_slice
from commonit_trl.grouping.cache import fit_assign_cached
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.rows import Rows

TITLE = "Grouping by embedding"
SIZES = {
    "quick": {"prompts": 1_000, "rounds": 2, "stored_rows": 1e5},
    "full": {"prompts": 4_000, "rounds": 3, "stored_rows": 1e6},
}
BARE = "sentence-transformers: encode alone"
EXACT = "this package, float32"
CHOSEN = "this package, precision by the device"
GOAL = 0.45
STORED_CLUSTERS = 200
DIMENSIONS = 384

CASES = Cases()


class Inputs:
    """Rows of the mixture, and a directory for caches."""

    def __init__(self, data: Path, prompts: int, folder: Path) -> None:
        rows = stratified_slice(read_mixture(data), prompts, seed=0)
        self.dataset = Dataset.from_list(rows)
        self.distinct = list(dict.fromkeys(row["prompt"] for row in rows))
        self.folder = folder
        self.model = SentenceTransformer(encoder())
        self.model.encode(self.distinct[:64])  # one-time setup of the process
        self.fitted: dict[str, tuple[Any, NDArray[np.int64]]] = {}

    def group(self, name: str, number: int, dtype: str) -> None:
        grouper = EmbeddingGrouper(model=encoder(), dtype=dtype)
        self.fitted[name] = fit_assign_cached(grouper, Rows(self.dataset), self.folder / f"{name}, {number}")

    def same_groups(self, name: str) -> tuple[float, float]:
        """Return shares of rows in the same group as in float32.

        First with the centroids of float32, then with centroids fitted in this precision and matched to float32's.
        """
        (exact, exact_groups), (grouper, groups) = self.fitted[EXACT], self.fitted[name]
        nearest = (grouper.encode(list(self.dataset["prompt"])) @ exact.centroids.T).argmax(axis=1)
        return float(np.mean(nearest == exact_groups)), matched_share(groups, exact_groups)


@CASES(BARE)
def bare(inputs: Inputs, number: int) -> None:
    inputs.model.encode(inputs.distinct, show_progress_bar=False)


@CASES(EXACT)
def exact(inputs: Inputs, number: int) -> None:
    inputs.group(EXACT, number, "float32")


@CASES(CHOSEN)
def chosen(inputs: Inputs, number: int) -> None:
    inputs.group(CHOSEN, number, "auto")


@CASES("this package, bfloat16")
def reduced(inputs: Inputs, number: int) -> None:
    inputs.group("this package, bfloat16", number, "bfloat16")


def timed(function: Callable[[Inputs, int], None], inputs: Inputs, number: int) -> dict[str, float]:
    """Return the seconds of a run without cache, and of a second run with the first one's cache."""
    start = time.perf_counter()
    function(inputs, number)
    first = time.perf_counter() - start
    if function is not bare:
        start = time.perf_counter()
        function(inputs, number)
    return {"seconds": first, "again": time.perf_counter() - start}


def matched_share(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Return the share of rows in the same group under the best matching of groups."""
    count = int(max(some.max(), others.max())) + 1
    together = np.bincount(some * count + others, minlength=count * count).reshape(count, count)
    return float(together[linear_sum_assignment(together, maximize=True)].sum() / len(some))


def stored_embeddings(rows: int) -> NDArray[np.float32]:
    """Return (rows, DIMENSIONS) embeddings around centres of different weight."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((STORED_CLUSTERS, DIMENSIONS), dtype=np.float32)
    weights = 1 / np.arange(1, STORED_CLUSTERS + 1)
    embeddings = centres[rng.choice(STORED_CLUSTERS, rows, p=weights / weights.sum())]
    for low in range(0, rows, 50_000):
        part = embeddings[low : low + 50_000]
        part += 0.8 * rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return embeddings


def seconds_without_encoding(inputs: Inputs, rows: int) -> dict[str, float]:
    """Time the pipeline over `rows` distinct texts with stored embeddings, and again from the cache."""
    texts = [f"{number}: {inputs.distinct[number % len(inputs.distinct)]}" for number in range(rows)]
    dataset = Dataset.from_dict({"prompt": texts, "completion": texts})
    stored, position = stored_embeddings(rows), 0

    def encode(model: Any, sentences: list[str], **options: Any) -> NDArray[np.float32]:
        nonlocal position
        position += len(sentences)  # each text comes once
        return stored[position - len(sentences) : position]

    taken = {}
    for name in ("grouped", "cached"):
        start = time.perf_counter()
        with mock.patch.object(SentenceTransformer, "encode", encode):
            fit_assign_cached(EmbeddingGrouper(model=encoder()), Rows(dataset), inputs.folder / "stored")
        taken[name] = time.perf_counter() - start
    return taken


def run(settings: Settings) -> Report:
    rounds, stored_rows = settings["rounds"], int(settings["stored_rows"])
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(settings.data, settings["prompts"], Path(folder))
        functions, _ = CASES.present()
        cases = {name: partial(timed, function, inputs) for name, function in functions.items()}
        results = medians(paired_rounds(cases, rounds), "seconds", BARE)
        same = {name: inputs.same_groups(name) for name in inputs.fitted}
        stored = seconds_without_encoding(inputs, stored_rows)
    encoding = stored_rows * results[CHOSEN]["seconds"] / len(inputs.distinct)
    table = Table(
        heading=f"{len(inputs.dataset):,} prompts",
        header=[
            "",
            "seconds",
            "× encode alone",
            "lowest to highest",
            "again, seconds",
            "at float32's centroids",
            "refitted",
        ],
        rows=[
            [
                name,
                f"{row['seconds']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                f"{row['again']:.2f}" if name in same else "",
                *((f"{share:.2%}" for share in same[name]) if name in same else ("", "")),
            ]
            for name, row in results.items()
        ],
        bars={name: row["ratio"] for name, row in results.items()},
        bars_of="seconds, × encode alone",
        goal=GOAL,
    )
    text = (
        f"All but the encoding, of {stored_rows:,} distinct rows with stored embeddings: {stored['grouped']:.1f} s, "
        f"{stored['grouped'] / encoding:.2%} of the {encoding:,.0f} s that encoding them would take at the rate above; "
        f"from the cache, {stored['cached']:.1f} s."
    )
    return Report(
        head={
            "data": f"{len(inputs.dataset):,} prompts of GSM8K, CodeAlpaca and APIBench, each with its share, "
            f"{len(inputs.distinct):,} of them distinct; all-MiniLM-L6-v2, k-means of 32 clusters",
            "figures": f"wall seconds, medians of {rounds} rounds, ratios taken in each round; *again*: from the "
            "cache; *at float32's centroids*: rows of embeddings in this precision that join the group they have in "
            "float32; *refitted*: the same with clusters fitted to them, matched to float32's",
        },
        parts=[table, text],
        results={"cases": results, "same_groups": same, "without_encoding": stored, "encoding_seconds": encoding},
        packages=("sentence-transformers", "scikit-learn", "numpy"),
    )
