"""Metric `embedding`: rows whose text means similar things are a group.

With a reference dataset, the paper's way (section 3.1, "Embedding"): each reference task is the mean of its
examples' embeddings, and a row joins the task whose centroid is nearest by cosine. Without one, the centroids
are those of k-means, which the paper does not use. The encoder is any sentence-transformers model; the paper
names none.

Steps: (1) read the texts once, keeping a hash of each; (2) cut the different texts, in random order, into chunks;
(3) find the centroids, k-means from a sample: the first chunks; (4) encode chunk after chunk, and keep the nearest
centroid of each text. Processes that do the same, such as the ranks of a training run, share the chunks (work.py).

Cost: encoding is all of it, where the device can in bfloat16 (`dtype`), 2 to 3 times as fast on a CPU; equal texts are
encoded once, and 8 bytes a row are held besides the sample. benchmarks/embedding.py has the figures.
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
from commonit_trl.grouping.work import ALONE, Work
from commonit_trl.loading import load_rows
from commonit_trl.rows import Rows

logger = logging.getLogger(__name__)

_CHUNK = 512
"""Texts that a process encodes at a time; more, where there would be over `_MAX_CHUNKS`."""
_MAX_CHUNKS = 1_024
_SAMPLE = 32_768
"""Texts, at least, that k-means is fitted to, where there are as many."""
_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of rows, which are read again when they are needed."""

    rows: Rows
    of: str
    """`prompt`, `response` or `both`."""
    digests: NDArray[np.uint64]
    """(rows,) hashes: equal texts have equal ones."""

    def __getitem__(self, numbers: NDArray[np.int64]) -> list[str]:
        return self.rows.select(numbers).texts(self.of)

    def distinct(self) -> "DistinctTexts":
        _, *parts = np.unique(self.digests, return_index=True, return_inverse=True, return_counts=True)
        return DistinctTexts(*parts)


@dataclass(frozen=True, eq=False)
class DistinctTexts:
    """Equal texts as one."""

    first_rows: NDArray[np.int64]
    """(texts,) the first row that has each text."""
    text_of_row: NDArray[np.int64]
    """(rows,) the number of each row's text."""
    counts: NDArray[np.int64]
    """(texts,) rows that have each text."""


class EmbeddingGrouper(Grouper):
    """Groups by the nearest of some centroids in the embedding space.

    Args:
        model: name or path of a sentence-transformers model.
        text: which text of a row to encode: `prompt`, `response` or `both`; of a reference row, its prompt.
        num_groups: clusters of k-means; not used with a reference.
        reference: hub name or local file of a reference dataset.
        reference_task_column: its task label.
        dtype: the encoder's precision, `float32`, `bfloat16` or `float16`; `auto` is `best_dtype()`.
        seed: of the sample and of k-means.
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
        dtype: str = "auto",
        seed: int = 0,
        min_size: int = 1,
    ) -> None:
        super().__init__(
            model=model,
            text=text,
            num_groups=num_groups,
            reference=reference,
            reference_task_column=reference_task_column,
            dtype=dtype,
            seed=seed,
            min_size=min_size,
        )
        self.centroids: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._reference: tuple[list[str], list[str]] | None = None

    def read(self, rows: Rows) -> Texts:
        of = self.options["text"]
        encoded = (chunk.cast(pa.binary()).to_pylist() for chunk in rows.text_chunks(of))
        digests = map(xxhash.xxh3_64_intdigest, chain.from_iterable(encoded))
        return Texts(rows, of, np.fromiter(digests, dtype=np.uint64, count=len(rows)))

    def hashed(self, values: Texts) -> NDArray[np.uint64]:
        return values.digests

    def fit_values(self, values: Texts) -> None:
        self.fit_assign(values)

    def fit_assign(self, values: Texts, work: Work = ALONE) -> NDArray[np.int64]:
        texts = values.distinct()
        chunks = self._chunks(len(texts.counts))

        def encode(chunk: NDArray[np.int64]) -> NDArray[np.float32]:
            return self._encode(values[texts.first_rows[chunk]])

        def assign(item: tuple[NDArray[np.int64], NDArray[np.float32] | None]) -> NDArray[np.int32]:
            chunk, features = item
            return _nearest_centroid(encode(chunk) if features is None else features, self.centroids)

        with self._encoder_for_now():
            sample: list[NDArray[np.float32]] = []
            if self.options["reference"] is None:
                sampled = chunks[: -(-_SAMPLE // len(chunks[0]))]
                sample = work.map("features", encode, sampled, progress="Encoding texts")
                self._fit_clusters(sample, texts.counts[np.concatenate(sampled)], work)
            else:
                self._fit_reference(work)
            nearest = work.map("groups", assign, [*zip_longest(chunks, sample)], progress="Assigning texts to groups")
            groups = np.empty(len(texts.counts), dtype=np.int64)
            groups[np.concatenate(chunks)] = np.concatenate(nearest)
            if self.options["min_size"] > 1:
                sizes = np.bincount(groups, texts.counts, minlength=len(self.names)).astype(np.int64)
                small = np.flatnonzero(sizes[groups] < self.options["min_size"])  # no others can become homeless
                (features,) = work.map("small groups", encode, [small])
                groups = self._dissolve_small_groups(groups, sizes, texts.counts, small, features)
        return groups[texts.text_of_row]

    def assign_values(self, values: Texts) -> NDArray[np.int64]:
        texts = values.distinct()
        groups = np.empty(len(texts.counts), dtype=np.int64)
        with self._encoder_for_now():
            for chunk in self._chunks(len(groups)):
                groups[chunk] = _nearest_centroid(self._encode(values[texts.first_rows[chunk]]), self.centroids)
        return groups[texts.text_of_row]

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """(texts, dimensions) embeddings of length 1.

        Raises:
            ValueError: when the model cannot be loaded or gives a value that is not finite.
        """
        with self._encoder_for_now():
            return self._encode(texts)

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        if not texts:
            return np.empty((0, 0), dtype=np.float32)
        dtype, model = self._dtype, self._encoder
        reduced = torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32")
        with reduced:
            embeddings = model.encode(texts, show_progress_bar=False, convert_to_numpy=True).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(bad):
            raise ValueError(
                f"commonit_embedding_model={self.options['model']!r} gives NaN or infinite embeddings for "
                f"{len(bad)} of {len(texts)} texts, first for {texts[bad[0]][:60]!r}: use another model, or "
                "commonit_embedding_dtype='float32'."
            )
        return _unit_length(embeddings)

    def identity(self) -> dict[str, Any]:
        identity = super().identity() | {"dtype": self._dtype, "model_files": _model_identity(self.options["model"])}
        if self.options["reference"] is not None:
            identity["reference_rows"] = self._read_reference()
        return identity

    def fitted_numbers(self) -> dict[str, Any]:
        return {"dtype": self._dtype}

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        return {"centroids": self.centroids}

    def restore(self, numbers: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.centroids = arrays["centroids"]
        if self.centroids.ndim != 2 or len(self.centroids) != len(self.names):
            raise ValueError(f"centroids of shape {self.centroids.shape} do not make {len(self.names)} groups")

    @functools.cached_property
    def _dtype(self) -> str:
        return best_dtype() if self.options["dtype"] == "auto" else self.options["dtype"]

    @functools.cached_property
    def _encoder(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(self.options["model"])  # on the GPU of this rank, where there is one
        except Exception as error:  # the hub, the disk or the model's own code: the user needs the option's name
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"commonit_embedding_model={self.options['model']!r} cannot be loaded ({reason}): give the name or "
                "local path of a sentence-transformers model."
            ) from error

    @contextlib.contextmanager
    def _encoder_for_now(self) -> Iterator[None]:
        """Forget the encoder in the end: the memory is the training's."""
        try:
            yield
        finally:
            self.__dict__.pop("_encoder", None)

    def _chunks(self, texts: int) -> list[NDArray[np.int64]]:
        """The numbers of the texts in random order, in pieces: the first of them are a sample."""
        order = np.random.default_rng(self.options["seed"]).permutation(texts)
        size = max(_CHUNK, -(-texts // _MAX_CHUNKS))
        return [order[start : start + size] for start in range(0, texts, size)]

    def _fit_clusters(self, sample: list[NDArray[np.float32]], weights: NDArray[np.int64], work: Work) -> None:
        """Find the centroids of embeddings of which there are as many as `weights` says."""
        asked = self.options["num_groups"]

        def cluster(sample: list[NDArray[np.float32]]) -> NDArray[np.float32]:
            from sklearn.cluster import KMeans

            features = np.concatenate(sample)
            clusters = min(asked, len({hash(row.tobytes()) for row in features}))
            # Of a sample, not in mini-batches of all texts: sooner done, and better (benchmarks/clustering.py).
            model = KMeans(clusters, n_init=1, random_state=self.options["seed"])
            return _unit_length(model.fit(features, sample_weight=weights).cluster_centers_)

        (self.centroids,) = work.map("centroids", cluster, [sample])
        found = len(self.centroids)
        self.names = [f"cluster {number:0{len(str(found - 1))}d}" for number in range(found)]
        if found < asked:
            self.notices.append(f"commonit_num_groups={asked}: only {found} rows differ, so there are as many groups.")

    def _dissolve_small_groups(
        self,
        groups: NDArray[np.int64],
        sizes: NDArray[np.int64],
        counts: NDArray[np.int64],
        small: NDArray[np.int64],
        features: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """One by one, give up the smallest group under the minimum size; its texts join the nearest of the others.

        Args:
            groups: (texts,) groups; `sizes`: (groups,) rows; `counts`: (texts,) rows that have the text.
            small: numbers of the texts in groups under the minimum size; `features`: their embeddings.

        Returns:
            (texts,) the groups, numbered anew.
        """
        kept = np.arange(len(sizes))
        while len(kept) > 1 and sizes[kept].min() < self.options["min_size"]:
            smallest = kept[sizes[kept].argmin()]
            kept = kept[kept != smallest]
            homeless = groups[small] == smallest
            if homeless.any():
                texts = small[homeless]
                groups[texts] = kept[_nearest_centroid(features[homeless], self.centroids[kept])]
                sizes += np.bincount(groups[texts], counts[texts], minlength=len(sizes)).astype(np.int64)
        self.centroids = np.ascontiguousarray(self.centroids[kept])
        self.names = [self.names[number] for number in kept]
        return np.searchsorted(kept, groups)

    def _fit_reference(self, work: Work) -> None:
        """Take the reference's tasks for groups, the mean of their examples' embeddings for centroids."""
        texts, labels = self._read_reference()
        self.names, task_of_row = (part.tolist() for part in np.unique(labels, return_inverse=True))

        def average(texts: list[str]) -> NDArray[np.float32]:
            embeddings = self._encode(texts)
            sums = np.zeros((len(self.names), embeddings.shape[1]), dtype=np.float32)
            np.add.at(sums, task_of_row, embeddings)
            return _unit_length(sums)  # the mean has the same direction as the sum

        (self.centroids,) = work.map("centroids", average, [texts])

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


def best_dtype() -> str:
    """Return the fastest precision of the device that sentence-transformers takes.

    Reduced precision moves rows that lie between two centroids to the other group; benchmarks/dtype.py counts them.

    Returns:
        `bfloat16` where the device computes in it, else `float16` on CUDA devices, else `float32`.
    """
    import torch
    from sentence_transformers.util import get_device_name

    device = torch.device(get_device_name()).type
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu":
        can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.12 cannot say
        return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    return "float32"


def _unit_length(vectors: NDArray[Any]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def _nearest_centroid(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    nearest = np.empty(len(features), dtype=np.int32)
    for low in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(low, low + _ROWS_AT_ONCE)
        nearest[rows] = np.argmax(features[rows] @ centroids.T, axis=1)
    return nearest


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
