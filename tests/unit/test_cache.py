"""The cache of groups, and saved groupers.

1. A second call loads the result and fits nothing; it has the same notices.
2. The fingerprint depends on everything that determines the groups, and on nothing else.
3. A damaged entry is reported and fitted again; a damaged saved grouper is an error that names its path.
4. An unusable directory is an error of one line that names the option.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from datasets import Dataset

from commonit_trl.grouping import (
    EmbeddingGrouper,
    Grouper,
    LengthGrouper,
    TaskGrouper,
    default_cache_dir,
    fit_assign_cached,
    load_grouper,
)
from commonit_trl.grouping.cache import _hash_values, fingerprint
from commonit_trl.rows import Rows

FEATURES = {"sun": [1.0, 0.0], "moon": [1.0, 0.1], "cat": [0.0, 1.0], "dog": [0.1, 1.0]}


class FakeEncoder(EmbeddingGrouper):
    """The real grouper with a fake encoder."""

    def _encode(self, texts: list[str]) -> Any:
        features = np.array([FEATURES[text] for text in texts], dtype=np.float32)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


X = Dataset.from_dict({"text": ["x"]})
GROUPERS: dict[str, Callable[[], Grouper]] = {
    "task": lambda: TaskGrouper(columns=["task"]),
    "length": lambda: LengthGrouper(num_groups=6),
    "embedding": lambda: FakeEncoder(model="fake", num_groups=3),
}


@pytest.fixture(autouse=True)
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The metric of each fit."""
    found: list[str] = []
    for kind in (TaskGrouper, LengthGrouper, EmbeddingGrouper):

        def counting(self: Any, values: Any, *ranks: Any, fit: Any = kind.fit_assign) -> Any:
            found.append(self.metric)
            return fit(self, values, *ranks)

        monkeypatch.setattr(kind, "fit_assign", counting)
    return found


def some_rows() -> Rows:
    texts = ["sun", "cat", "moon", "sun", "dog", "cat"]
    sizes = [2, 9, 3, 2, 8, 9]
    return Rows(
        Dataset.from_dict(
            {
                "text": texts,
                "task": ["sky", "pets", None, "sky", "pets", "other"],
                "input_ids": [[1] * size for size in sizes],
                "labels": [[-100] + [1] * (size - 1) for size in sizes],
            }
        )
    )


def entry_of(cache_dir: Path) -> Path:
    (entry,) = (path for path in cache_dir.iterdir() if path.is_dir())
    return entry


# --- hits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", GROUPERS)
def test_a_second_call_loads_the_result(metric: str, fits: list[str], tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "commonit_trl")
    make, found = GROUPERS[metric], []
    for _ in range(3):
        caplog.clear()
        found.append(fit_assign_cached(make(), some_rows(), tmp_path))
        loaded = [record.getMessage() for record in caplog.records if "Loaded" in record.getMessage()]
        assert loaded == [f"Loaded groups from {entry_of(tmp_path)}."] * (len(found) > 1)
    assert fits == [metric]
    expected = make().fit(some_rows())
    for grouper, group_ids in found:
        assert grouper.description() == expected.description()
        np.testing.assert_array_equal(group_ids, expected.assign(some_rows()))
        assert group_ids.dtype == np.int64
        group_ids[0] = 0  # writable
        assert grouper.notices == expected.notices
    assert metric == "embedding" or expected.notices


def test_an_entry_is_json_safetensors_and_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the directory of the option, where `~` is the home directory, or in the cache of datasets."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for cache_dir, path in (("~/a/groups", tmp_path / "a" / "groups"), (None, tmp_path / "datasets" / "commonit")):
        fit_assign_cached(GROUPERS["embedding"](), some_rows(), cache_dir)
        entry = entry_of(path)
        assert {path.name for path in path.iterdir()} <= {entry.name, f"{entry.name}.lock"}
        files = {"groups.json", "groups.safetensors", "assignment.safetensors", "checksums.json"}
        assert {file.name for file in entry.iterdir()} == files
    assert path == default_cache_dir()


# --- the fingerprint ----------------------------------------------------------------------------------------


def print_of(grouper: Grouper, dataset: Dataset) -> str:
    return fingerprint(grouper, _hash_values(grouper.hashed(grouper.read(Rows(dataset)))))


def test_fingerprints_are_stable() -> None:
    """A release that changes them must also change `_VERSION`."""
    dataset = some_rows().dataset
    assert print_of(TaskGrouper(columns=["task"]), dataset) == "f59d5cbe163e04c9010f8ea22a239959"
    assert print_of(LengthGrouper(num_groups=6), dataset) == "b1fb2729c94f37317013e1fb2ce59baa"
    assert print_of(EmbeddingGrouper(model="org/x", dtype="float32"), dataset) == "3019a12c3aebf58da367d98074a23f7b"


def test_the_fingerprint_depends_on_the_read_values_alone() -> None:
    dataset = some_rows().dataset
    unread = dataset.remove_columns("text").add_column("more", list("abcdef"))
    for make in (GROUPERS["task"], GROUPERS["length"]):
        first = print_of(make(), dataset)
        assert first == print_of(make(), unread)
        assert first != print_of(make(), dataset.select([1, 0, 2, 3, 4, 5])), "the order of rows decides the ids"
        assert first != print_of(make(), dataset.select(range(5)))
    same = dataset.select([5, 4, 3, 2, 1, 0]).select([5, 4, 3, 2, 1, 0])
    assert print_of(GROUPERS["task"](), same) == print_of(GROUPERS["task"](), dataset)


def test_different_texts_have_different_fingerprints() -> None:
    lists = [["ab", "c"], ["a", "bc"], ["a", ""], ["a"], ["1:a"], ["a", "b"], ["b", "a"], ["a", "b", None], ["ü"]]
    for grouper in (TaskGrouper(columns=["text"]), EmbeddingGrouper(model="org/x")):
        prints = [print_of(grouper, Dataset.from_dict({"text": texts})) for texts in lists]
        assert len(set(prints)) == len(lists)


def test_the_type_of_a_label_does_not_change_the_fingerprint() -> None:
    as_int, as_text = (Dataset.from_dict({"task": values}) for values in ([1, 2], ["1", "2"]))
    assert print_of(TaskGrouper(columns=["task"]), as_int) == print_of(TaskGrouper(columns=["task"]), as_text)


def test_every_option_changes_the_fingerprint(tmp_path: Path) -> None:
    for other in ("a", "b"):
        (tmp_path / f"{other}.jsonl").write_text(json.dumps({"task": "t", "subject": "s", "text": other}))
    options: list[tuple[type[Grouper], dict[str, Any]]] = [
        *((TaskGrouper, {"columns": columns}) for columns in (["a"], ["b"], ["a", "b"])),
        (TaskGrouper, {"columns": ["a"], "min_size": 2}),
        *((LengthGrouper, changed) for changed in ({}, {"of": "total"}, {"num_groups": 3}, {"min_size": 2})),
        (LengthGrouper, {"edges": [3]}),
        (EmbeddingGrouper, {"model": "org/y"}),
    ]
    embedding: list[dict[str, Any]] = [{}, {"text": "both"}, {"num_groups": 3}, {"dtype": "float16"}, {"seed": 1}]
    embedding += [{"reference": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    embedding.append({**embedding[-1], "reference_task_column": "subject"})
    options += [(EmbeddingGrouper, {"model": "org/x", **changed}) for changed in embedding]
    dataset = Dataset.from_dict({"text": ["x"], "a": ["x"], "b": ["x"], "input_ids": [[1]]})
    first, again = ([print_of(kind(**given), dataset) for kind, given in options] for _ in range(2))
    assert first == again and len(set(first)) == len(options)


def test_the_fingerprint_depends_on_the_content_of_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    prints = []
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"task": "t", "text": text}))
        os.utime(path, (len(prints), len(prints)))  # datasets caches by modification time
        prints.append(print_of(EmbeddingGrouper(model="org/x", reference=str(path)), X))
    assert prints[0] == prints[2] != prints[1]


def test_the_fingerprint_depends_on_the_files_of_a_local_model(tmp_path: Path) -> None:
    config, weights = tmp_path / "1_Pooling" / "config.json", tmp_path / "model.safetensors"
    config.parent.mkdir()
    config.write_text("{}")
    weights.write_bytes(b"0")
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: weights.write_bytes(b"12"),
        lambda: os.utime(config, (1, 1)),
        lambda: weights.rename(tmp_path / "model.bin"),
    ]
    prints = [print_of(EmbeddingGrouper(model=str(tmp_path)), X)]
    for change in changes:
        change()
        prints.append(print_of(EmbeddingGrouper(model=str(tmp_path)), X))
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize("file", ["modules.json", "config.json"])
def test_the_fingerprint_depends_on_the_revision_of_a_hub_model(file: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    prints = []
    for revision in ("a" * 40, "b" * 40, "a" * 40):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("[]")
        (repository / "refs" / "main").write_text(revision)
        prints.append(print_of(EmbeddingGrouper(model="org/name"), X))
    assert prints[0] == prints[2] != prints[1]


# --- damage -------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["groups.json", "groups.safetensors", "assignment.safetensors", "checksums.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_reported_and_fitted_again(
    file: str, damage: Any, fits: list[str], tmp_path: Path, caplog: Any
) -> None:
    make = GROUPERS["embedding"]
    _, group_ids = fit_assign_cached(make(), some_rows(), tmp_path)
    entry = entry_of(tmp_path)
    damage(entry / file)
    _, again = fit_assign_cached(make(), some_rows(), tmp_path)
    assert len(fits) == 2
    np.testing.assert_array_equal(again, group_ids)
    (record,) = caplog.records
    assert str(entry) in record.getMessage()
    if damage is flip and file != "checksums.json":
        assert f"{file}: wrong checksum" in record.getMessage()
    caplog.clear()
    fit_assign_cached(make(), some_rows(), tmp_path)
    assert len(fits) == 2 and not caplog.records


def test_an_entry_of_another_number_of_rows_is_not_used(tmp_path: Path, caplog: Any) -> None:
    class Blind(TaskGrouper):
        def identity(self) -> dict[str, Any]:
            return {}

    values = ["a", "b"]
    for rows in ([0, 1], [0]):
        dataset = Dataset.from_dict({"task": values}).select(rows)
        grouper = Blind(columns=["task"])
        fit_assign_cached(grouper, Rows(dataset), tmp_path)
        shutil.move(entry_of(tmp_path), tmp_path / print_of(grouper, dataset.select([0])))
    assert "2 assignments for 1 rows" in caplog.text


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_grouper(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", ["groups.json", "groups.safetensors"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_saved_grouper_is_an_error_with_its_path(file: str, damage: Any, tmp_path: Path) -> None:
    GROUPERS["embedding"]().fit(some_rows()).save(tmp_path)
    damage(tmp_path / file)
    assert str(tmp_path / file) in refusal(tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"format": 1}, "format 1, this version reads 2"),
        ({"format": "1\n"}, "format 1 , this version reads 2"),
        ({"metric": "colour"}, "KeyError: 'colour'"),
        ({"metric": ["length"]}, "TypeError"),
        ({"options": {"sides": 4}}, "KeyError: 'sides'"),
        ({"options": {"min_size": "few"}}, "Input should be a valid integer"),
        ({"options": None}, "TypeError"),
        ({"names": ["only one"]}, "2 edges do not make 1 groups"),
        ({"names": None}, "Input should be a valid list"),
        ({"fitted": {}}, "KeyError: 'edges'"),
        ({"fitted": {"edges": [3, 1e400], "lowest": 0, "has_missing": False}}, "not finite"),
    ],
)
def test_invalid_content_of_saved_groups_is_an_error(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    LengthGrouper(edges=[3, 8]).fit(some_rows()).save(tmp_path)
    path = tmp_path / "groups.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | change))
    assert reason in refusal(tmp_path)
    (missing,) = change
    path.write_text(json.dumps({key: saved[key] for key in saved if key != missing}))
    assert f"KeyError: '{missing}'" in refusal(tmp_path)


def test_other_documents_are_errors(tmp_path: Path) -> None:
    for text in ("[]", "[" * 100_000):
        (tmp_path / "groups.json").write_text(text)
        assert "groups.json" in refusal(tmp_path)


def test_centroids_must_match_the_names(tmp_path: Path) -> None:
    grouper = GROUPERS["embedding"]().fit(some_rows())
    grouper.names = ["only one"]
    grouper.save(tmp_path)
    assert "centroids of shape (3, 2) do not make 1 groups" in refusal(tmp_path)


def test_saved_groups_are_readable_text_and_replace_others(tmp_path: Path) -> None:
    directory = tmp_path / "missing" / "directory"
    GROUPERS["embedding"]().fit(some_rows()).save(directory)
    rows = Rows(Dataset.from_dict({"task": ["übersetzen", "sum"]}))
    grouper = TaskGrouper(columns=["task"]).fit(rows)
    grouper.save(directory, data="mine")
    (file,) = directory.iterdir()
    text = file.read_text(encoding="utf-8")
    assert '\n  "names": [\n    "sum",\n    "übersetzen"\n  ],\n' in text and '\n  "data": "mine"' in text
    assert load_grouper(directory).description() == grouper.description()


# --- an unusable directory --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a file", "under a file", "a link to nothing", "the lock", "the entry"])
def test_an_unusable_directory_is_an_error(where: str, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    if where in ("a file", "under a file"):
        cache_dir.write_text("in the way")
        cache_dir = cache_dir / "below" if where == "under a file" else cache_dir
    elif where == "a link to nothing":
        cache_dir.symlink_to("/proc/nothing/here")
    else:
        fit_assign_cached(GROUPERS["task"](), some_rows(), cache_dir)
        entry = entry_of(cache_dir)
        shutil.rmtree(entry)
        if where == "the entry":
            entry.write_text("in the way")
        else:
            Path(f"{entry}.lock").unlink(missing_ok=True)
            Path(f"{entry}.lock").mkdir()
    with pytest.raises(ValueError) as caught:
        fit_assign_cached(GROUPERS["task"](), some_rows(), cache_dir)
    assert str(caught.value).startswith(f"commonit_cache_dir={str(cache_dir)!r}: ")
    assert "Set it to a directory" in str(caught.value) and "\n" not in str(caught.value)


def test_only_errors_of_the_cache_name_its_option(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Grouper, "save", fail)
        with pytest.raises(ValueError, match=r"commonit_cache_dir=.*No space left on device"):
            fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.setattr(TaskGrouper, "fit_values", fail)
    with pytest.raises(OSError, match="No space left"):
        fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
