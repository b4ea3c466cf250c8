"""Count the rows that a lower precision of the encoder moves to another group.

Steps: (1) take random rows of each task of the mixture; (2) encode their prompts, responses and both in float32 and in
bfloat16; (3) find the centroids in float32: the reference tasks of the MMLU dev set, and k-means of the mixture;
(4) count the rows whose nearest of these centroids differs between the two precisions.

    python -m benchmarks dtype --size full --data FOLDER

Cost: 9 x `rows` texts, each encoded twice: 15 minutes of one core for 1,500 rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from benchmarks.common import Report, Settings, Table
from benchmarks.mixture import REFERENCE, encoder, read_mixture
from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.embedding import EmbeddingGrouper, best_dtype
from commonit_trl.rows import Rows

TITLE = "Rows that bfloat16 moves to another group"
SIZES = {"quick": {"rows": 100}, "full": {"rows": 1_500}}
TEXTS = ("prompt", "response", "both")
EXACT, REDUCED = "float32", "bfloat16"
NATIVE = ("avx512_bf16", "amx_bf16")


def reference_centroids(folder: Path, rows: Dataset) -> NDArray[np.float32]:
    """Return the (tasks, dimensions) centroids of the MMLU dev set in float32."""
    grouper = EmbeddingGrouper(model=encoder(), reference=str(folder / REFERENCE), dtype=EXACT)
    grouper.fit(Rows(rows.select([0])))
    return grouper.centroids


def cluster_centroids(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (clusters, dimensions) k-means centroids, with the package's default number of clusters."""
    found = KMeans(DEFAULT_NUM_GROUPS["embedding"], n_init=1, random_state=0).fit(features).cluster_centers_
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def moved_rows(
    exact: NDArray[np.float32], reduced: NDArray[np.float32], centroids: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Return (rows,) whether the nearest centroid differs between two encodings."""
    return (exact @ centroids.T).argmax(axis=1) != (reduced @ centroids.T).argmax(axis=1)


def margins(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (rows,) cosine to the nearest centroid minus cosine to the second nearest."""
    second, first = np.sort(features @ centroids.T, axis=1)[:, -2:].T
    return first - second


def summary(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Sum the counts over all kinds of text."""
    rows, moved = (int(sum(kind[key] for kind in kinds.values())) for key in ("rows", "moved"))
    shares = [kind["share"] for kind in kinds.values()]
    return {
        "rows": rows,
        "moved": moved,
        "share": moved / rows,
        "smallest_share": min(shares),
        "largest_share": max(shares),
        "largest_margin": max(kind["largest_margin"] for kind in kinds.values()),
    }


def tables(results: dict[str, dict[str, dict[str, float]]]) -> list[Table]:
    """Yield one table per set of centroids."""
    return [
        Table(
            heading=name,
            header=["text", "rows", "moved", "share", "largest margin of a moved row", "median margin of all rows"],
            rows=[
                [
                    kind,
                    f"{row['rows']:,}",
                    row["moved"],
                    f"{row['share']:.2%}",
                    f"{row['largest_margin']:.5f}",
                    f"{row['median_margin']:.5f}" if "median_margin" in row else "",
                ]
                for kind, row in kinds.items()
            ],
        )
        for name, kinds in results.items()
    ]


def bfloat16_support() -> str:
    """Describe this device's support for bfloat16."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return f"{torch.cuda.get_device_name()}, {'native' if native else 'emulated'}"
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native_by = [name for name in NATIVE if can.get(name)]
    return f"CPU, native ({', '.join(native_by)})" if native_by else "CPU without bfloat16 instructions: emulated"


def run(settings: Settings) -> Report:
    mixture = Dataset.from_list(read_mixture(settings.data))
    labels = np.array(mixture["task"])
    tasks = sorted(set(labels.tolist()))
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(labels == task))[: settings["rows"]] for task in tasks]
    dataset = mixture.select(np.concatenate(chosen))
    task_of_row = np.array(dataset["task"])
    reference = reference_centroids(settings.data, dataset)

    results: dict[str, Any] = {}
    for text in TEXTS:
        texts = Rows(dataset).texts(text)
        exact, reduced = (EmbeddingGrouper(model=encoder(), dtype=dtype).encode(texts) for dtype in (EXACT, REDUCED))
        for name, centroids in (("MMLU reference", reference), ("k-means", cluster_centroids(exact))):
            moved, margin = moved_rows(exact, reduced, centroids), margins(exact, centroids)
            for task in tasks:
                mask = task_of_row == task
                results.setdefault(name, {})[f"{task}, {text}"] = {
                    "rows": int(mask.sum()),
                    "moved": int(moved[mask].sum()),
                    "share": float(moved[mask].mean()),
                    "largest_margin": float(margin[mask & moved].max(initial=0)),
                    "median_margin": float(np.median(margin[mask])),
                }
    for kinds in results.values():
        kinds["all"] = summary(kinds)
    return Report(
        head={
            "data": f"up to {settings['rows']:,} random rows of each of {', '.join(tasks)}; all-MiniLM-L6-v2",
            "bfloat16": f"{bfloat16_support()}; `auto` chooses {best_dtype()} here",
            "figures": f"rows whose nearest centroid in {REDUCED} differs from that in {EXACT}, with the same "
            f"centroids, found in {EXACT}: {len(reference)} MMLU tasks, or {DEFAULT_NUM_GROUPS['embedding']} k-means "
            "clusters fitted to the rows of the same text; *margin*: cosine to the nearest centroid minus cosine to "
            "the second nearest, in float32",
        },
        parts=tables(results),
        results=results,
        packages=("sentence-transformers", "scikit-learn", "numpy"),
    )
