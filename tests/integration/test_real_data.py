"""I1 and I2 for an epoch of each metric on real data: pure steps, and every row once.

The expected groups are computed without the package. Only a group with fewer rows than a step has micro-batches repeats
rows.
"""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from benchmarks import real_data as benchmark

ROWS = 1_000
VOCABULARY = 512  # with the benchmark's 8,000, the loss takes most of the time
CAPACITY = benchmark.MICRO_BATCH_SIZE * benchmark.ACCUMULATION_STEPS

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(real_data):
    return benchmark.prepare(real_data, ROWS, VOCABULARY)


def by_task(dataset, tokenizer, epoch, **paths):
    """Return the tasks of the rows."""
    assert epoch.grouper.names == ["api", "code", "gsm8k"]
    return [epoch.grouper.names.index(task) for task in dataset["task"]]


def by_length(dataset, tokenizer, epoch, **paths):
    """Return disjoint ranges of response lengths with about equal numbers of rows."""
    tokens = np.array([len(ids) + 1 for ids in tokenizer(list(dataset["completion"]))["input_ids"]])  # and <eos>
    ranges = [tokens[epoch.groups == group] for group in range(8)]
    assert all(low.max() < high.min() for low, high in itertools.pairwise(ranges))
    assert all(abs(len(part) - ROWS / 8) < 0.1 * ROWS / 8 for part in ranges)
    return np.searchsorted([part.min() for part in ranges[1:]], tokens, side="right")


def by_nearest_reference_task(dataset, tokenizer, epoch, *, reference, encoder):
    """Return the nearest of 57 reference tasks by their mean embeddings; computed for some tasks and rows."""
    names, centroids = epoch.grouper.names, epoch.grouper.centroids
    examples = {}
    with reference.open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            examples.setdefault(row["task"], []).append(f"{row['instruction']}\n{row['input']}")
    assert names == sorted(examples) and len(names) == len(centroids) == 57
    model = SentenceTransformer(encoder, device="cpu")
    for task in names[:3]:
        mean = model.encode(examples[task], normalize_embeddings=True).mean(axis=0)
        assert np.allclose(centroids[names.index(task)], mean / np.linalg.norm(mean), atol=1e-5)
    expected = epoch.groups.copy()
    expected[:50] = (model.encode(list(dataset["prompt"][:50])) @ centroids.T).argmax(axis=1)
    return expected


@pytest.mark.parametrize(
    ("metric", "expected_groups"),
    [("task", by_task), ("length", by_length), ("embedding", by_nearest_reference_task)],
)
def test_the_model_sees_pure_steps_and_every_row(metric, expected_groups, prepared, real_data, minilm, tmp_path):
    dataset, tokenizer = prepared
    reference = real_data / benchmark.REFERENCE
    options = {
        "commonit_embedding_model": str(minilm),
        "commonit_embedding_dtype": "float32",  # as the encoding here that it is compared to
        "commonit_reference_dataset": str(reference),
    }
    epoch = benchmark.train_epoch(metric, dataset, tokenizer, tmp_path, **(options if metric == "embedding" else {}))

    groups = np.asarray(expected_groups(dataset, tokenizer, epoch, reference=reference, encoder=str(minilm)))
    assert np.array_equal(groups, epoch.groups)
    sizes = np.bincount(groups, minlength=len(epoch.grouper.names))
    assert benchmark.pure_share(epoch.seen, groups) == 1.0
    assert len(epoch.seen) == sum(math.ceil(size / CAPACITY) for size in sizes)
    assert max(map(len, epoch.seen)) <= CAPACITY

    times_seen = Counter(row for step in epoch.seen for row in step)
    assert set(times_seen) == set(range(ROWS))
    for group, size in enumerate(sizes):
        times = {times_seen[row] for row in np.flatnonzero(groups == group)}
        assert times == ({1} if size >= benchmark.ACCUMULATION_STEPS else {2} if size else set())

    figures = benchmark.figures(epoch, epoch)
    assert figures["lost"] == figures["ranks"]["lost"] == 0
    assert figures["repeated"] == (sizes == 1).sum()
    assert figures["ranks"]["cost"] < figures["ranks"]["plain_cost"]
