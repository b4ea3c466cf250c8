"""Two metrics joined: the second is fitted inside each group of the first; vectors take an encoder's place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import EmbeddingGrouper, LengthGrouper, TaskGrouper, build_grouper, load_grouper
from commonit_trl.grouping.joined import JoinedGrouper
from commonit_trl.rows import Rows

RNG = np.random.default_rng(0)
TASKS = RNG.choice(["a", "b", "c"], 300, p=[0.5, 0.3, 0.2])
LENGTHS = RNG.integers(1, 40, 300) * np.where(TASKS == "a", 5, 1)
VECTORS = RNG.normal(size=(300, 6)) + 4 * np.eye(6)[RNG.integers(0, 3, 300)]
ROWS = Rows(
    Dataset.from_dict(
        {
            "task": TASKS.tolist(),
            "input_ids": [[1] * length for length in LENGTHS.tolist()],
            "score": [None, *RNG.random(299).tolist()],
            "vector": VECTORS.tolist(),
        }
    )
)


def build(metric: str, **options: Any) -> Any:
    given = {f"commonit_{name}": value for name, value in options.items()}
    if "length" in metric:
        given |= {"commonit_length_of": "total"}
    return build_grouper(CommonITArguments(commonit_metric=metric, **given), ROWS.columns)


@pytest.mark.parametrize(
    "second", [{"metric": "length"}, {"metric": "embedding", "embedding_column": "vector"}], ids=["length", "embedding"]
)
def test_the_second_metric_is_fitted_inside_each_group_of_the_first(second: dict[str, Any]) -> None:
    grouper = build(**second | {"metric": f"task+{second['metric']}"}, num_groups=4)
    ids = grouper.fit_assign(grouper.read(ROWS))
    tasks = TaskGrouper(columns=["task"]).fit(ROWS)
    expected = np.empty(300, dtype=int)
    names: list[str] = []
    for number, task in enumerate(tasks.names):
        members = np.flatnonzero(tasks.assign(ROWS) == number)
        alone = build(**second, num_groups=4).fit(ROWS.select(members))
        expected[members] = alone.assign(ROWS.select(members)) + len(names)
        names += [f"{task} | {name}" for name in alone.names]
    assert ids.tolist() == expected.tolist() and grouper.names == names and len(names) == 12
    assert grouper.assign(ROWS).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "task"},
        {"metric": "task", "min_group_size": 80},
        {"metric": "length"},
        {"metric": "length", "length_edges": [3, 20]},
        {"metric": "length", "num_groups": 3, "min_group_size": 120},
        {"metric": "column", "column": "score"},
        {"metric": "task+length"},
        {"metric": "length+task"},
        {"metric": "column+task", "column": "score", "num_groups": 3},
        {"metric": "task+embedding", "embedding_column": "vector", "num_groups": 3},
        {"metric": "embedding+length", "embedding_column": "vector", "num_groups": [3, 4]},
    ],
    ids=str,
)
def test_saved_groups_assign_as_before(options: dict[str, Any], tmp_path: Path) -> None:
    grouper = build(**options)
    ids = grouper.fit_assign(grouper.read(ROWS))
    grouper.save(tmp_path)
    loaded = load_grouper(tmp_path)
    assert type(loaded) is type(grouper) and loaded.description() == grouper.description()
    assert loaded.assign(ROWS).tolist() == ids.tolist() and ids.min() >= 0
    assert np.bincount(ids, minlength=len(grouper.names)).min() > 0
    one, other = loaded.positions(), grouper.positions()
    assert (one is None and other is None) or np.allclose(one, other)


def test_rows_of_an_unseen_task_or_of_an_empty_group_are_unassigned() -> None:
    grouper = JoinedGrouper(TaskGrouper(columns=["task"]), LengthGrouper(of="total", num_groups=2)).fit(ROWS)
    new = Rows(Dataset.from_dict({"task": ["z", "b"], "input_ids": [[1], [1]]}))
    ids = grouper.assign(new).tolist()
    assert ids[0] == -1 and grouper.names[ids[1]].startswith("b | ")
    edges = JoinedGrouper(LengthGrouper(of="total", edges=[500, 900]), TaskGrouper(columns=["task"])).fit(ROWS)
    assert edges.names == [f"total under 500 | {task}" for task in "abc"]
    long = Rows(Dataset.from_dict({"task": ["a", "a"], "input_ids": [[1] * 600, [1]]}))
    assert edges.assign(long).tolist() == [-1, 0]


def test_groups_near_in_length_stand_side_by_side() -> None:
    """The order of lengths counts, whichever of the two metrics it is and whatever the other; tasks have none."""
    alone = LengthGrouper(of="total", num_groups=4).fit(ROWS)
    of_rows = alone.positions()[alone.assign(ROWS)]
    for metric in ("length+task", "length+embedding"):
        options = {"embedding_column": "vector"} if "embedding" in metric else {}
        grouper = build(metric, num_groups=4 if metric == "length+task" else [4, 3], **options)
        ids = grouper.fit_assign(grouper.read(ROWS))
        assert np.array_equal(grouper.positions()[ids], of_rows), metric
    inner = build("task+length", num_groups=4)
    ids = inner.fit_assign(inner.read(ROWS))
    lowest = [LENGTHS[ids == group].min() for group in range(len(inner.names))]
    assert (inner.positions() <= lowest).all() and len(set(inner.positions())) > 4
    assert build("task").fit(ROWS).positions() is None


def test_notices_of_the_inner_groups_are_one(caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows(Dataset.from_dict({"task": list("aaabbbccc"), "input_ids": [[1] * 5] * 9}))
    grouper = JoinedGrouper(TaskGrouper(columns=["task"]), LengthGrouper(of="total", num_groups=4)).fit(rows)
    (notice,) = grouper.notices
    assert "In group 'a': commonit_num_groups=4" in notice and "2 more groups" in notice
    assert len(grouper.inner[2].notices) == 1


def test_near_clusters_stand_side_by_side() -> None:
    """On a circle, in the order of their angles, from some cluster on and in either direction."""
    angles = np.repeat(np.arange(8) * 2 * np.pi / 8, 10)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows = Rows(Dataset.from_dict({"vector": vectors.tolist()}))
    grouper = build_grouper(
        CommonITArguments(commonit_metric="embedding", commonit_embedding_column="vector", commonit_num_groups=8),
        rows.columns,
    )
    grouper.fit(rows)
    assert isinstance(grouper, EmbeddingGrouper) and len(grouper.names) == 8
    positions = grouper.positions()
    assert positions is not None and sorted(positions) == list(range(8))
    ordered = grouper.centroids[np.argsort(positions)]
    steps = (ordered[1:] * ordered[:-1]).sum(axis=1)
    assert np.allclose(steps, np.cos(2 * np.pi / 8), atol=1e-5)


def test_vectors_group_as_their_nearest_centroid(tmp_path: Path) -> None:
    """With a reference, the nearest mean of a reference task by cosine; both data sets hold the vectors."""
    reference = {"task": ["x", "x", "y"], "vector": [[2.0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0], [0, 0, 5.0, 0, 0, 0]]}
    file = tmp_path / "reference.parquet"
    Dataset.from_dict(reference).to_parquet(str(file))
    grouper = build("embedding", embedding_column="vector", reference_dataset=str(file)).fit(ROWS)
    centroids = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]) / np.array([[2**0.5], [1]])
    assert grouper.names == ["x", "y"]
    assert grouper.assign(ROWS).tolist() == np.argmax(VECTORS @ centroids.T, axis=1).tolist()


def test_other_vectors_of_the_reference_are_another_identity(tmp_path: Path) -> None:
    """One number in the middle of many, which no printed array shows."""
    identities = []
    for value in (1.0, 2.0):
        vectors = np.ones((2000, 6))
        vectors[1000, 3] = value
        file = tmp_path / "reference.parquet"
        Dataset.from_dict({"task": ["x"] * 2000, "vector": vectors.tolist()}).to_parquet(str(file))
        identities.append(str(build("embedding", embedding_column="vector", reference_dataset=str(file)).identity()))
    assert identities[0] != identities[1]


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        ([[1.0, 2.0], [1.0]], "same length"),
        ([[1.0], None], "missing"),
        ([1.0, 2.0], "lists of numbers"),
        ([["a"], ["b"]], "lists of numbers"),
        ([[1.0, float("nan")], [1.0, 2.0]], "NaN or infinite"),
    ],
)
def test_damaged_vectors_are_named(vectors: list[Any], says: str) -> None:
    rows = Rows(Dataset.from_dict({"vector": vectors}))
    options = CommonITArguments(commonit_metric="embedding", commonit_embedding_column="vector")
    with pytest.raises(ValueError, match=f"commonit_embedding_column='vector'.*{says}"):
        build_grouper(options, rows.columns).fit(rows)


def test_rows_without_a_label_are_a_group_inside_each_bin() -> None:
    tasks = ["a", None, "b", None, "a", "b"]
    rows = Rows(Dataset.from_dict({"task": tasks, "input_ids": [[1] * length for length in (2, 2, 9, 9, 9, 2)]}))
    grouper = JoinedGrouper(LengthGrouper(of="total", edges=[5]), TaskGrouper(columns=["task"])).fit(rows)
    names = [grouper.names[group].rpartition(" | ")[2] for group in grouper.assign(rows)]
    assert names == [task or "(no label)" for task in tasks] and len(grouper.names) == 6
