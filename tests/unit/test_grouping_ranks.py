"""`fit_assign_cached` in several processes: two real gloo ranks, or independent processes that share a cache."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from filelock import FileLock
from helpers.forked import free_port

from commonit_trl.grouping import EmbeddingGrouper, LengthGrouper, TaskGrouper, cache, embedding, fit_assign_cached
from commonit_trl.grouping.ranks import Ranks
from commonit_trl.rows import Rows

CHUNK = 4
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["commonit_trl.grouping", "accelerate", "sklearn.cluster", "sentence_transformers"])


class RandomEncoder(EmbeddingGrouper):
    """The real grouper with random embeddings, which logs the texts of each call to `log`."""

    log: Path
    before: Callable[[], Any] = staticmethod(lambda: None)

    def _encode(self, texts: list[str]) -> Any:
        type(self).before()
        with self.log.open("a") as stream:
            stream.write(json.dumps(texts) + "\n")
        vectors = np.array([np.random.default_rng(int(text)).normal(size=4) for text in texts], dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(texts: int) -> Rows:
    """Return rows with each text twice, and columns for the other metrics."""
    numbers = [*range(texts)] * 2
    columns = {"text": list(map(str, numbers)), "task": [f"task {number % 3}" for number in numbers]}
    return Rows(Dataset.from_dict({**columns, "input_ids": [[1] * (number % 7) for number in numbers]}))


def group(folder: Path, cache_dir: Path, texts: int = 18, **options: Any) -> dict[str, Any]:
    embedding._CHUNK = CHUNK
    RandomEncoder.log = folder / f"texts-{os.environ.get('RANK', 'alone')}"
    options = {"model": "none", "num_groups": 3, "dtype": "float32", **options}
    grouper, group_ids = fit_assign_cached(RandomEncoder(**options), rows_of(texts), cache_dir)
    return result_of(grouper, group_ids)


def result_of(grouper: Any, group_ids: Any) -> dict[str, Any]:
    arrays = {name: array.tolist() for name, array in grouper.fitted_arrays().items()}
    return {**grouper.description(), "arrays": arrays, "ids": group_ids.tolist(), "type": str(group_ids.dtype)}


def on_ranks(function: Callable[..., Any], *args: Any, killed: bool = False) -> list[Any]:
    """The result of `function(rank, *args)` on two ranks, or its exception; None for a killed rank."""
    port, results = str(free_port()), FORKS.Queue()
    ranks = [FORKS.Process(target=be_rank, args=(rank, port, results, function, args)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=300) for _ in range(1 if killed else 2))
    for rank in ranks:
        rank.join(timeout=300)
        assert rank.exitcode == 0 or (killed and rank.exitcode == -signal.SIGKILL)
    return [found.get(number) for number in range(2)]


def be_rank(rank: int, port: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    logging.basicConfig(level="ERROR")
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        result = (type(error).__name__, str(error))
    results.put((rank, result))


def encoded(folder: Path, who: Any) -> list[list[str]]:
    path = folder / f"texts-{who}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def entry_of(cache_dir: Path) -> Path:
    (entry,) = (path for path in cache_dir.iterdir() if path.is_dir())
    return entry


# --- equal shares -------------------------------------------------------------------------------------------


def group_in_own_directory(rank: int, folder: Path, options: dict[str, Any]) -> Any:
    return group(folder, folder / f"cache {rank}", **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"texts": 3}, {"min_size": 10, "num_groups": 6}, {"reference": True}],
    ids=["k-means", "fewer chunks than ranks", "small groups", "reference"],
)
def test_ranks_encode_equal_shares_and_find_the_groups_of_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    if "reference" in options:
        reference = tmp_path / "reference.jsonl"
        lines = [{"task": f"t{number % 3}", "text": str(100 + number)} for number in range(9)]
        reference.write_text("\n".join(map(json.dumps, lines)))
        options = {"reference": str(reference)}
    expected = group(tmp_path, tmp_path / "alone", **options)
    assert on_ranks(group_in_own_directory, tmp_path, options) == [expected, expected]
    shares = [encoded(tmp_path, rank) for rank in range(2)]
    assert abs(len(shares[0]) - len(shares[1])) <= (2 if "reference" in options else 1)
    assert sorted([*shares[0], *shares[1]]) == sorted(encoded(tmp_path, "alone"))
    entry = entry_of(tmp_path / "cache 0")
    assert {path.name for path in entry.parent.iterdir()} <= {entry.name, f"{entry.name}.lock"}


def test_one_process_makes_no_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.PartialState.__init__", None)
    group(tmp_path, tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "2")  # of nodes, set by a cluster rather than a launcher of ranks
    assert Ranks.of_run() == Ranks(rank=0, size=1)


def group_without_encoder(rank: int, folder: Path) -> Any:
    groupers = [TaskGrouper(columns=["task"]), LengthGrouper(num_groups=3)]
    return [result_of(*fit_assign_cached(grouper, rows_of(9), folder / f"{rank}")) for grouper in groupers]


def test_metrics_without_an_encoder_agree(tmp_path: Path) -> None:
    first, second = on_ranks(group_without_encoder, tmp_path)
    assert first == second == group_without_encoder(3, tmp_path)


# --- one result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["rank 0", "rank 0, damaged", "rank 1", "both, differing"])
def test_rank_0_decides_whether_the_groups_are_cached(kept: str, tmp_path: Path) -> None:
    """Each rank has its own cache directory; `kept` says which hold an entry."""
    number = int("1" in kept)
    expected = group(tmp_path, tmp_path / f"cache {number}")
    entry = entry_of(tmp_path / f"cache {number}")
    if "damaged" in kept:
        file = entry / "assignment.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elif "both" in kept:
        group(tmp_path, tmp_path / "cache 1", seed=1, num_groups=2)
        entry_of(tmp_path / "cache 1").rename(tmp_path / "cache 1" / entry.name)
    assert on_ranks(group_in_own_directory, tmp_path, {}) == [expected, expected]
    assert all(bool(encoded(tmp_path, rank)) == (kept in ("rank 0, damaged", "rank 1")) for rank in range(2))


# --- errors -------------------------------------------------------------------------------------------------


def unknown_model(rank: int, folder: Path, failing: int) -> Any:
    embedding._CHUNK = CHUNK
    RandomEncoder.log = folder / f"texts-{rank}"
    kind = EmbeddingGrouper if rank == failing else RandomEncoder
    grouper = kind(model="no/such-model", num_groups=3, dtype="float32")
    return fit_assign_cached(grouper, rows_of(18), folder / "cache")


def unusable_directory(rank: int, folder: Path, failing: int) -> Any:
    return group(folder, folder / ("texts" if rank == failing else "cache"))


def full_disk(rank: int, folder: Path, failing: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == failing:
        cache.os.replace = fail
    return group(folder, folder / "cache")


def failing_read(rank: int, folder: Path, failing: int) -> Any:
    def fail(*_: Any) -> None:
        raise KeyError("text")

    if rank == failing:
        EmbeddingGrouper.read = fail  # type: ignore[method-assign, assignment]
    return group(folder, folder / "cache")


@pytest.mark.parametrize(
    ("function", "failing", "kinds", "said"),
    [
        (unknown_model, 0, ["ValueError", "ValueError"], "commonit_embedding_model='no/such-model'"),
        (unknown_model, 1, ["ValueError", "ValueError"], "commonit_embedding_model='no/such-model'"),
        (unusable_directory, 0, ["ValueError", "ValueError"], "commonit_cache_dir="),
        (full_disk, 0, ["ValueError", "ValueError"], "commonit_cache_dir="),
        (failing_read, 1, ["RuntimeError", "KeyError"], "text"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(
    function: Any, failing: int, kinds: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "texts").touch()
    found = on_ranks(function, tmp_path, failing)
    assert [kind for kind, _ in found] == kinds
    assert all(said in message for _, message in found)
    assert not (tmp_path / "cache").exists() or not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_only_the_directory_of_rank_0_must_be_usable(tmp_path: Path) -> None:
    (tmp_path / "texts").touch()
    expected = group(tmp_path, tmp_path / "alone")
    assert on_ranks(unusable_directory, tmp_path, 1) == [expected, expected]


def die(rank: int, folder: Path, dying: int) -> Any:
    if rank == dying:
        RandomEncoder.before = staticmethod(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return group(folder, folder / "cache")


@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_rank_stops_the_other_and_leaves_no_lock(dying: int, tmp_path: Path) -> None:
    found = on_ranks(die, tmp_path, dying, killed=True)
    assert found[dying] is None and found[1 - dying][0] not in ("ValueError", "KeyError")
    assert group(tmp_path, tmp_path / "cache") == group(tmp_path, tmp_path / "alone")


# --- agreement and the lock ---------------------------------------------------------------------------------


def differ(rank: int, folder: Path, options: dict[str, Any]) -> Any:
    return group(folder, folder / "cache", **(options if rank else {}))


@pytest.mark.parametrize("options", [{"texts": 17}, {"num_groups": 4}, {"seed": 1}])
def test_ranks_with_other_rows_or_options_stop(options: dict[str, Any], tmp_path: Path) -> None:
    found = on_ranks(differ, tmp_path, options)
    assert found[0] == found[1] and found[0][0] == "ValueError"
    assert "commonit_metric='embedding'" in found[0][1] and "rank 1" in found[0][1]
    assert not encoded(tmp_path, 0)


def start_together(folder: Path, number: int, barrier: Any, results: Any) -> None:
    os.environ["RANK"] = f"process {number}"  # names the log
    barrier.wait(timeout=300)
    results.put(group(folder, folder / "cache"))


def test_independent_processes_fit_once(tmp_path: Path) -> None:
    barrier, results = FORKS.Barrier(3), FORKS.Queue()
    processes = [FORKS.Process(target=start_together, args=(tmp_path, number, barrier, results)) for number in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(timeout=300)
    assert found == [group(tmp_path, tmp_path / "alone")] * 3
    logs = [encoded(tmp_path, f"process {number}") for number in range(3)]
    assert sorted(logs) == [[], [], encoded(tmp_path, "alone")]


def wait_for_lock(rank: int, folder: Path) -> Any:
    """Rank 0 finds the lock taken, until rank 1 has been in three collectives since."""
    cache._LOCK_SECONDS = 0.01
    waited, broadcast = 0, Ranks.broadcast
    other = FileLock(folder / "cache" / f"{(folder / 'name').read_text()}.lock")
    if rank == 0:
        other.acquire()

    def counting(self: Ranks, compute: Any) -> Any:
        nonlocal waited
        result = broadcast(self, compute)
        waited += result is False
        if waited == 3 and other.is_locked:
            other.release()
        return result

    Ranks.broadcast = counting  # type: ignore[method-assign, assignment]
    return waited, group(folder, folder / "cache"), waited


def test_ranks_meet_while_another_process_holds_the_lock(tmp_path: Path) -> None:
    expected = group(tmp_path, tmp_path / "cache")
    entry = entry_of(tmp_path / "cache")
    (tmp_path / "name").write_text(entry.name)
    shutil.rmtree(entry)
    for before, result, after in on_ranks(wait_for_lock, tmp_path):
        assert result == expected and before == 0 and after == 3
