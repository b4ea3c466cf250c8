"""Compare groups of vectors that `examples/ray_embeddings.py` computed with groups of our own encoder.

Steps: (1) embed the mixture and the MMLU dev set with the example, on two Ray workers; (2) embed the mixture with our
encoder in float32; (3) group the mixture from both, with the same seed: by reference task and by k-means; (4) count the
rows in different groups. k-means starts from rows in the order of their hashes, and texts and vectors hash differently,
so k-means is also compared with one set of centroids; (5) measure bytes and CPU seconds per row.

    python -m benchmarks ray_embeddings --size full --data FOLDER

With `--set embedded=DIR`, the vectors stay in that directory, and a later run reads them. Cost: two encodings of 14,434
prompts in float32, four minutes of one core. Needs `ray[data]`.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from scipy.optimize import linear_sum_assignment
from sentence_transformers import SentenceTransformer

from benchmarks.common import Report, Settings, Skipped, Table, installed
from benchmarks.mixture import REFERENCE, encoder, read_mixture, stratified_slice
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.rows import Rows

TITLE = "Groups of vectors from Ray Data beside our encoder's"
SIZES = {"quick": {"rows": 500, "embedded": None}, "full": {"rows": None, "embedded": None}}
EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_embeddings.py"
WORKERS = 2
VECTOR = "vector"


def embed(rows: list[dict[str, Any]], reference: Path, folder: Path) -> None:
    """Write `folder`/mixture and `folder`/reference with the example."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "mixture.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for path, name in ((source, "mixture"), (reference, "reference")):
        command = [sys.executable, EXAMPLE, path, folder / name, "--model", encoder(), "--workers", WORKERS]
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as steps:
            subprocess.run([str(word) for word in command], check=True, stdout=steps)


def read(folder: Path) -> Dataset:
    files = sorted(map(str, folder.glob("*.parquet")))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


def encode(texts: list[str], file: Path) -> None:
    """Write the vectors of our encoder in float32, one for each text."""
    np.save(file, EmbeddingGrouper(model=encoder(), dtype="float32").encode(texts))


def remembered(texts: list[str], file: Path) -> Any:
    """Return `SentenceTransformer.encode` that reads the vectors of `texts` and encodes other texts."""
    known, encode_others = dict(zip(texts, np.load(file), strict=True)), SentenceTransformer.encode

    def lookup(model: SentenceTransformer, asked: list[str], **options: Any) -> Any:
        if known.keys().isdisjoint(asked):
            return encode_others(model, asked, **options)
        return np.stack([known[text] for text in asked])

    return lookup


def cpu_seconds(statistics: str) -> float:
    """Return the CPU seconds of all encoders in Ray's statistics of a job."""
    operator = statistics[statistics.index("MapBatches(Encoder)") :]
    number, unit = re.search(r"Remote cpu time: .* ([\d.]+)(us|ms|s) total", operator).groups()
    return float(number) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit]


def bytes_per_row(columns: dict[str, pa.Array]) -> dict[str, float]:
    """Return the bytes per row of each column in a Parquet file of its own."""
    sizes = {}
    for name, column in columns.items():
        file = pa.BufferOutputStream()
        pq.write_table(pa.table({"column": column}), file)
        sizes[name] = file.tell() / len(column)
    return sizes


def matched(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Renumber `theirs` so that most rows have the group ids of `ours`."""
    table = np.zeros((ours.max() + 1, theirs.max() + 1), dtype=np.int64)
    np.add.at(table, (ours, theirs), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    renumbered = np.full(theirs.max() + 1, -1)
    renumbered[columns] = rows
    return renumbered[theirs]


def compare(embedded: Dataset, reference: Path, folder: Path) -> dict[str, Any]:
    """Group the rows both ways, count the rows in different groups, and measure vectors and labels."""
    rows = Rows(embedded)
    texts, vectors_file = rows.texts("prompt"), folder / "ours.npy"
    if not vectors_file.exists():
        encode(texts, vectors_file)
    ours: dict[str, Any] = {"model": encoder(), "dtype": "float32"}
    theirs: dict[str, Any] = {"model": encoder(), "column": VECTOR}
    with patch.object(SentenceTransformer, "encode", remembered(texts, vectors_file)):
        by_task = EmbeddingGrouper(**ours, reference=str(reference))
        task_ids = by_task.fit_assign(by_task.read(rows))
        clusters = EmbeddingGrouper(**ours)
        cluster_ids = clusters.fit_assign(clusters.read(rows))
    from_vectors = EmbeddingGrouper(**theirs, reference=str(folder / "reference" / "*.parquet"))
    task_ids_from_vectors = from_vectors.fit_assign(from_vectors.read(rows))
    assert by_task.names == from_vectors.names

    same_centroids = EmbeddingGrouper(**theirs)
    same_centroids.centroids, same_centroids.names = clusters.centroids, clusters.names
    began = time.process_time()
    same_ids = same_centroids.assign(rows)
    seconds = time.process_time() - began
    refitted = EmbeddingGrouper(**theirs)
    refitted_ids = refitted.fit_assign(refitted.read(rows))

    counts = {
        "reference tasks of MMLU": task_ids != task_ids_from_vectors,
        "k-means, one set of centroids": cluster_ids != same_ids,
        "k-means, fitted twice": cluster_ids != matched(cluster_ids, refitted_ids),
    }
    vectors = np.concatenate(list(rows.vector_chunks(VECTOR)))
    width, names = vectors.shape[1], pa.array(by_task.names)
    columns = {
        "vectors, float32": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
        "vectors, float16": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel().astype(np.float16)), width),
        "names of reference tasks": names.take(pa.array(task_ids)),
    }
    return {
        "rows": len(rows),
        "cases": {name: {"differ": int(moved.sum()), "share": float(moved.mean())} for name, moved in counts.items()},
        "largest difference": float(np.abs(np.load(vectors_file) - vectors).max()),
        "bytes per row": bytes_per_row(columns),
        "rows per CPU second": {
            "an encoder of Ray": len(rows) / cpu_seconds((folder / "mixture.txt").read_text(encoding="utf-8")),
            "groups of vectors": len(rows) / seconds,
        },
    }


def run(settings: Settings) -> Report:
    if installed("ray") is None:
        raise Skipped("needs ray: make test-ray makes an environment that has it")
    mixture, reference = read_mixture(settings.data), settings.data / REFERENCE
    rows = mixture if settings["rows"] is None else stratified_slice(mixture, settings["rows"], 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(settings["embedded"] or temporary)
        if not (folder / "reference").exists():
            embed(rows, reference, folder)
        embedded = read(folder / "mixture")
        in_order = list(embedded["prompt"]) == [row["prompt"] for row in rows]
        results = compare(embedded, reference, folder) | {"in order": in_order}
    return Report(
        head={
            "data": f"{results['rows']:,} prompts of GSM8K, CodeAlpaca and APIBench; all-MiniLM-L6-v2",
            "Ray": f"{WORKERS} workers on this machine; rows in the order of the source: {in_order}",
            "figures": "rows in another group than with our own encoder in float32, same seed; largest difference of a "
            f"coordinate of a unit vector: {results['largest difference']:.1e}",
        },
        parts=[
            Table(
                heading="Rows in another group",
                header=["groups", "rows", "share"],
                rows=[[name, row["differ"], f"{row['share']:.2%}"] for name, row in results["cases"].items()],
            ),
            Table(
                heading="Parquet",
                header=["column", "bytes per row"],
                rows=[[name, f"{size:,.1f}"] for name, size in results["bytes per row"].items()],
            ),
            Table(
                heading="CPU time",
                header=["work", "rows per CPU second"],
                rows=[[name, f"{rate:,.0f}"] for name, rate in results["rows per CPU second"].items()],
            ),
        ],
        results=results,
        packages=("ray", "sentence-transformers"),
    )
