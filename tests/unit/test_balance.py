"""I6: balancing a partition by token length keeps its samples, leaves no micro-batch empty, depends on that partition
only, and bounds cost and peak."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonit_trl.plan import plan_epoch
from commonit_trl.plan.balance import balance


@st.composite
def cases(draw, most_partitions=6):
    """Draw lengths of some partitions, their sizes, and a geometry; every micro-batch can have a sample."""
    micro_steps, world_size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    blocks = micro_steps * world_size
    sizes = draw(st.lists(st.integers(blocks, 6 * blocks), min_size=1, max_size=most_partitions))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = rng.integers(0, draw(st.integers(1, 3000)), sum(sizes))
    return lengths, np.array(sizes), micro_steps, world_size


def micro_batches(lengths, partition_sizes, micro_steps, world_size):
    """Return lists by partition and (micro-step, rank) of the micro-batch's lengths; an empty sample costs a token."""
    order, sizes = balance(lengths, partition_sizes, micro_steps, world_size)
    each = np.split(np.maximum(lengths, 1)[order], np.cumsum(sizes.ravel())[:-1])
    blocks = micro_steps * world_size
    return [each[start : start + blocks] for start in range(0, len(each), blocks)]


def cost(batch):
    return int(batch.max()) * len(batch)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_each_partition_keeps_its_samples_and_no_micro_batch_is_empty(case):
    _, partition_sizes, micro_steps, world_size = case
    order, sizes = balance(*case)
    assert sizes.shape == (len(partition_sizes), micro_steps * world_size)
    assert (sizes > 0).all() and (sizes.sum(axis=1) == partition_sizes).all()
    ends = np.cumsum(partition_sizes)
    for start, end in zip(ends - partition_sizes, ends, strict=True):
        assert sorted(order[start:end]) == list(range(start, end))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_micro_batches_hold_neighbours_in_length(case):
    """Micro-batches do not overlap in length: for their sizes, none could be cheaper."""
    for partition in micro_batches(*case):
        by_longest = sorted(partition, key=lambda batch: (batch.max(), batch.min()))
        for shorter, longer in itertools.pairwise(by_longest):
            assert shorter.max() <= longer.min()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_partition_is_balanced_alone(case):
    """I4: the other partitions of the same call make no difference."""
    lengths, partition_sizes, micro_steps, world_size = case
    order, sizes = balance(*case)
    ends = np.cumsum(partition_sizes)
    for number, (start, end) in enumerate(zip(ends - partition_sizes, ends, strict=True)):
        alone = balance(lengths[start:end], partition_sizes[number : number + 1], micro_steps, world_size)
        assert (alone[0] + start == order[start:end]).all()
        assert (alone[1][0] == sizes[number]).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_lengths_beyond_32_bits(case):
    """Longer lengths give the same micro-batches, also where only their sums need more than 32 bits."""
    lengths, *rest = case
    lengths = 20 * np.maximum(lengths, 1)  # so that a twentieth of a cost is a whole number in all
    small = balance(lengths, *rest)
    for factor in (10**9, (2**31 - 1) // int(lengths.max())):
        large = balance(lengths * factor, *rest)
        assert all((ours == theirs).all() for ours, theirs in zip(small, large, strict=True))


def least_peak(lengths, blocks):
    """The least cost of the costliest micro-batch, by dynamic programming over the sorted lengths."""
    lengths = np.sort(np.maximum(lengths, 1))[::-1].tolist()
    least = [0] + [float("inf")] * len(lengths)
    for _ in range(blocks):
        least = [float("inf")] + [
            min(max(least[start], lengths[start] * (end - start)) for start in range(end))
            for end in range(1, len(lengths) + 1)
        ]
    return least[-1]


@settings(max_examples=200, deadline=None)
@given(cases(most_partitions=2))
def test_the_peak_is_at_most_a_twentieth_above_the_least_possible(case):
    lengths, partition_sizes, micro_steps, world_size = case
    parts = np.split(lengths, np.cumsum(partition_sizes)[:-1])
    for part, batches in zip(parts, micro_batches(*case), strict=True):
        assert max(map(cost, batches)) <= 21 / 20 * least_peak(part, micro_steps * world_size)


def cheapest_step(lengths, micro_steps, world_size):
    """The least possible cost of the slowest rank: every cut, every way to deal the blocks."""
    lengths = np.sort(lengths)[::-1]
    blocks = micro_steps * world_size
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(lengths)), blocks - 1):
        edges = [0, *cuts, len(lengths)]
        block_costs = [lengths[start] * (end - start) for start, end in itertools.pairwise(edges)]
        for ranks in set(itertools.permutations([rank for rank in range(world_size) for _ in range(micro_steps)])):
            best = min(best, np.bincount(ranks, weights=block_costs).max())
    return best


@pytest.mark.parametrize(("micro_steps", "world_size"), [(1, 3), (2, 2), (4, 1)])
def test_steps_cost_little_more_than_the_cheapest(micro_steps, world_size):
    """Small partitions, where all cuts can be tried: within 5 % on average; exact with one micro-step."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(30):
        lengths = np.clip(rng.lognormal(5, 0.7, 12), 8, 2000).astype(int)
        (step,) = micro_batches(lengths, np.array([12]), micro_steps, world_size)
        slowest = np.array([cost(batch) for batch in step]).reshape(micro_steps, world_size).sum(axis=0).max()
        ratios.append(slowest / cheapest_step(lengths, micro_steps, world_size))
    assert min(ratios) >= 1
    assert np.mean(ratios) <= (1 if micro_steps == 1 else 1.04)


# --- goals on a mixture -----------------------------------------------------------------------------------------------

# Prompt and response of three tasks: samples, median and spread of the log-normal lengths.
TASKS = ((3600, (60, 0.4), (110, 0.45)), (2200, (30, 0.6), (60, 0.9)), (1200, (45, 0.35), (190, 0.4)))
GEOMETRY = {"micro_batch_size": 8, "world_size": 4, "accumulation_steps": 2}


def mixture():
    """Return task, prompt and response tokens of each row of a fixed mixture, shaped like instruction data."""
    rng = np.random.default_rng(0)

    def tokens(rows, median, spread):
        return np.clip(rng.lognormal(np.log(median), spread, rows), 3, 900).astype(np.int64)

    prompts = np.concatenate([tokens(rows, *prompt) for rows, prompt, _ in TASKS])
    responses = np.concatenate([tokens(rows, *response) for rows, _, response in TASKS])
    return np.repeat(np.arange(len(TASKS)), [rows for rows, *_ in TASKS]), prompts, responses


def relative_cost(plan, lengths):
    """Return the padded tokens of the slowest rank of each step, times the ranks, for each token; and the peak."""
    padded = np.maximum.reduceat(lengths[plan.indices], plan.offsets[:-1]) * np.diff(plan.offsets)
    by_rank = padded.reshape(-1, plan.accumulation_steps, plan.world_size).sum(axis=1)
    return by_rank.max(axis=1).sum() * plan.world_size / lengths[plan.indices].sum(), padded.max()


@pytest.mark.parametrize(("metric", "most"), [("task", 1.105), ("length", 1.06), ("embedding", 1.10)])
def test_relative_cost(metric, most):
    """Random order costs more than twice its tokens, a balanced step at most `most`; the peak is at most half."""
    tasks, prompts, responses = mixture()
    lengths = prompts + responses
    groups = {
        "task": tasks,
        "length": np.searchsorted(np.quantile(responses, np.arange(1, 8) / 8), responses, side="right"),
        "embedding": np.random.default_rng(1).integers(0, 11, len(tasks)) + 11 * tasks,  # 33 clusters inside the tasks
    }[metric]
    random_cost, random_peak = relative_cost(plan_epoch(np.zeros_like(tasks), **GEOMETRY), lengths)
    balanced_cost, balanced_peak = relative_cost(plan_epoch(groups, lengths, **GEOMETRY), lengths)
    assert random_cost > 2
    assert balanced_cost <= most
    assert balanced_peak <= random_peak / 2
