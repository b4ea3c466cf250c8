"""Metric `embedding`: rows whose text means similar things are a group.

With a reference dataset, the paper's way (section 3.1, "Embedding"): each reference task is the mean of its
examples' embeddings, and a row joins the task whose centroid is nearest by cosine. Without one, the centroids
are those of k-means, which the paper does not use. The encoder is any sentence-transformers model; the paper
names none.

Cost: encoding is all of it, about 100 to 300 short texts a second on two CPU cores with MiniLM; equal texts
are encoded once, in batches sorted by length. k-means of 50,000 rows or more is done in mini-batches.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.base import Grouper
from commonit_trl.loading import load_rows
from commonit_trl.text import Rows

logger = logging.getLogger(__name__)

_MINI_BATCH_FROM = 50_000
_ROWS_AT_ONCE = 4_096


class EmbeddingGrouper(Grouper):
    """Groups by the nearest of some centroids in the embedding space.

    Args:
        model: name or path of a sentence-transformers model.
        text: which text of a row to encode: `prompt`, `response` or `both`; of a reference row, its prompt.
        num_groups: clusters of k-means; not used with a reference.
        reference: hub name or local file of a reference dataset.
        reference_task_column: its task label.
        seed: of k-means.
        min_size: groups with fewer rows dissolve; their rows join the nearest other centroid.
    """

    metric = "embedding"

    def __init__(
        self,
        *,
        model: str,
        text: str = "prompt",
        num_groups: int = DEFAULT_NUM_GROUPS["embedding"],
        reference: str | None = None,
        reference_task_column: str = "task",
        seed: int = 0,
        min_size: int = 1,
    ) -> None:
        super().__init__(
            model=model,
            text=text,
            num_groups=num_groups,
            reference=reference,
            reference_task_column=reference_task_column,
            seed=seed,
            min_size=min_size,
        )
        self.centroids: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._reference: tuple[list[str], list[str]] | None = None

    def read(self, rows: Rows) -> list[str]:
        return rows.texts(self.options["text"])

    def measure(self, values: list[str]) -> NDArray[np.float32]:
        return encode(values, self.options["model"])

    def fit_features(self, features: NDArray[np.float32]) -> None:
        if self.options["reference"] is not None:
            names, centroids = self._reference_centroids()
        else:
            centroids = self._cluster(features)
            digits = len(str(len(centroids) - 1))
            names = [f"cluster {number:0{digits}d}" for number in range(len(centroids))]
        kept = _dissolve_small_groups(features, centroids, self.options["min_size"])
        self.centroids = np.ascontiguousarray(centroids[kept])
        self.names = [names[number] for number in kept]

    def assign_features(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        return _nearest_centroid(features, self.centroids)

    def identity(self) -> dict[str, Any]:
        identity = super().identity() | {"model_files": _model_identity(self.options["model"])}
        if self.options["reference"] is not None:
            identity["reference_rows"] = self._read_reference()
        return identity

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        return {"centroids": self.centroids}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.centroids = arrays["centroids"]
        if self.centroids.ndim != 2 or len(self.centroids) != len(self.names):
            raise ValueError(f"centroids of shape {self.centroids.shape} do not make {len(self.names)} groups")

    def _cluster(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        from sklearn.cluster import KMeans, MiniBatchKMeans

        asked = self.options["num_groups"]
        clusters = min(asked, len({hash(row.tobytes()) for row in features}))
        if clusters < asked:
            self.notices.append(
                f"commonit_num_groups={asked}: only {clusters} rows differ, so there are as many groups."
            )
        if len(features) < _MINI_BATCH_FROM:
            model = KMeans(clusters, n_init=3, random_state=self.options["seed"])
        else:
            model = MiniBatchKMeans(clusters, n_init=3, batch_size=4_096, random_state=self.options["seed"])
        return _unit_length(model.fit(features).cluster_centers_)

    def _reference_centroids(self) -> tuple[list[str], NDArray[np.float32]]:
        texts, labels = self._read_reference()
        embeddings = encode(texts, self.options["model"])
        names, task_of_row = np.unique(labels, return_inverse=True)
        sums = np.zeros((len(names), embeddings.shape[1]), dtype=np.float32)
        np.add.at(sums, task_of_row, embeddings)
        return names.tolist(), _unit_length(sums)  # the mean has the same direction as the sum

    def _read_reference(self) -> tuple[list[str], list[str]]:
        if self._reference is None:
            name, column = self.options["reference"], self.options["reference_task_column"]
            splits = load_rows("commonit_reference_dataset", name)
            rows = Rows(splits["train"] if "train" in splits else splits[next(iter(splits))])
            if column not in rows.columns:
                raise ValueError(
                    f"commonit_reference_task_column={column!r} is not a column of "
                    f"commonit_reference_dataset={name!r}, which has: {', '.join(rows.columns)}."
                )
            labels = rows.labels([column])
            try:
                texts = rows.texts("prompt")
            except ValueError as error:
                raise ValueError(f"commonit_reference_dataset={name!r}: {error}") from error
            if None in labels:
                raise ValueError(
                    f"commonit_reference_dataset={name!r}: {labels.count(None)} of {len(labels)} rows have "
                    f"no {column!r}: label or remove them."
                )
            self._reference = texts, [label for label in labels if label is not None]
        return self._reference


def encode(texts: list[str], model_name: str) -> NDArray[np.float32]:
    """(texts, dimensions) embeddings of length 1, each distinct text encoded once.

    Raises:
        ValueError: when the model cannot be loaded or gives a value that is not finite.
    """
    from sentence_transformers import SentenceTransformer

    if not texts:
        return np.empty((0, 0), dtype=np.float32)
    try:
        model = SentenceTransformer(model_name)
    except Exception as error:  # the hub, the disk or the model's own code: the user needs the option's name
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"commonit_embedding_model={model_name!r} cannot be loaded ({reason}): give the name or local path of a "
            "sentence-transformers model."
        ) from error
    distinct = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(distinct)}
    # encode() sorts by length, picks the GPU when there is one and shows the bar.
    embeddings = model.encode(distinct, show_progress_bar=True, convert_to_numpy=True).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ValueError(
            f"commonit_embedding_model={model_name!r} gives NaN or infinite embeddings for {len(bad)} of "
            f"{len(distinct)} texts, first for {distinct[bad[0]][:60]!r}: use another model."
        )
    return _unit_length(embeddings)[[place[text] for text in texts]]


def _unit_length(vectors: NDArray[Any]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def _nearest_centroid(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    nearest = np.empty(len(features), dtype=np.int64)
    for low in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(low, low + _ROWS_AT_ONCE)
        nearest[rows] = np.argmax(features[rows] @ centroids.T, axis=1)
    return nearest


def _dissolve_small_groups(
    features: NDArray[np.float32], centroids: NDArray[np.float32], min_size: int
) -> NDArray[np.int64]:
    """Numbers of the centroids that are left when, one by one, the smallest group below `min_size` goes."""
    kept = np.arange(len(centroids))
    nearest = _nearest_centroid(features, centroids) if min_size > 1 else kept
    while min_size > 1 and len(kept) > 1:
        sizes = np.bincount(nearest, minlength=len(centroids))[kept]
        if sizes.min() >= min_size:
            break
        homeless = nearest == kept[sizes.argmin()]
        kept = np.delete(kept, sizes.argmin())
        nearest[homeless] = kept[_nearest_centroid(features[homeless], centroids[kept])]
    return kept


def _model_identity(name: str) -> list[Any]:
    """What tells one version of an encoder from another: a local model's files, or a hub model's revision."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    for file_name in ("modules.json", "config.json"):  # of a sentence-transformers model, of a plain one
        try:
            return [Path(hf_hub_download(name, file_name)).parent.name]  # snapshots/<revision>/<file>
        except (OSError, ValueError, EntryNotFoundError):  # loading the model will say what is wrong
            continue
    return []
