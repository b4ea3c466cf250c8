"""`EmbeddingGrouper`: groups by the nearest centroid, of reference tasks or of k-means.

Tests of the encoder use the real MiniLM; the others use a static model whose words are the axes of the space.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sklearn.cluster
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import EmbeddingGrouper, build_grouper, embedding, load_grouper
from commonit_trl.grouping.embedding import best_dtype
from commonit_trl.rows import Rows

WORDS = ["sun", "moon", "star", "cat", "dog", "bird"]
SKY, PETS = ["sun moon", "moon star", "sun star", "star"], ["cat dog", "dog bird", "cat bird", "dog"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def save_static(directory: Path, weights: Any) -> str:
    """A sentence-transformers model that embeds a text as the mean of its words' rows in `weights`."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    module = StaticEmbedding(tokenizer, embedding_weights=np.asarray(weights, dtype=np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(directory))
    return str(directory)


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_static(tmp_path_factory.mktemp("static"), np.eye(1 + len(WORDS)))


def rows_of(texts: list[str | None]) -> Rows:
    return Rows(Dataset.from_dict({"prompt": texts, "completion": ["answer"] * len(texts)}))


def write_reference(path: Path, tasks: dict[str, list[str]], column: str = "task") -> str:
    lines = [{column: task, "text": text} for task, texts in tasks.items() for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


class FromVectors(EmbeddingGrouper):
    """The real grouper with a fake encoder: the text of row i is "i", its embedding `vectors[i]`."""

    def __init__(self, vectors: Any, reference: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(model="none", reference="not a file" if reference else None, **options)
        self.vectors = [*np.asarray(vectors), *(reference or {}).values()]
        if reference:
            self._held["reference"] = [str(len(vectors) + task) for task in range(len(reference))], [*reference]
        self.encoded = 0
        self.group_ids = self.fit_assign(self.read(rows_of([str(row) for row in range(len(vectors))]))).tolist()

    def _encode(self, texts: list[str]) -> Any:
        self.encoded += len(texts)
        return np.array([self.vectors[int(text)] for text in texts], dtype=np.float32)


def by_group(grouper: EmbeddingGrouper, texts: list[str]) -> set[frozenset[str]]:
    group_ids = grouper.assign(rows_of(texts))
    return {frozenset(text for text, group in zip(texts, group_ids) if group == one) for one in group_ids}


# --- the nearest centroid -----------------------------------------------------------------------------------

REFERENCE = {
    "astronomy": ["How far away is the moon?", "Which planet is the largest?", "What is a comet?"],
    "cooking": ["How long do I boil an egg?", "Which spices go into a curry?"],
    "law": ["What is a contract?", "Who decides an appeal?", "What does a judge do?"],
}
QUESTIONS = [
    "How hot is the surface of the sun?",
    "Give me a recipe for bread.",
    "Can a tenant end a lease early?",
    "Is a verbal agreement binding?",
    "Write a poem.",
]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_a_row_joins_the_nearest_reference_task(dtype: str, tolerance: float, minilm: str, tmp_path: Path) -> None:
    reference = write_reference(tmp_path / "reference.jsonl", REFERENCE)
    grouper = EmbeddingGrouper(model=minilm, reference=reference, dtype=dtype)
    group_ids = grouper.fit(rows_of(QUESTIONS)).assign(rows_of(QUESTIONS))

    model = SentenceTransformer(minilm, device="cpu")  # independently: means, then the angle, in float64

    def embed(texts: list[str]) -> Any:
        vectors = np.stack([model.encode(text) for text in texts]).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    names = sorted(REFERENCE)
    centroids = np.stack([embed(REFERENCE[name]).mean(axis=0) for name in names])
    cosines = embed(QUESTIONS) @ centroids.T / np.linalg.norm(centroids, axis=1)
    assert grouper.names == names
    assert group_ids.tolist() == cosines.argmax(axis=1).tolist()
    assert [names[group] for group in group_ids[:3]] == ["astronomy", "cooking", "law"]
    np.testing.assert_allclose(
        grouper.centroids, centroids / np.linalg.norm(centroids, axis=1, keepdims=True), atol=tolerance
    )
    assert grouper.description()["fitted"] == {"dtype": dtype}


@pytest.mark.parametrize(
    "device, can, expected",
    [
        ("cpu", {"avx512_bf16": True}, "bfloat16"),
        ("cpu", {"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ("cpu", {"avx512_bf16": False}, "float32"),
        ("cpu", None, "float32"),  # torch before 2.12
        ("cuda", {"bf16": True}, "bfloat16"),
        ("cuda", {"amx_bf16": True}, "float16"),
        ("mps", {}, "float32"),
    ],
)
def test_auto_precision_depends_on_the_device(
    device: str, can: dict[str, bool] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_transformers.util.get_device_name", lambda: device)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: "bf16" in can or including_emulation
    )
    if can is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert best_dtype() == EmbeddingGrouper(model="any").identity()["dtype"] == expected
    assert EmbeddingGrouper(model="any", dtype="float32").identity()["dtype"] == "float32"


def test_a_centroid_is_the_mean_of_normalised_embeddings(tmp_path: Path) -> None:
    weights = np.eye(7)
    weights[1] *= 100  # the long vector of "sun" must not dominate its centroid
    model = save_static(tmp_path / "model", weights)
    reference = write_reference(tmp_path / "r.jsonl", {"a": ["sun", "moon"], "b": ["cat"]}, "subject")
    grouper = EmbeddingGrouper(model=model, reference=reference, reference_task_column="subject")
    grouper.fit(rows_of(["sun"]))
    half = 0.5**0.5
    np.testing.assert_allclose(grouper.centroids[0][1:3], [half, half], atol=1e-6)
    assert grouper.assign(rows_of(["moon", "sun", "cat"])).tolist() == [0, 0, 1]
    assert grouper.names == ["a", "b"], "a task without rows is kept"


@pytest.mark.parametrize("text, expected", [("prompt", [0, 0]), ("response", [1, 0]), ("both", [1, 0])])
def test_option_text_selects_the_encoded_text(text: str, expected: list[int], static: str, tmp_path: Path) -> None:
    reference = write_reference(tmp_path / "r.jsonl", {"a": ["sun"], "b": ["cat"]})
    rows = Rows(Dataset.from_dict({"prompt": ["sun", "sun"], "completion": ["cat cat", "moon"]}))
    grouper = EmbeddingGrouper(model=static, text=text, reference=reference).fit(rows)
    # With `both`, "cat" occurs twice and "sun" once; the response "moon" is equally far from both.
    assert grouper.assign(rows).tolist() == expected


def test_prompts_of_the_reference_are_encoded(static: str, tmp_path: Path) -> None:
    lines = [{"task": "a", "prompt": "sun", "completion": "cat"}, {"task": "b", "prompt": "cat", "completion": "sun"}]
    reference = tmp_path / "r.jsonl"
    reference.write_text("\n".join(map(json.dumps, lines)))
    grouper = EmbeddingGrouper(model=static, text="response", reference=str(reference))
    rows = Rows(Dataset.from_dict({"prompt": ["moon"] * 2, "completion": ["sun", "cat"]}))
    assert grouper.fit(rows).assign(rows).tolist() == [0, 1]


@pytest.mark.parametrize("splits, read", [(["test", "train"], "train"), (["dev", "test"], "dev")])
def test_the_reference_is_split_train_or_else_the_first(
    splits: list[str], read: str, static: str, tmp_path: Path
) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([{'config_name': 'all', 'data_files': files}])}\n---")
    for split in splits:
        write_reference(folder / f"{split}.jsonl", {split: ["sun"]})
    assert EmbeddingGrouper(model=static, reference=str(folder)).fit(rows_of(["sun"])).names == [read]


# --- k-means ------------------------------------------------------------------------------------------------


def test_k_means_is_reproducible_and_separates_clusters(static: str) -> None:
    groupers = [EmbeddingGrouper(model=static, num_groups=2, seed=5).fit(rows_of(SKY + PETS)) for _ in range(2)]
    assert by_group(groupers[0], SKY + PETS) == {frozenset(SKY), frozenset(PETS)}
    assert groupers[0].names == ["cluster 0", "cluster 1"] and not groupers[0].notices
    np.testing.assert_array_equal(groupers[0].centroids, groupers[1].centroids)
    assert FromVectors(np.eye(40)).names == [f"cluster {number:02d}" for number in range(32)]


def test_k_means_depends_on_the_seed() -> None:
    features = np.random.default_rng(0).normal(size=(20, 8))
    found = [FromVectors(features, num_groups=4, seed=seed).group_ids for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_k_means_fits_a_random_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, fit = [], sklearn.cluster.KMeans.fit

    def record(self: Any, features: Any, **kwargs: Any) -> Any:
        fitted.append(len(features))
        return fit(self, features, **kwargs)

    monkeypatch.setattr(embedding, "_SAMPLE", 1_500)
    monkeypatch.setattr(sklearn.cluster.KMeans, "fit", record)
    rng = np.random.default_rng(0)
    blob = np.sort(rng.integers(0, 5, size=10_000))  # the first rows are all of one kind
    grouper = FromVectors(np.eye(8)[blob] + rng.normal(scale=0.02, size=(10_000, 8)), num_groups=5)
    pairs = set(zip(blob.tolist(), grouper.group_ids))
    assert len(pairs) == len({group for _, group in pairs}) == 5
    assert fitted == [1_536]  # three chunks of 512
    assert grouper.encoded == 10_000, "texts of the sample are encoded once"


def test_a_text_is_weighted_by_its_rows(static: str) -> None:
    grouper = EmbeddingGrouper(model=static, num_groups=1).fit(rows_of(["sun"] * 3 + ["cat"]))
    (centroid,) = grouper.centroids
    assert sorted(centroid[centroid != 0].tolist()) == pytest.approx([1 / 10**0.5, 3 / 10**0.5], rel=1e-3)


def test_fewer_distinct_embeddings_than_clusters_is_a_warning(static: str, caplog: Any) -> None:
    texts = ["sun"] * 5 + ["cat"] * 5 + ["cat cat"]
    grouper = EmbeddingGrouper(model=static, num_groups=8).fit(rows_of(texts))
    assert "commonit_num_groups=8: only 2 distinct embeddings" in caplog.text
    assert by_group(grouper, texts) == {frozenset(["sun"]), frozenset(["cat", "cat cat"])}
    assert len(grouper.names) == 2


# --- the minimum size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_size", [1, 2, 5, 40, 101])
def test_small_groups_dissolve_into_the_nearest(seed: int, min_size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(embedding, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(seed)
    features, centroids = (rng.normal(size=(size, 4)).astype(np.float32) for size in (100, 12))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    names = [f"task {number:02d}" for number in range(12)]
    grouper = FromVectors(features, reference=dict(zip(names, centroids)), min_size=min_size)

    kept = list(range(12))
    while True:
        nearest = [max(kept, key=lambda one: features[row] @ centroids[one]) for row in range(100)]
        sizes = [nearest.count(one) for one in kept]
        if len(kept) == 1 or min(sizes) >= min_size or min_size == 1:  # empty reference tasks stay
            break
        del kept[sizes.index(min(sizes))]
    assert grouper.names == [names[one] for one in kept]
    assert [grouper.names[group] for group in grouper.group_ids] == [names[one] for one in nearest]


def test_group_sizes_count_rows_not_texts(static: str, tmp_path: Path) -> None:
    """One text in four rows makes a task of four; a dissolved group adds its rows to the next."""
    reference = write_reference(tmp_path / "r.jsonl", {"a": ["sun"], "b": ["cat"], "c": ["cat cat dog"], "d": ["bird"]})
    grouper = EmbeddingGrouper(model=static, reference=reference, min_size=4)
    rows = rows_of(["sun"] * 4 + ["cat"] * 2 + ["cat dog"] * 2 + ["bird"])
    assert grouper.fit_assign(grouper.read(rows))[:8].tolist() == [0] * 4 + [1] * 4
    assert grouper.names == ["a", "c"]


# --- encoding -----------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of the real `SentenceTransformer.encode`, in order."""
    calls: list[list[str]] = []
    encode = SentenceTransformer.encode

    def record(self: Any, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.append(list(texts))
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", record)
    return calls


def test_equal_texts_are_encoded_once(static: str, encoded: list[list[str]]) -> None:
    grouper = EmbeddingGrouper(model=static, num_groups=3)
    for times in (1, 2):
        group_ids = (grouper.fit_assign if times == 1 else grouper.assign_values)(
            grouper.read(rows_of(["sun", "cat", "sun", "sun", "moon", "cat"]))
        )
        assert group_ids[0] == group_ids[2] == group_ids[3] and group_ids[1] == group_ids[5]
        assert len(set(group_ids)) == 3
        assert [sorted(call) for call in encoded] == [["cat", "moon", "sun"]] * times


def test_embeddings_are_normalised(static: str) -> None:
    features = EmbeddingGrouper(model=static).encode(["sun", "sun cat"])
    np.testing.assert_allclose(features[:, [1, 4]], [[1, 0], [0.5**0.5, 0.5**0.5]], atol=1e-3)
    assert features.dtype == np.float32
    nothing = EmbeddingGrouper(model="not needed").encode([])
    assert nothing.shape == (0, 0) and nothing.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_encoder_runs_in_the_given_precision(dtype: str, static: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precisions, encode = [], SentenceTransformer.encode

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        reduced = torch.is_autocast_enabled(self.device.type)
        precisions.append(torch.get_autocast_dtype(self.device.type) if reduced else torch.float32)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", record)
    EmbeddingGrouper(model=static, dtype=dtype).encode(["sun"])
    assert precisions == [getattr(torch, dtype)]


def test_rows_without_text_are_assigned(static: str, minilm: str) -> None:
    texts = ["sun", "", None, "cat"]
    for model in (static, minilm):
        grouper = EmbeddingGrouper(model=model, num_groups=2).fit(rows_of(texts))
        group_ids = grouper.assign(rows_of(texts))
        assert set(group_ids) <= {0, 1} and group_ids[1] == group_ids[2]
    assert grouper.assign(rows_of([])).tolist() == []


# --- errors -------------------------------------------------------------------------------------------------


def refusal(grouper: EmbeddingGrouper, texts: list[str] = ["sun", "cat"]) -> str:  # noqa: B006
    with pytest.raises(ValueError) as caught:
        grouper.fit(rows_of(texts))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_an_error(bad: float, tmp_path: Path) -> None:
    weights = np.eye(7)
    weights[4] = bad
    model, text = save_static(tmp_path / "model", weights), "cat " * 20
    message = refusal(EmbeddingGrouper(model=model), ["sun", text, text, "dog"])
    assert message.startswith(f"commonit_embedding_model={model!r}: ")
    assert f"1 of 3 texts, first for {text[:60]!r}" in message and "commonit_embedding_dtype='float32'" in message
    reference = write_reference(tmp_path / "r.jsonl", {"a": ["cat"], "b": ["sun"]})
    assert "1 of 2 texts, first for 'cat'" in refusal(EmbeddingGrouper(model=model, reference=reference), ["sun"])


@pytest.mark.parametrize("broken", ["no/such-model", "not a name!", "empty directory", "file", "truncated weights"])
def test_an_unloadable_model_is_an_error(broken: str, static: str, tmp_path: Path) -> None:
    model = broken if broken in ("no/such-model", "not a name!") else str(tmp_path / "model")
    if broken == "empty directory":
        Path(model).mkdir()
    elif broken == "file":
        Path(model).write_text("weights")
    elif broken == "truncated weights":
        shutil.copytree(static, model)
        (Path(model) / "model.safetensors").write_bytes(b"\x00" * 20)
    grouper = EmbeddingGrouper(model=model)
    grouper.identity()  # leaves the error to the loader
    message = refusal(grouper)
    assert message.startswith(f"commonit_embedding_model={model!r}: ") and "sentence-transformers" in message


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "FileNotFoundError"),
        ("", ".jsonl, .parquet"),
        ('{"task": "a"}', "No text found in the rows"),
        ('{"subject": "a", "text": "x"}', "commonit_reference_task_column='task': not a column"),
        ('{"subject": "a", "text": "x"}', "one of: subject, text."),
        ('{"task": "a", "text": "x"}\n{"task": null, "text": "x"}', "1 of 2 rows have no 'task'. Label or remove"),
    ],
)
def test_an_unusable_reference_is_an_error(content: Any, says: str, static: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    if content is not None:
        path.write_text(content)
    message = refusal(EmbeddingGrouper(model=static, reference=str(path)))
    assert f"commonit_reference_dataset={str(path)!r}" in message and says in message


# --- saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_groups": 2}, {"num_groups": 4, "min_size": 2}, {"reference": True}])
def test_a_saved_grouper_assigns_like_the_fitted_one(options: dict[str, Any], static: str, tmp_path: Path) -> None:
    if "reference" in options:
        options = {"reference": write_reference(tmp_path / "r.jsonl", {"a": ["sun"], "b": ["cat"], "c": ["dog"]})}
    grouper = EmbeddingGrouper(model=static, **options).fit(rows_of(SKY + PETS))
    grouper.save(tmp_path / "saved")
    (tmp_path / "r.jsonl").unlink(missing_ok=True)  # a loaded grouper needs no reference
    loaded = load_grouper(tmp_path / "saved")
    assert type(loaded) is EmbeddingGrouper and loaded.description() == grouper.description()
    assert grouper.description()["fitted"] == {"dtype": best_dtype()}
    new = [*SKY, *PETS, "bird", "", "unknown words"]
    assert loaded.assign(rows_of(new)).tolist() == grouper.assign(rows_of(new)).tolist()


def test_build_grouper_passes_the_options() -> None:
    def built(seed: int = 0, **given: Any) -> dict[str, Any]:
        options = {f"commonit_{name}": value for name, value in given.items()}
        return build_grouper(CommonITArguments(commonit_metric="embedding", **options), ["text"], seed).options

    model = "sentence-transformers/all-MiniLM-L6-v2"
    default = EmbeddingGrouper(model=model, num_groups=32).options
    assert built() == default
    assert built(num_groups=4, seed=3) == default | {"num_groups": 4, "seed": 3}
    given = {"embedding_model": "m", "embedding_text": "both", "embedding_dtype": "float32", "min_group_size": 7}
    given |= {"reference_dataset": "r.csv", "reference_task_column": "subject"}
    expected = {"model": "m", "text": "both", "dtype": "float32", "reference": "r.csv", "min_size": 7}
    assert built(**given) == default | expected | {"reference_task_column": "subject"}
