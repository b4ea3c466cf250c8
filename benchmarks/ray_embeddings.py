"""Compare groups of vectors that `examples/ray_embeddings.py` computed with groups of our own encoder.

Steps: (1) embed the mixture and the MMLU dev set with the example, on two Ray workers; (2) group the mixture with our
encoder in float32, and from the vectors, each with the same seed: by reference task and by k-means; (3) count the rows
in different groups. k-means starts from rows in the order of their hashes, and texts and vectors
hash differently, so k-means is also compared with one set of centroids.

    python -m benchmarks ray_embeddings --size full --data FOLDER

With `--set embedded=DIR`, the vectors stay in that directory, and a later run reads them. Cost: three encodings of
14,434 prompts in float32, six minutes of one core. Needs `ray[data]`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from scipy.optimize import linear_sum_assignment

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
        subprocess.run([str(word) for word in command], check=True)


def read(folder: Path) -> Dataset:
    files = sorted(map(str, folder.glob("*.parquet")))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


def matched(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Renumber `theirs` so that most rows have the group ids of `ours`."""
    table = np.zeros((ours.max() + 1, theirs.max() + 1), dtype=np.int64)
    np.add.at(table, (ours, theirs), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    renumbered = np.full(theirs.max() + 1, -1)
    renumbered[columns] = rows
    return renumbered[theirs]


def compare(embedded: Dataset, reference: Path, folder: Path) -> dict[str, Any]:
    """Group the rows both ways and count the rows in different groups."""
    rows = Rows(embedded)
    ours: dict[str, Any] = {"model": encoder(), "dtype": "float32"}
    theirs: dict[str, Any] = {"model": encoder(), "column": VECTOR}
    by_task = EmbeddingGrouper(**ours, reference=str(reference))
    task_ids = by_task.fit_assign(by_task.read(rows))
    from_vectors = EmbeddingGrouper(**theirs, reference=str(folder / "reference" / "*.parquet"))
    task_ids_from_vectors = from_vectors.fit_assign(from_vectors.read(rows))
    assert by_task.names == from_vectors.names

    clusters = EmbeddingGrouper(**ours)
    cluster_ids = clusters.fit_assign(clusters.read(rows))
    same_centroids = EmbeddingGrouper(**theirs)
    same_centroids.centroids, same_centroids.names = clusters.centroids, clusters.names
    refitted = EmbeddingGrouper(**theirs)
    refitted_ids = refitted.fit_assign(refitted.read(rows))

    counts = {
        "reference tasks of MMLU": task_ids != task_ids_from_vectors,
        "k-means, one set of centroids": cluster_ids != same_centroids.assign(rows),
        "k-means, fitted twice": cluster_ids != matched(cluster_ids, refitted_ids),
    }
    sample = rows.select(np.random.default_rng(0).permutation(len(rows))[:256])
    (vectors,) = sample.vector_chunks(VECTOR)
    difference = np.abs(clusters.encode(sample.texts("prompt")) - vectors).max()
    cases = {name: {"differ": int(moved.sum()), "share": float(moved.mean())} for name, moved in counts.items()}
    return {"rows": len(rows), "cases": cases, "largest difference": float(difference)}


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
            f"coordinate of 256 unit vectors: {results['largest difference']:.1e}",
        },
        parts=[
            Table(
                heading="Rows in another group",
                header=["groups", "rows", "share"],
                rows=[[name, row["differ"], f"{row['share']:.2%}"] for name, row in results["cases"].items()],
            )
        ],
        results=results,
        packages=("ray", "sentence-transformers"),
    )
