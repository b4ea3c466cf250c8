"""Metric `embedding`: texts of similar meaning form a group.

With a reference dataset, as in the paper (section 3.1, "Embedding"): the centroid of a reference task is the mean
embedding of its examples, and a row joins the task with the nearest centroid by cosine. Without one, the centroids come
from k-means, which the paper does not use. The encoder is any sentence-transformers model; the paper names none.

Steps: (1) hash each text; (2) cut the distinct texts, in random order, into chunks; (3) fit the centroids, k-means to a
sample: the first chunks; (4) encode chunk by chunk and keep only the nearest centroid of each text. The ranks of a run
encode every W-th chunk each, so the groups do not depend on the number of ranks.

Cost: almost only encoding, in bfloat16 where the device supports it (`dtype`), 2 to 3 times as fast on a CPU. Equal
texts are encoded once; memory is 8 bytes a row besides the sample. benchmarks/embedding.py has the figures. With
`column`, vectors that were computed elsewhere take the encoder's place.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from commonit_trl.config import DEFAULT_NUM_GROUPS
from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.ranks import ALONE, Ranks
from commonit_trl.loading import load_rows
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

_CHUNK = 512
"""Texts that a rank encodes between two collectives."""
_SAMPLE = 32_768
"""Texts to fit k-means to, rounded up to whole chunks."""
_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True, eq=False)
class HashedRows:
    """Rows whose texts or vectors are read again whenever they are needed."""

    rows: Rows
    digests: NDArray[np.uint64]
    """(rows,) hashes of the texts or vectors."""


class EmbeddingGrouper(Grouper):
    """Groups by the nearest centroid in the embedding space.

    Args:
        model: name or path of a sentence-transformers model.
        column: name of a column of vectors, instead of the model.
        text: text of a row to encode, `prompt`, `response` or `both`; of a reference row, always the prompt.
        num_groups: clusters of k-means; unused with a reference.
        reference: hub name or local file of a reference dataset.
        reference_task_column: label column of the reference dataset.
        dtype: the encoder's precision, `float32`, `bfloat16` or `float16`; `auto` is `best_dtype()`.
        seed: of the sample and k-means.
        min_size: groups with fewer rows dissolve; their rows join the nearest remaining centroid.
    """

    metric = "embedding"

    def __init__(
        self,
        *,
        model: str,
        column: str | None = None,
        text: str = "prompt",
        num_groups: int = DEFAULT_NUM_GROUPS["embedding"],
        reference: str | None = None,
        reference_task_column: str = "task",
        dtype: str = "auto",
        seed: int = 0,
        min_size: int = 1,
    ) -> None:
        super().__init__(
            model=model,
            column=column,
            text=text,
            num_groups=num_groups,
            reference=reference,
            reference_task_column=reference_task_column,
            dtype=dtype,
            seed=seed,
            min_size=min_size,
        )
        self.centroids: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._held: dict[str, Any] = {}  # the encoder and the reference's embeddings, shared by copies

    def read(self, rows: Rows) -> HashedRows:
        column = self.options["column"]
        if column is None:
            encoded = (chunk.cast(pa.binary()).to_pylist() for chunk in rows.text_chunks(self.options["text"]))
            items: Iterator[bytes] = chain.from_iterable(encoded)
        else:
            items = (vector.tobytes() for chunk in rows.vector_chunks(column) for vector in chunk)
        return HashedRows(rows, np.fromiter(map(xxhash.xxh3_64_intdigest, items), dtype=np.uint64, count=len(rows)))

    def hashed(self, values: HashedRows) -> NDArray[np.uint64]:
        return values.digests

    def subset(self, values: HashedRows, numbers: NDArray[np.int64]) -> HashedRows:
        return HashedRows(values.rows.select(numbers), values.digests[numbers])

    def fit_values(self, values: HashedRows) -> None:
        self.fit_assign(values)

    def fit_assign(self, values: HashedRows, ranks: Ranks = ALONE) -> NDArray[np.int64]:
        _, first_rows, text_of_row, counts = np.unique(values.digests, True, True, True)
        chunks = self._chunks(len(counts))

        def encode(chunk: NDArray[np.int64]) -> NDArray[np.float32]:
            return self._embed(values, first_rows[chunk])

        def assign(item: tuple[NDArray[np.int64], NDArray[np.float32] | None]) -> NDArray[np.int32]:
            chunk, features = item
            return _nearest_centroid(encode(chunk) if features is None else features, self.centroids)

        with self.resources():
            sample: list[NDArray[np.float32]] = []
            if self.options["reference"] is None:
                sampled = chunks[: -(-_SAMPLE // _CHUNK)]
                sample = ranks.map(encode, sampled, self._progress("Encoding texts"))
                weights = counts[np.concatenate(sampled)]
                self._set_clusters(ranks.broadcast(lambda: self.cluster(np.concatenate(sample), weights)))
            else:
                self._fit_reference(ranks)
            nearest = ranks.map(assign, [*zip_longest(chunks, sample)], self._progress("Assigning texts to groups"))
            groups = np.empty(len(counts), dtype=np.int64)
            groups[np.concatenate(chunks)] = np.concatenate(nearest)
            if self.options["min_size"] > 1:
                sizes = np.bincount(groups, counts, minlength=len(self.names)).astype(np.int64)
                small = np.flatnonzero(sizes[groups] < self.options["min_size"])  # only these can change groups
                if len(small):
                    features = np.concatenate(ranks.map(encode, _cut(small)))
                    groups = self._dissolve_small_groups(groups, sizes, counts, small, features)
        return groups[text_of_row]

    def assign_values(self, values: HashedRows) -> NDArray[np.int64]:
        _, first_rows, text_of_row = np.unique(values.digests, return_index=True, return_inverse=True)
        groups = np.empty(len(first_rows), dtype=np.int64)
        with self.resources():
            for chunk in self._chunks(len(groups)):
                groups[chunk] = _nearest_centroid(self._embed(values, first_rows[chunk]), self.centroids)
        return groups[text_of_row]

    def _embed(self, values: HashedRows, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the (rows, dimensions) embeddings of the rows with these numbers."""
        return self._encode(self._items(values.rows.select(numbers), self.options["text"]))

    def _items(self, rows: Rows, of: str) -> list[str] | NDArray[np.float32]:
        """Return the texts of rows, or their vectors."""
        column = self.options["column"]
        return rows.texts(of) if column is None else np.concatenate([*rows.vector_chunks(column)])

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Return (texts, dimensions) embeddings of length 1.

        Raises:
            ValueError: when the model cannot be loaded or returns NaN or infinite values.
        """
        with self.resources():
            return self._encode(texts)

    def _encode(self, texts: list[str] | NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        if not len(texts):
            return np.empty((0, 0), dtype=np.float32)
        if isinstance(texts, np.ndarray):
            if not np.isfinite(texts).all():
                raise ValueError(f"commonit_embedding_column={self.options['column']!r}: NaN or infinite values.")
            return _unit_length(texts)
        dtype, model = self._dtype, self._encoder
        reduced = torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32")
        with reduced:
            embeddings = model.encode(texts, show_progress_bar=False, convert_to_numpy=True).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(bad):
            raise ValueError(
                f"commonit_embedding_model={self.options['model']!r}: NaN or infinite embeddings for {len(bad)} of "
                f"{len(texts)} texts, first for {texts[bad[0]][:60]!r}. Use another model or set "
                "commonit_embedding_dtype='float32'."
            )
        return _unit_length(embeddings)

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        if self.options["column"] is None:
            identity |= {"dtype": self._dtype, "model_files": _model_identity(self.options["model"])}
        if self.options["reference"] is not None:
            texts, labels = self._read_reference()
            hashed = texts if isinstance(texts, list) else xxhash.xxh3_64_hexdigest(texts.tobytes())
            identity["reference_rows"] = hashed, labels
        return identity

    def fitted_numbers(self) -> dict[str, Any]:
        return {} if self.options["column"] is not None else {"dtype": self._dtype}

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        return {"centroids": self.centroids}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.centroids = arrays["centroids"]
        if self.centroids.ndim != 2 or len(self.centroids) != len(self.names):
            raise ValueError(f"centroids of shape {self.centroids.shape} do not make {len(self.names)} groups")

    @functools.cached_property
    def _dtype(self) -> str:
        return best_dtype() if self.options["dtype"] == "auto" else self.options["dtype"]

    @property
    def _encoder(self) -> Any:
        if "encoder" not in self._held:
            self._held["encoder"] = self._load_encoder()
        return self._held["encoder"]

    def _load_encoder(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(self.options["model"])  # on the GPU with index LOCAL_RANK, if any
        except Exception as error:  # from the hub, the disk or the model's own code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"commonit_embedding_model={self.options['model']!r}: loading failed ({reason}). Set it to the name or "
                "local path of a sentence-transformers model."
            ) from error

    @contextlib.contextmanager
    def resources(self) -> Iterator[None]:
        """Keep the encoder, once it is loaded, until the outermost use ends: training needs the memory."""
        outermost = not self._held.get("used")
        self._held["used"] = True
        try:
            yield
        finally:
            if outermost:
                self._held.pop("encoder", None)
                self._held["used"] = False

    def coordinates(self) -> NDArray[np.float32]:
        return self.centroids

    def _progress(self, description: str) -> str | None:
        return description if self.options["column"] is None else None  # reading vectors takes no time

    def _chunks(self, texts: int) -> list[NDArray[np.int64]]:
        """Cut the texts, in random order, into chunks; the first chunks are a random sample."""
        return _cut(np.random.default_rng(self.options["seed"]).permutation(texts))

    def cluster(self, features: NDArray[np.float32], weights: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the (clusters, dimensions) k-means centroids of (texts, dimensions) features with (texts,) weights."""
        from sklearn.cluster import KMeans

        clusters = min(self.options["num_groups"], len({hash(row.tobytes()) for row in features}))
        # Faster and better on a sample than mini-batches of all texts (benchmarks/clustering.py).
        model = KMeans(clusters, n_init=1, random_state=self.options["seed"])
        return _unit_length(model.fit(features, sample_weight=weights).cluster_centers_)

    def _set_clusters(self, centroids: NDArray[np.float32]) -> None:
        self.centroids, found, asked = centroids, len(centroids), self.options["num_groups"]
        self.names = [f"cluster {number:0{len(str(found - 1))}d}" for number in range(found)]
        if found < asked:
            self.notices.append(
                f"commonit_num_groups={asked}: only {found} distinct embeddings, so there are {found} groups."
            )

    def _dissolve_small_groups(
        self,
        groups: NDArray[np.int64],
        sizes: NDArray[np.int64],
        counts: NDArray[np.int64],
        small: NDArray[np.int64],
        features: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Dissolve the smallest group, until all have the minimum size; its texts join the nearest remaining group.

        Args:
            groups: (texts,) group ids.
            sizes: (groups,) number of rows.
            counts: (texts,) number of rows with the text.
            small: indices of the texts in groups under the minimum size.
            features: (small, dimensions) their embeddings.

        Returns:
            (texts,) ids of the remaining groups, renumbered.
        """
        kept = np.arange(len(sizes))
        while len(kept) > 1 and sizes[kept].min() < self.options["min_size"]:
            smallest = kept[sizes[kept].argmin()]
            kept = kept[kept != smallest]
            moving = groups[small] == smallest
            if moving.any():
                texts = small[moving]
                groups[texts] = kept[_nearest_centroid(features[moving], self.centroids[kept])]
                sizes += np.bincount(groups[texts], counts[texts], minlength=len(sizes)).astype(np.int64)
        self.centroids = np.ascontiguousarray(self.centroids[kept])
        self.names = [self.names[number] for number in kept]
        return np.searchsorted(kept, groups)

    def _fit_reference(self, ranks: Ranks) -> None:
        """Set one group per reference task, its centroid the mean embedding of the task's examples."""
        texts, labels = ranks.broadcast(self._read_reference)
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
        if "reference embeddings" not in self._held:
            self._held["reference embeddings"] = np.concatenate(ranks.map(self._encode, chunks))
        embeddings = self._held["reference embeddings"]
        self.names, task_of_row = (part.tolist() for part in np.unique(labels, return_inverse=True))
        sums = np.zeros((len(self.names), embeddings.shape[1]), dtype=np.float32)
        np.add.at(sums, task_of_row, embeddings)
        self.centroids = _unit_length(sums)  # the mean has the direction of the sum

    def _read_reference(self) -> tuple[list[str] | NDArray[np.float32], list[str]]:
        if "reference" not in self._held:
            name, column = self.options["reference"], self.options["reference_task_column"]
            splits = load_rows("commonit_reference_dataset", name)
            rows = Rows(splits["train"] if "train" in splits else splits[next(iter(splits))])
            if column not in rows.columns:
                raise ValueError(
                    f"commonit_reference_task_column={column!r}: not a column of commonit_reference_dataset={name!r}. "
                    f"Set it to one of: {', '.join(rows.columns)}."
                )
            labels = rows.labels([column])
            try:
                texts = self._items(rows, "prompt")
            except ValueError as error:
                raise ValueError(f"commonit_reference_dataset={name!r}: {error}") from error
            if None in labels:
                raise ValueError(
                    f"commonit_reference_dataset={name!r}: {labels.count(None)} of {len(labels)} rows have no "
                    f"{column!r}. Label or remove them."
                )
            self._held["reference"] = texts, [label for label in labels if label is not None]
        return self._held["reference"]


def best_dtype() -> str:
    """Return the fastest suitable precision of the encoder's device.

    Reduced precision moves rows that lie between two centroids to the other group; benchmarks/dtype.py counts them.

    Returns:
        bfloat16 where the device computes in it, else float16 on CUDA devices, else float32.
    """
    import torch
    from sentence_transformers.util import get_device_name

    device = torch.device(get_device_name()).type
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu":
        can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing before torch 2.12
        return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    return "float32"


def _unit_length(vectors: NDArray[Any]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def _cut(numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _nearest_centroid(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    nearest = np.empty(len(features), dtype=np.int32)
    for low in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(low, low + _ROWS_AT_ONCE)
        nearest[rows] = np.argmax(features[rows] @ centroids.T, axis=1)
    return nearest


def _model_identity(name: str) -> list[Any]:
    """Return the version of an encoder: sizes and dates of a local model's files, or a hub model's revision."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    for file_name in ("modules.json", "config.json"):  # of a sentence-transformers model, of a plain transformers model
        try:
            return [Path(hf_hub_download(name, file_name)).parent.name]  # snapshots/<revision>/<file>
        except (OSError, ValueError, EntryNotFoundError):  # loading the model raises the error
            continue
    return []
