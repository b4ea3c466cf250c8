"""Compare k-means implementations on real embeddings by time and inertia.

Steps: (1) take the mixture's prompts, responses and their sentences, and encode the distinct ones; (2) in rounds over
all cases, each with a different seed, fit clusters to them; (3) assign every text to the centroid nearest by cosine, as
the package does, and take the inertia: the sum of squared distances to the mean of the cluster.

    python -m benchmarks clustering --size full --data FOLDER

Cost: half a minute on two cores for 5,000 texts, five to ten minutes for all of about 60,000, mostly encoding.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans

from benchmarks.common import Cases, Report, Settings, Table, medians, paired_rounds
from benchmarks.mixture import encoder, read_mixture
from commonit_trl.grouping.embedding import EmbeddingGrouper

TITLE = "k-means of real embeddings"
SIZES = {
    "quick": {"texts": 5_000, "clusters": 32, "rounds": 2},
    "full": {"texts": 60_000, "clusters": 64, "rounds": 5},
}
OURS = "this package"
SENTENCE_ENDS = re.compile(r"\n+|(?<=[.!?]) ")
SHORTEST = 20  # characters; shorter sentences are ignored

CASES = Cases()
Vectors = NDArray[np.float32]


def read_texts(data: Path, count: int) -> list[str]:
    """Return `count` random distinct prompts, responses and sentences of the mixture (None: all)."""
    texts = [row[column] for row in read_mixture(data) for column in ("prompt", "completion")]
    sentences = (sentence.strip() for text in texts for sentence in SENTENCE_ENDS.split(text))
    distinct = list(dict.fromkeys([*texts, *(each for each in sentences if len(each) >= SHORTEST)]))
    chosen = np.random.default_rng(0).permutation(len(distinct))[:count]
    return [distinct[number] for number in chosen]


@CASES(OURS)
def ours(embeddings: Vectors, clusters: int, seed: int) -> Vectors:
    grouper = EmbeddingGrouper(model=encoder(), num_groups=clusters, seed=seed)
    return grouper.cluster(embeddings, np.ones(len(embeddings), dtype=np.int64))


def scikit_learn(kind: Any, sample: int | None = None, **options: Any) -> Callable[[Vectors, int, int], Vectors]:
    """Return a fit to all rows, or to a random sample of them."""

    def fit(embeddings: Vectors, clusters: int, seed: int) -> Vectors:
        if sample is not None:
            embeddings = embeddings[np.random.default_rng(seed).permutation(len(embeddings))[:sample]]
        return kind(clusters, random_state=seed, **options).fit(embeddings).cluster_centers_

    return fit


for starts in ("1 start", "3 starts"):
    CASES(f"KMeans, {starts}")(scikit_learn(KMeans, n_init=int(starts[0])))
for sample in (2_500, 10_000, 20_000):
    CASES(f"KMeans of {sample:,} random rows, 1 start", least=sample)(scikit_learn(KMeans, sample, n_init=1))
for batch in (1_024, 4_096, 10_240):
    for starts in ("1 start", "3 starts"):
        CASES(f"MiniBatchKMeans, batches of {batch:,}, {starts}")(
            scikit_learn(MiniBatchKMeans, n_init=int(starts[0]), batch_size=batch)
        )
    CASES(f"MiniBatchKMeans of 20,000 random rows, batches of {batch:,}, 1 start", least=20_000)(
        scikit_learn(MiniBatchKMeans, 20_000, n_init=1, batch_size=batch)
    )


def faiss_fit(embeddings: Vectors, clusters: int, seed: int, **options: Any) -> Vectors:
    import faiss

    kmeans = faiss.Kmeans(embeddings.shape[1], clusters, seed=1 + seed, **options)
    kmeans.train(embeddings)
    return kmeans.centroids


CASES("faiss, 256 rows a cluster (its default)", package="faiss-cpu")(faiss_fit)
CASES("faiss, all rows", package="faiss-cpu")(partial(faiss_fit, max_points_per_centroid=10**9))
CASES("faiss, all rows, spherical", package="faiss-cpu")(
    partial(faiss_fit, max_points_per_centroid=10**9, spherical=True)
)


def timed(
    function: Callable[[Vectors, int, int], Vectors], embeddings: Vectors, clusters: int, seed: int
) -> dict[str, float]:
    start = time.perf_counter()
    centroids = function(embeddings, clusters, seed)
    seconds = time.perf_counter() - start
    centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    nearest = np.concatenate([(part @ centroids.T).argmax(axis=1) for part in np.array_split(embeddings, 64)])
    sizes = np.bincount(nearest, minlength=len(centroids))
    sums = np.zeros_like(centroids, dtype=np.float64)
    np.add.at(sums, nearest, embeddings)
    # The embeddings have length 1, so that the squared distances to the mean follow from the sums.
    inertia = len(embeddings) - float((np.square(sums).sum(axis=1) / np.maximum(sizes, 1)).sum())
    return {"seconds": seconds, "inertia": inertia, "largest": float(sizes.max()), "smallest": float(sizes.min())}


def run(settings: Settings) -> Report:
    texts, clusters = read_texts(settings.data, settings["texts"]), settings["clusters"]
    embeddings = EmbeddingGrouper(model=encoder()).encode(texts)
    functions, skipped = CASES.present(len(texts))
    for function in functions.values():
        function(embeddings[:2_000], clusters, 0)  # one-time setup of the process
    cases = {name: partial(timed, function, embeddings, clusters) for name, function in functions.items()}
    results = medians(paired_rounds(cases, settings["rounds"]), "seconds", OURS)
    best = min(row["inertia"] for row in results.values())
    return Report(
        head={
            "data": f"{len(texts):,} distinct prompts, responses and sentences of GSM8K, CodeAlpaca and APIBench; "
            f"all-MiniLM-L6-v2; {clusters} clusters",
            "figures": f"medians of {settings['rounds']} rounds with another seed each; *inertia*: sum of squared "
            "distances to the means of the clusters, over that of the best case",
        },
        parts=[
            Table(
                heading=f"{clusters} clusters",
                header=["", "seconds", "inertia", "rows of the smallest and the largest cluster"],
                rows=[
                    [
                        name,
                        f"{row['seconds']:.2f}",
                        f"{row['inertia'] / best:.4f}",
                        f"{row['smallest']:,.0f}, {row['largest']:,.0f}",
                    ]
                    for name, row in results.items()
                ],
                skipped=skipped,
                bars={name: row["seconds"] for name, row in results.items()},
                bars_of="seconds",
            )
        ],
        results=results,
        packages=("scikit-learn", "faiss-cpu", "sentence-transformers"),
    )
