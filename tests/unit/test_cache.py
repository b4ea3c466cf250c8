"""Groups on disk: computed once, found again, and never wrong.

1. A second call loads and measures nothing; it has the same notices.
2. The fingerprint follows all that decides the groups, and nothing else.
3. Processes that race for an entry share the work and agree; one that is killed leaves what it has finished.
4. A damaged entry is noticed, told and computed again; a damaged saved grouper is an error with its path.
5. A directory that can't be used is an error of one line with the option's name.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from datasets import Dataset
from filelock import FileLock

from commonit_trl.grouping import (
    EmbeddingGrouper,
    Grouper,
    LengthGrouper,
    TaskGrouper,
    default_cache_dir,
    embedding,
    fit_assign_cached,
    load_grouper,
)
from commonit_trl.grouping.cache import fingerprint
from commonit_trl.grouping.work import SharedWork
from commonit_trl.rows import Rows

FEATURES = {"sun": [1.0, 0.0], "moon": [1.0, 0.1], "cat": [0.0, 1.0], "dog": [0.1, 1.0]}


class FakeEncoder(EmbeddingGrouper):
    """The real grouper but for the encoder, whose calls are counted."""

    measured = 0

    def _encode(self, texts: list[str]) -> Any:
        type(self).measured += 1
        features = np.array([FEATURES[text] for text in texts], dtype=np.float32)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


class CountingTask(TaskGrouper):
    measured = 0

    def fit_values(self, values: Any) -> None:
        type(self).measured += 1
        super().fit_values(values)


class CountingLength(LengthGrouper):
    measured = 0

    def fit_values(self, values: Any) -> None:
        type(self).measured += 1
        super().fit_values(values)


X = Dataset.from_dict({"text": ["x"]})
GROUPERS: dict[str, Callable[[], Any]] = {
    "task": lambda: CountingTask(columns=["task"]),
    "length": lambda: CountingLength(num_groups=6),
    "embedding": lambda: FakeEncoder(model="fake", num_groups=3),
}


@pytest.fixture(autouse=True)
def nothing_measured() -> None:
    CountingTask.measured = CountingLength.measured = FakeEncoder.measured = 0


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


# --- found again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", GROUPERS)
def test_a_second_call_loads_and_measures_nothing(metric: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "commonit_trl")
    make, found = GROUPERS[metric], []
    for _ in range(3):
        caplog.clear()
        found.append(fit_assign_cached(make(), some_rows(), tmp_path))
        loaded = [record.getMessage() for record in caplog.records if "Loaded" in record.getMessage()]
        assert loaded == [f"Loaded groups from {entry_of(tmp_path)}."] * (len(found) > 1)
    assert type(make()).measured == 1
    expected = make().fit(some_rows())
    for grouper, group_ids in found:
        assert grouper.description() == expected.description()
        np.testing.assert_array_equal(group_ids, expected.assign(some_rows()))
        assert group_ids.dtype == np.int64
        group_ids[0] = 0  # the caller's own
        assert grouper.notices == expected.notices
    assert metric == "embedding" or expected.notices


def test_an_entry_is_json_safetensors_and_a_lock(tmp_path: Path) -> None:
    fit_assign_cached(GROUPERS["embedding"](), some_rows(), tmp_path)
    entry = entry_of(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {entry.name, f"{entry.name}.lock"}
    files = {"groups.json", "groups.safetensors", "assignment.safetensors", "checksums.json"}
    assert {file.name for file in entry.iterdir()} == files


def test_the_default_directory_is_in_the_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "commonit"
    fit_assign_cached(GROUPERS["task"](), some_rows())
    assert entry_of(tmp_path / "commonit").is_dir()


def test_directories_above_are_made(tmp_path: Path) -> None:
    fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path / "a" / "b")
    assert entry_of(tmp_path / "a" / "b").is_dir()


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fit_assign_cached(GROUPERS["task"](), some_rows(), "~/groups")
    assert entry_of(tmp_path / "groups").is_dir()


# --- the fingerprint ----------------------------------------------------------------------------------------


def print_of(grouper: Grouper, dataset: Dataset) -> str:
    return fingerprint(grouper, grouper.read(Rows(dataset)))


def test_known_fingerprints_stay() -> None:
    """What one version has cached the next one finds, or else `_VERSION` says that it must not."""
    dataset = some_rows().dataset
    assert print_of(TaskGrouper(columns=["task"]), dataset) == "5c8963dae420d8456626b87216280a5d"
    assert print_of(LengthGrouper(num_groups=6), dataset) == "9928e4bd71fc12daa9897314f59e783f"
    assert print_of(EmbeddingGrouper(model="org/x", dtype="float32"), dataset) == "ecbc1c7e8f7dd79b259de8c7a40f13bb"


def test_the_fingerprint_follows_what_the_metric_reads_and_nothing_else() -> None:
    dataset = some_rows().dataset
    unread = dataset.remove_columns("text").add_column("more", list("abcdef"))
    for make in (GROUPERS["task"], GROUPERS["length"]):
        first = print_of(make(), dataset)
        assert first == print_of(make(), unread)
        assert first != print_of(make(), dataset.select([1, 0, 2, 3, 4, 5])), "the order of rows decides the ids"
        assert first != print_of(make(), dataset.select(range(5)))
    same = dataset.select([5, 4, 3, 2, 1, 0]).select([5, 4, 3, 2, 1, 0])
    assert print_of(GROUPERS["task"](), same) == print_of(GROUPERS["task"](), dataset)


@pytest.mark.parametrize("make", [lambda: TaskGrouper(columns=["text"]), lambda: EmbeddingGrouper(model="org/x")])
@pytest.mark.parametrize(
    "one, other",
    [
        (["ab", "c"], ["a", "bc"]),
        (["a", ""], ["a"]),
        (["1:a"], ["a"]),
        (["a", "b"], ["b", "a"]),
        (["a", "b"], ["a", "b", None]),
        (["a", "a", "b"], ["a", "b", "b"]),
        (["ü"], ["u"]),
    ],
)
def test_texts_that_differ_have_different_fingerprints(make: Any, one: list[Any], other: list[Any]) -> None:
    def of(texts: list[Any]) -> str:
        return print_of(make(), Dataset.from_dict({"text": texts}))

    assert of(one) != of(other)
    assert of(one) == of(list(one))


def test_labels_of_different_types_that_read_the_same_are_the_same_groups() -> None:
    as_int, as_text = (Dataset.from_dict({"task": values}) for values in ([1, 2], ["1", "2"]))
    grouper = TaskGrouper(columns=["task"])
    assert print_of(grouper, as_int) == print_of(grouper, as_text)


def test_every_option_changes_the_fingerprint(tmp_path: Path) -> None:
    for other in ("a", "b"):
        (tmp_path / f"{other}.jsonl").write_text(json.dumps({"task": "t", "subject": "s", "text": other}))
    reference = {"reference": str(tmp_path / "a.jsonl")}
    variants = [
        *(TaskGrouper(columns=columns) for columns in (["a"], ["b"], ["a", "b"])),
        TaskGrouper(columns=["a"], min_size=2),
        *(LengthGrouper(**options) for options in ({}, {"of": "total"}, {"num_groups": 3}, {"min_size": 2})),
        LengthGrouper(edges=[3]),
        *(EmbeddingGrouper(model=model) for model in ("org/x", "org/y")),
        EmbeddingGrouper(model="org/x", text="both"),
        EmbeddingGrouper(model="org/x", num_groups=3),
        EmbeddingGrouper(model="org/x", dtype="float16"),
        EmbeddingGrouper(model="org/x", seed=1),
        EmbeddingGrouper(model="org/x", **reference),
        EmbeddingGrouper(model="org/x", reference=str(tmp_path / "b.jsonl")),
        EmbeddingGrouper(model="org/x", reference_task_column="subject", **reference),
    ]
    dataset = Dataset.from_dict({"text": ["x"], "a": ["x"], "b": ["x"], "input_ids": [[1]]})
    prints = [print_of(grouper, dataset) for grouper in variants]
    assert len(set(prints)) == len(variants)
    assert prints == [print_of(grouper, dataset) for grouper in variants]


def test_the_fingerprint_follows_the_references_content(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    prints = []
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"task": "t", "text": text}))
        os.utime(path, (len(prints), len(prints)))  # datasets tells files by their time
        prints.append(print_of(EmbeddingGrouper(model="org/x", reference=str(path)), X))
    assert prints[0] == prints[2] != prints[1]


def test_the_fingerprint_follows_a_local_models_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"0")
    prints = [print_of(EmbeddingGrouper(model=str(model)), X) for _ in range(2)]
    (model / "model.safetensors").write_bytes(b"12")
    prints.append(print_of(EmbeddingGrouper(model=str(model)), X))
    os.utime(model / "1_Pooling" / "config.json", (1, 1))
    prints.append(print_of(EmbeddingGrouper(model=str(model)), X))
    (model / "model.safetensors").rename(model / "model.bin")
    prints.append(print_of(EmbeddingGrouper(model=str(model)), X))
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize("file", ["modules.json", "config.json"])
def test_the_fingerprint_follows_a_hub_models_revision(file: str, tmp_path: Path, monkeypatch: Any) -> None:
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


# --- races --------------------------------------------------------------------------------------------------


CHUNKS, CHUNK = 8, 4
SHARED = [f"{number}" for number in range(CHUNKS * CHUNK)]


class SharedEncoder(EmbeddingGrouper):
    """The real grouper but for the encoder, which writes down its texts and first calls `before`."""

    def __init__(self, log: Path, before: Callable[[int], Any] = lambda chunk: None) -> None:
        super().__init__(model="fake", num_groups=3, dtype="float32")
        self.log, self.before, self.calls = log, before, 0

    def _encode(self, texts: list[str]) -> Any:
        self.calls += 1
        self.before(self.calls)
        with self.log.open("a") as stream:  # one write: processes do not mix their lines
            stream.write("".join(f"{text}\n" for text in texts))
        features = np.array([np.random.default_rng(int(text)).normal(size=4) for text in texts], dtype=np.float32)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


def group_shared(cache_dir: Path, log: Path, before: Callable[[int], Any] = lambda chunk: None) -> list[Any]:
    embedding._CHUNK = CHUNK
    grouper, group_ids = fit_assign_cached(
        SharedEncoder(log, before), Rows(Dataset.from_dict({"text": SHARED * 2})), cache_dir
    )
    return [grouper.names, grouper.fitted_arrays()["centroids"].tolist(), group_ids.tolist()]


def race(folder: Path, barrier: Any, results: Any) -> None:
    def meet(chunk: int) -> None:
        if chunk == 1:
            barrier.wait(timeout=120)

    results.put(group_shared(folder / "cache", folder / "encoded", meet))


def die_in_the_third_chunk(folder: Path, here: Any) -> None:
    def stop(chunk: int) -> None:
        if chunk == 3:
            here.send(True)
            signal.pause()

    group_shared(folder / "cache", folder / "encoded", stop)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Processes that have what is slow to import."""
    monkeypatch.setattr(embedding, "_CHUNK", CHUNK)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["commonit_trl.grouping", "sklearn.cluster"])
    return context


def test_processes_that_race_share_the_work_and_agree(processes: Any, tmp_path: Path) -> None:
    barrier, results = processes.Barrier(CHUNKS), processes.Queue()
    started = [processes.Process(target=race, args=(tmp_path, barrier, results)) for _ in range(CHUNKS)]
    for process in started:
        process.start()
    found = [results.get(timeout=120) for _ in started]
    for process in started:
        process.join(timeout=120)
    assert [process.exitcode for process in started] == [0] * CHUNKS
    # The barrier let go when each of them was at a chunk; together they encoded every text once.
    assert sorted((tmp_path / "encoded").read_text().split()) == sorted(SHARED)
    assert all(result == found[0] for result in found)
    assert found[0] == group_shared(tmp_path / "alone", tmp_path / "encoded alone")
    entry = entry_of(tmp_path / "cache")
    assert {path.name for path in entry.parent.iterdir()} <= {entry.name, f"{entry.name}.lock"}


@pytest.mark.parametrize("damage", [None, "truncate", "flip"])
def test_a_killed_process_leaves_its_finished_work_to_the_next(
    damage: str | None, processes: Any, tmp_path: Path, caplog: Any
) -> None:
    receives, sends = processes.Pipe(duplex=False)
    process = processes.Process(target=die_in_the_third_chunk, args=(tmp_path, sends))
    process.start()
    assert receives.poll(120)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len((tmp_path / "encoded").read_text().split()) == 2 * CHUNK
    if damage:
        globals()[damage](next((tmp_path / "cache").glob("*.work/features-0.safetensors")))
    result = group_shared(tmp_path / "cache", tmp_path / "encoded")
    encoded = (tmp_path / "encoded").read_text().split()
    assert set(encoded) == set(SHARED) and len(encoded) == len(SHARED) + (CHUNK if damage else 0)
    assert result == group_shared(tmp_path / "alone", tmp_path / "encoded alone")
    assert ["is damaged" in record.getMessage() for record in caplog.records] == ([True] if damage else [])
    entry_of(tmp_path / "cache")


@pytest.mark.parametrize(
    "tasks, pieces",
    [
        (None, ["centroids-0", "features-0", "features-1", "groups-0", "groups-1", "small groups-0"]),
        (["a", "b", "c", "d"], ["centroids-0", "groups-0", "groups-1", "small groups-0"]),
    ],
    ids=["clusters", "reference"],
)
def test_a_run_interrupted_at_its_end_encodes_nothing_again(
    tasks: list[str] | None, pieces: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Each piece of work has a file of its own in the directory that the processes share."""
    monkeypatch.setattr(embedding, "_CHUNK", 2)
    rows = Rows(Dataset.from_dict({"text": [*FEATURES, "cat"]}))

    reference = None
    if tasks is not None:
        reference = str(tmp_path / "reference.jsonl")
        lines = [json.dumps({"task": task, "text": text}) for task, text in zip(tasks, FEATURES)]
        Path(reference).write_text("\n".join(lines))

    def make() -> EmbeddingGrouper:
        return FakeEncoder(model="fake", num_groups=4, dtype="float32", min_size=2, reference=reference)

    with monkeypatch.context() as patched:
        patched.setattr(Grouper, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit_assign_cached(make(), rows, tmp_path / "cache")
    (work,) = (tmp_path / "cache").glob("*.work")
    assert sorted(path.stem for path in work.glob("*.safetensors")) == pieces
    encoded = FakeEncoder.measured
    grouper, group_ids = fit_assign_cached(make(), rows, tmp_path / "cache")
    assert FakeEncoder.measured == encoded
    expected = make()
    assert group_ids.tolist() == expected.fit_assign(expected.read(rows)).tolist()
    assert grouper.description() == expected.description() and not work.exists()


def test_a_process_that_is_behind_takes_what_another_one_has_finished(tmp_path: Path) -> None:
    expected, group_ids = fit_assign_cached(SharedEncoder(tmp_path / "first"), many_texts(), tmp_path / "cache")
    entry = entry_of(tmp_path / "cache")
    finished = entry.rename(tmp_path / "finished")

    def finish(chunk: int) -> None:
        if chunk == 2:  # as the other process does it: the entry first, then the work is removed
            finished.rename(entry)
            shutil.rmtree(entry.with_name(f"{entry.name}.work"))

    behind = SharedEncoder(tmp_path / "second", finish)
    grouper, again = fit_assign_cached(behind, many_texts(), tmp_path / "cache")
    assert behind.calls == 2 and again.tolist() == group_ids.tolist()
    np.testing.assert_array_equal(grouper.fitted_arrays()["centroids"], expected.fitted_arrays()["centroids"])


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
    assert CountingTask.measured == 2


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# --- shared work --------------------------------------------------------------------------------------------


def shared_work(tmp_path: Path) -> SharedWork:
    return SharedWork(tmp_path / "a" / "b", lambda: False, contextlib.nullcontext)


def square(number: int) -> Any:
    return np.array([number * number])


def test_what_others_are_at_is_waited_for_last(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    work, done = shared_work(tmp_path), []
    work.directory.mkdir(parents=True)
    other = FileLock(work.directory / "squares-0.lock")
    other.acquire()

    class Watched(FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            if self.blocking:
                other.release()  # the process that had it dies
            return super().acquire(*args, **kwargs)

    def write_down(number: int) -> Any:
        done.append(number)
        return square(number)

    monkeypatch.setattr("commonit_trl.grouping.work.FileLock", Watched)
    assert [result.tolist() for result in work.map("squares", write_down, [5, 6, 7])] == [[25], [36], [49]]
    assert done == [6, 7, 5] and not caplog.records


@pytest.mark.parametrize("damage, reason", [("truncate", "SafetensorError: "), ("flip", "ValueError: it is not what")])
def test_a_damaged_result_is_told_and_computed_again(damage: str, reason: str, tmp_path: Path, caplog: Any) -> None:
    work = shared_work(tmp_path)
    work.map("squares", square, [5, 6])
    damaged = work.directory / "squares-1.safetensors"
    globals()[damage](damaged)
    assert [result.tolist() for result in work.map("squares", square, [5, 6])] == [[25], [36]]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{damaged} is damaged ({reason}")
    assert record.getMessage().endswith(") and is computed again.")


def test_a_damaged_result_that_others_have_removed_is_computed_again(tmp_path: Path) -> None:
    work = shared_work(tmp_path)

    def remove_the_first(number: int) -> Any:
        if number == 7:
            (work.directory / "squares-0.safetensors").unlink()
        return square(number)

    assert [result.tolist() for result in work.map("squares", remove_the_first, [5, 6, 7])] == [[25], [36], [49]]


@pytest.mark.parametrize("rank, shown", [(None, True), ("0", True), ("1", False)])
def test_one_process_of_a_machine_shows_progress(
    rank: str | None, shown: bool, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    work = shared_work(tmp_path)
    for _ in range(2):  # again, where all of it is there
        work.map("squares", square, [5, 6, 7], progress="Squaring")
        assert ("Squaring: 100%" in capfd.readouterr().err) == shown
    work.map("squares", square, [5, 6, 7])
    assert capfd.readouterr().err == ""


# --- damage -------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file: Path) -> None:
    file.write_bytes(b"\x00garbage\xff" * 10)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["groups.json", "groups.safetensors", "assignment.safetensors", "checksums.json"])
@pytest.mark.parametrize(
    "damage", [truncate, garble, flip, Path.unlink, Path.mkdir], ids=lambda damage: damage.__name__
)
def test_a_damaged_entry_is_told_and_computed_again(file: str, damage: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "commonit_trl")
    make = GROUPERS["embedding"]
    _, group_ids = fit_assign_cached(make(), some_rows(), tmp_path)
    entry = entry_of(tmp_path)
    if damage is Path.mkdir:
        (entry / file).unlink()
    damage(entry / file)
    _, again = fit_assign_cached(make(), some_rows(), tmp_path)
    assert FakeEncoder.measured == 2
    np.testing.assert_array_equal(again, group_ids)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"The cached groups in {entry} are damaged (")
    assert record.getMessage().endswith(") and are computed again.")
    if damage is flip and file != "checksums.json":
        assert f"(ValueError: {file} is not what was written)" in record.getMessage()
    caplog.clear()
    fit_assign_cached(make(), some_rows(), tmp_path)
    assert FakeEncoder.measured == 2 and not caplog.records


def test_an_entry_of_another_number_of_rows_is_not_used(tmp_path: Path, caplog: Any) -> None:
    class Blind(CountingTask):
        def identity(self) -> dict[str, Any]:
            return {}

    values = ["a", "b"]
    for rows in ([0, 1], [0]):
        dataset = Dataset.from_dict({"task": values}).select(rows)
        grouper = Blind(columns=["task"])
        fit_assign_cached(grouper, Rows(dataset), tmp_path)
        shutil.move(entry_of(tmp_path), tmp_path / print_of(grouper, dataset.select([0])))
    assert "2 assignments for 1 rows" in caplog.text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": "2\n"}, "ValueError: format 2 , this version reads 1"),
        ({"notices": 5}, "Input should be a valid list"),
        ({"options": {"min_size": "few"}}, "Input should be a valid integer"),
        ({"options": {"a\nb": 1}}, "KeyError"),
        ({"fitted": {"edges": [3, 1e400]}}, "OverflowError"),
        ({"names": ["only one"]}, "ValueError: 2 edges do not make 1 groups"),
    ],
)
def test_what_the_fuzzer_found_in_saved_groups(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Each was another exception, an error of several lines, or went wrong only when the groups were used."""
    LengthGrouper(edges=[3, 8]).fit(some_rows()).save(tmp_path)
    saved = json.loads((tmp_path / "groups.json").read_text())
    (tmp_path / "groups.json").write_text(json.dumps(saved | change))
    with pytest.raises(ValueError) as caught:
        load_grouper(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_groups_nested_too_deeply_to_read_are_an_error_with_their_path(tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"groups\.json is not a readable set of groups \(RecursionError"):
        load_grouper(tmp_path)


@pytest.mark.parametrize("file", ["groups.json", "groups.safetensors"])
@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_saved_grouper_is_an_error_with_its_path(file: str, damage: Any, tmp_path: Path) -> None:
    GROUPERS["embedding"]().fit(some_rows()).save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError) as caught:
        load_grouper(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file} is not a readable set of groups (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"metric": "colour"},
        {"metric": ["length"]},
        {"options": {"sides": 4}},
        {"options": None},
        {"names": ["only one"]},
        {"names": None},
        {"fitted": {}},
        {"fitted": {"edges": ["a", "b"]}},
        {"fitted": None},
    ],
)
def test_a_saved_grouper_of_another_format_is_an_error_with_its_path(change: dict[str, Any], tmp_path: Path) -> None:
    LengthGrouper(edges=[3, 8]).fit(some_rows()).save(tmp_path)
    saved = json.loads((tmp_path / "groups.json").read_text())
    (tmp_path / "groups.json").write_text(json.dumps(saved | change))
    with pytest.raises(ValueError, match=r"groups\.json is not a readable set of groups \("):
        load_grouper(tmp_path)
    for name in saved:
        (tmp_path / "groups.json").write_text(json.dumps({key: saved[key] for key in saved if key != name}))
        with pytest.raises(ValueError, match=f"KeyError: '{name}'"):
            load_grouper(tmp_path)
    (tmp_path / "groups.json").write_text("[]")
    with pytest.raises(ValueError, match=r"groups\.json is not a readable set of groups \("):
        load_grouper(tmp_path)


def test_saved_centroids_of_other_groups_are_refused(tmp_path: Path) -> None:
    GROUPERS["embedding"]().fit(some_rows()).save(tmp_path)
    saved = json.loads((tmp_path / "groups.json").read_text())
    (tmp_path / "groups.json").write_text(json.dumps(saved | {"names": ["only one"]}))
    with pytest.raises(ValueError, match=r"\(ValueError: centroids of shape \(3, 2\) do not make 1 groups\)"):
        load_grouper(tmp_path)


def test_saved_groups_can_be_read_by_people(tmp_path: Path) -> None:
    rows = Rows(Dataset.from_dict({"task": ["übersetzen", "sum"]}))
    TaskGrouper(columns=["task"]).fit(rows).save(tmp_path / "not" / "there yet", data="mine")
    text = (tmp_path / "not" / "there yet" / "groups.json").read_text(encoding="utf-8")
    assert '\n  "names": [\n    "sum",\n    "übersetzen"\n  ],\n' in text and '\n  "data": "mine"' in text


def test_a_directory_without_groups_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/groups\.json is not a readable set of groups \(FileNotFoundError"):
        load_grouper(tmp_path / "nowhere")


def test_saving_over_another_grouper_leaves_nothing_of_it(tmp_path: Path) -> None:
    GROUPERS["embedding"]().fit(some_rows()).save(tmp_path)
    grouper = LengthGrouper().fit(some_rows())
    grouper.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["groups.json"]
    assert load_grouper(tmp_path).description() == grouper.description()


# --- a directory that can't be used -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a file", "under a file", "a link to nothing", "the lock", "the entry"])
def test_a_directory_that_cannot_be_used_is_refused_in_one_line(where: str, tmp_path: Path) -> None:
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
    assert str(caught.value).startswith(f"commonit_cache_dir={str(cache_dir)!r} cannot be used (")
    assert str(caught.value).endswith("name a directory that this user may write.")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_as_the_cache_s_and_an_error_of_the_metric_is_not(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Grouper, "save", fail)
        with pytest.raises(ValueError, match=r"commonit_cache_dir=.*No space left on device"):
            fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)
    monkeypatch.setattr(CountingTask, "fit_values", fail)
    with pytest.raises(OSError, match="No space left"):
        fit_assign_cached(GROUPERS["task"](), some_rows(), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def many_texts() -> Rows:
    return Rows(Dataset.from_dict({"text": [str(number) for number in range(4_000)]}))


@pytest.mark.parametrize("left", [0, 20_000], ids=["full at once", "full on the way"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half(left: int, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filling").write_bytes(b"0" * (65_536 - 4_096 - left))
    with pytest.raises(ValueError) as caught:
        fit_assign_cached(SharedEncoder(tmp_path / "encoded"), many_texts(), small_disk)
    assert str(caught.value).startswith(f"commonit_cache_dir={str(small_disk)!r} cannot be used (")
    assert str(caught.value).endswith("name a directory that this user may write.") and "\n" not in str(caught.value)
    assert not [path for path in small_disk.iterdir() if path.is_dir() and path.suffix != ".work"]
    (small_disk / "filling").unlink()  # with room again, or elsewhere, all is well
    _, group_ids = fit_assign_cached(SharedEncoder(tmp_path / "encoded"), many_texts(), tmp_path / "elsewhere")
    assert len(group_ids) == 4_000


def test_a_read_only_directory_is_told_in_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match=r"commonit_cache_dir=.* cannot be used \(.*name a directory that this user"):
        fit_assign_cached(TaskGrouper(columns=["text"]), some_rows(), small_disk)
