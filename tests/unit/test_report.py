"""The numbers of a report are those that anyone can count, batch by batch, in the plan and in plain orders."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.toys import id_rows, tiny_tokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import LengthGrouper, TaskGrouper
from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.plan import plan_epoch
from commonit_trl.report import analysis, charts, inspect_groups, optional
from commonit_trl.report.html import render_html
from commonit_trl.rows import Rows

GEOMETRIES = [(2, 1, 1), (2, 2, 3), (3, 2, 2), (5, 3, 1)]  # B, W, A


def inspect(dataset, geometry, *, grouper=None, padding_free=False, seed=0, dropped=NONE_DROPPED, **options):
    """Inspect `dataset` by task; return the inspection and its plan."""
    size, ranks, accumulation = geometry
    planned = {
        name: options[f"commonit_{name}"]
        for name in ("purity", "remainder", "weights")
        if f"commonit_{name}" in options
    }
    plan = {"micro_batch_size": size, "world_size": ranks, "accumulation_steps": accumulation, "seed": seed, **planned}
    given = {"padding_free": padding_free, "seed": seed, "dropped": dropped}
    return inspect_plan(Rows(dataset), plan, grouper=grouper, options=options, **given)


def inspect_plan(rows, plan, *, samples=None, grouper=None, options=None, **given):
    """Inspect `rows` by task in an epoch of `plan`, arguments of `plan_epoch`; `samples` are the groups of packs."""
    grouper = grouper or TaskGrouper(columns=["task"])
    grouper.fit(rows)
    group_ids = grouper.assign(rows)
    given.setdefault("lengths", rows.token_counts() if rows.tokenized else None)
    planned = plan_epoch(group_ids if samples is None else samples, given["lengths"], **plan)
    options = CommonITArguments(commonit_metric=grouper.metric, **options or {})
    return inspect_groups(grouper, group_ids, rows, planned, options=options, **given), planned


def steps_of(plan):
    """The plan as lists: step -> micro-step -> rank -> row numbers."""
    micro_steps = [list(ranks) for ranks in zip(*map(plan.batches, range(plan.world_size)), strict=True)]
    return cut(micro_steps, plan.accumulation_steps)


def plain_steps(order, geometry):
    """What the Trainer makes of a sampler's order: batches, dealt to ranks in turn, filled up with the first rows."""
    size, ranks, accumulation = geometry
    order = list(order)
    while ranks > 1 and len(order) % (size * ranks):
        order += order[: size * ranks - len(order) % (size * ranks)]
    return cut(cut(cut(order, size), ranks), accumulation)


def cut(items, size):
    return [items[low : low + size] for low in range(0, len(items), size)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def count(steps, tasks, tokens, padding_free=False):
    """The numbers of `BatchNumbers`, one batch after the other."""

    def cost(batch):
        found = [tokens[row] for row in batch]
        return sum(found) if padding_free else max(found) * len(found)

    def share_of_one_task(parts):
        return statistics.mean(len({tasks[row] for row in part}) == 1 for part in parts)

    micro_batches = [batch for step in steps for micro_step in step for batch in micro_step]
    stragglers = []
    for step in steps:
        loads = [sum(cost(micro_step[rank]) for micro_step in step) for rank in range(len(step[0]))]
        stragglers.append(max(loads) / statistics.mean(loads))
    return {
        "steps": len(steps),
        "pure_micro_batches": share_of_one_task(micro_batches),
        "pure_micro_steps": share_of_one_task([joined(micro_step) for step in steps for micro_step in step]),
        "pure_steps": share_of_one_task([joined(map(joined, step)) for step in steps]),
        "padding_ratio": sum(map(cost, micro_batches)) / sum(tokens[row] for batch in micro_batches for row in batch),
        "straggler_ratio": statistics.mean(stragglers),
    }


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("purity", ["step", "micro"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_batches_are_counted_as_one_would(geometry, purity, padding_free):
    data = id_rows([47, 27, 9])
    inspection, plan = inspect(data, geometry, padding_free=padding_free, commonit_purity=purity)
    tasks, tokens = data["task"][:], [len(row) for row in data["input_ids"]]

    planned = count(steps_of(plan), tasks, tokens, padding_free)
    assert dataclasses.asdict(inspection.planned) == pytest.approx(planned)
    assert inspection.planned.steps == plan.num_steps
    runs = "".join("x" if one == other >= 0 else " " for one, other in itertools.pairwise(plan.step_groups)).split()
    assert inspection.longest_run == max(map(len, runs), default=0) + (max(plan.step_groups) >= 0)

    size, _, accumulation = geometry
    by_length = LengthGroupedSampler(size * accumulation, lengths=tokens, generator=torch.Generator().manual_seed(0))
    expected = count(plain_steps(by_length, geometry), tasks, tokens, padding_free)
    assert dataclasses.asdict(inspection.by_length) == pytest.approx(expected)


def test_random_batches_are_like_the_mean_of_many_random_orders():
    """The order is drawn inside, so any one draw is compared with the spread of others."""
    data, geometry = id_rows([300, 200, 100]), (4, 2, 2)
    inspection, _ = inspect(data, geometry)
    tasks, tokens = data["task"][:], [len(row) for row in data["input_ids"]]
    rng = np.random.default_rng(5)
    draws = [count(plain_steps(rng.permutation(600).tolist(), geometry), tasks, tokens) for _ in range(30)]
    for name, value in dataclasses.asdict(inspection.random).items():
        mean, spread = statistics.mean(draw[name] for draw in draws), statistics.stdev(draw[name] for draw in draws)
        assert abs(value - mean) <= 5 * spread, name
    assert inspection.random.steps == plan_epoch([0] * 600, micro_batch_size=16).num_steps


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"commonit_remainder": "drop"},
        {"commonit_weights": "uniform"},
        {"commonit_purity": "micro"},
    ],
)
def test_groups_are_counted_as_one_would(options):
    data, geometry = id_rows([50, 21, 6], seed=3), (2, 2, 2)
    inspection, plan = inspect(data, geometry, **options)
    tasks = data["task"][:]
    steps = steps_of(plan)
    seen = [row for step in steps for micro_step in step for batch in micro_step for row in batch]
    for number, group in enumerate(inspection.groups):
        rows = [row for row, task in enumerate(tasks) if task == f"g{number:03d}"]
        assert (group.id, group.name, group.rows) == (number, f"g{number:03d}", len(rows))
        assert group.share == len(rows) / len(tasks)
        assert group.left_out == sum(row not in seen for row in rows)
        assert group.repeated == sum(max(seen.count(row) - 1, 0) for row in rows)
        batches = sum(tasks[batch[0]] == group.name for step in steps for part in step for batch in part)
        assert group.steps == batches / 4
        labels = [data[row]["labels"] for row in rows]
        for of, counts in (
            ("prompt", [sum(label == -100 for label in row) for row in labels]),
            ("response", [sum(label != -100 for label in row) for row in labels]),
        ):
            spread = getattr(group, f"{of}_tokens")
            quantiles = statistics.quantiles(counts, n=20, method="inclusive")
            assert list(spread.values()) == pytest.approx([quantiles[n - 1] for n in (1, 5, 10, 15, 19)])
    assert inspection.left_out == sum(group.left_out for group in inspection.groups)
    assert inspection.repeated == sum(group.repeated for group in inspection.groups)
    assert sum(group.steps for group in inspection.groups) == pytest.approx(plan.num_micro_steps / 2)


def test_examples_are_rows_of_their_group():
    texts = [f"{task} {number}" for number in range(40) for task in "abc"]
    data = Dataset.from_dict({"task": [text[0] for text in texts], "prompt": texts, "completion": texts[::-1]})
    pairs = dict(zip(texts, texts[::-1], strict=True))
    inspection, _ = inspect_plan(Rows(data), {"micro_batch_size": 4})
    for group in inspection.groups:
        assert len({example["prompt"] for example in group.examples}) == analysis.EXAMPLES_PER_GROUP
        for example in group.examples:
            assert example["prompt"][0] == group.name
            assert example["response"] == pairs[example["prompt"]]
    assert inspection.by_length is None
    assert inspection.planned.padding_ratio is inspection.random.straggler_ratio is None
    assert inspection.groups[0].prompt_tokens is inspection.groups[0].response_tokens is None
    assert inspection.planned.pure_steps == 1.0


def test_packs_are_the_samples_and_rows_the_rows():
    """Where a plan is made of packs, it leaves out and repeats packs; tokens and examples are those of rows."""
    plan = {"micro_batch_size": 2, "world_size": 2, "remainder": "drop"}
    options = {"commonit_remainder": "drop"}
    packs = {"samples": [0] * 7 + [1] * 4, "lengths": np.full(11, 50)}
    inspection, _ = inspect_plan(Rows(id_rows([30, 12])), plan, options=options, **packs)
    assert (inspection.rows, inspection.samples, inspection.left_out) == (42, 11, 3)
    assert [(group.rows, group.samples, group.left_out) for group in inspection.groups] == [(30, 7, 3), (12, 4, 0)]
    assert inspection.planned.padding_ratio == 1.0


def test_what_a_collator_adds_to_rows_is_padding():
    """Rows that are padded to a multiple of 64 cost more than their tokens, also alone."""
    rows = Rows(id_rows([5, 3]))
    inspection, _ = inspect_plan(rows, {"micro_batch_size": 1}, lengths=np.full(8, 64))
    assert inspection.planned.padding_ratio == pytest.approx(8 * 64 / rows.token_counts("total").sum())


def test_mixed_steps_are_drawn_and_count_for_no_group():
    inspection, plan = inspect(id_rows([21, 13, 6]), (2, 2, 1), commonit_remainder="mix")
    mixed = [group < 0 for group in plan.step_groups]
    assert any(mixed) and inspection.drawing.order_groups == (0, 1, 2, -1)
    assert inspection.drawing.order[-1] == tuple(map(float, mixed))
    assert sum(group.steps for group in inspection.groups) == plan.num_steps - sum(mixed)


# --- the rest -----------------------------------------------------------------------------------------------------


def test_the_order_of_groups_is_that_of_the_steps():
    inspection, plan = inspect(id_rows([30, 20, 10]), (2, 2, 1))
    drawing = inspection.drawing
    assert drawing.order_groups == (0, 1, 2)
    assert drawing.steps_per_window == 1
    for step, group in enumerate(plan.step_groups):
        assert [line[step] for line in drawing.order] == [float(line == group) for line in range(3)]


def test_many_groups_and_steps_are_drawn_in_bounds():
    data = id_rows(list(range(1, 41)), max_tokens=8)
    inspection, plan = inspect(data, (1, 1, 1))
    drawing = inspection.drawing
    assert plan.num_steps == 820 and len(inspection.groups) == 40
    assert drawing.order_groups == (*range(20, 40), -1)
    shares = np.array(drawing.order)
    assert shares.shape == (21, analysis.ORDER_WINDOWS)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=0.01)
    assert drawing.steps_per_window == pytest.approx(820 / 400)


def test_warnings_say_what_can_be_done():
    inspection, _ = inspect(id_rows([400, 20, *[3] * 20]), (4, 2, 2))
    said = "\n".join(inspection.warnings)
    assert "The group 'g000' holds 83% of the rows" in said
    assert "20 of 22 groups have fewer than the 16 samples" in said and "commonit_min_group_size=16" in said
    assert "47 steps" in said and "1.6 times" in said
    assert "repeats samples 20 times, 4% of 480" in said
    inspection, _ = inspect(id_rows([33, 33]), (4, 2, 2), commonit_remainder="drop")
    (said,) = inspection.warnings
    assert "2 of 66 samples" in said and "commonit_remainder='keep'" in said
    inspection, _ = inspect(id_rows([32, 32]), (4, 2, 2))
    assert inspection.warnings == ()
    dropped = DroppedRows(counts={("too long", "g000"): 2, ("too long", "gone"): 6})
    inspection, _ = inspect(id_rows([32, 32]), (4, 2, 2), dropped=dropped)
    (said,) = inspection.warnings
    assert (
        "8 of 72 rows" in said and "too long: 8" in said and "'gone' (6), 'g000' (2)" in said and "max_length" in said
    )


def test_notices_of_the_grouper_are_warnings():
    data = Dataset.from_list([{"input_ids": [1] * 5, "labels": [1] * 5, "task": "a"}] * 16)
    inspection, _ = inspect(data, (4, 1, 1), grouper=LengthGrouper())
    assert "only 1 groups" in inspection.warnings[0]
    assert "All rows are in one group" in inspection.warnings[1]


# --- no report ends a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[number % 2 for number in range(12)], [[-100, 5, 6][: 1 + number % 3] for number in range(12)]],
    ids=["scalar labels of a classifier", "labels of a seq2seq model, padded with -100"],
)
def test_labels_that_are_not_those_of_a_causal_model_are_reported(labels):
    rows = [{"input_ids": [1] * (number + 2), "task": "ab"[number % 2]} for number in range(12)]
    data = Dataset.from_list([row | {"labels": label} for row, label in zip(rows, labels, strict=True)])
    given = {"lengths": np.arange(2, 14)}
    inspection, _ = inspect_plan(Rows(data, tiny_tokenizer()), {"micro_batch_size": 2}, **given)
    assert [group.rows for group in inspection.groups] == [6, 6]
    assert inspection.planned.pure_steps == 1 and inspection.planned.padding_ratio > 1
    assert "Groups by task" in render_html([inspection])


def test_an_error_in_a_part_of_the_report_is_a_warning_that_names_it(caplog, monkeypatch):
    def fail(*args):
        raise RuntimeError("no chart today")

    monkeypatch.setattr(charts, "_order", fail)
    inspection, _ = inspect(id_rows([30, 20]), (2, 2, 1))
    drawn = charts.figures(inspection)
    assert "Tokens of each group" in drawn and "Order of the groups in the epoch" not in drawn
    (record,) = caplog.records
    said = record.getMessage()
    assert "commonit_report" in said and "Order of the groups" in said and "no chart today" in said
    with pytest.raises(KeyboardInterrupt), optional("anything"):
        raise KeyboardInterrupt


def test_the_same_seed_gives_the_same_numbers():
    data = id_rows([30, 20])
    assert inspect(data, (2, 2, 1))[0] == inspect(data, (2, 2, 1))[0] != inspect(data, (2, 2, 1), seed=1)[0]
