"""Measure the groups of a dataset and the batches of an epoch, beside baseline batches.

Steps: (1) describe each group: rows, tokens, steps, dropped rows, examples; (2) measure the planned batches, and two
baseline orders of the same samples in the same geometry: random, and transformers' `LengthGroupedSampler`
(`train_sampling_strategy="group_by_length"`), cut and padded as accelerate does; (3) warn about what the user can
change; (4) draw a bounded sample for the charts.

Definitions. The cost of a micro-batch is its longest sample times its sample count, or with `padding_free` the sum of
their tokens. `padding_ratio` is the cost of all micro-batches per token of their samples: 1 is no padding.
`straggler_ratio` is the cost of a step's slowest rank relative to the mean rank, averaged over steps: 1 is no waiting.

Cost, 10^6 rows: about 2 s of one CPU core, nearly half of it in `LengthGroupedSampler`. Conversations trained on every
turn are rendered once more, to find the responses. The size of a report is bounded: examples of at most 100 groups, 400
characters each, and an embedding map of at most 500 rows, which are encoded again.

Token counts, examples, the baseline by length and the map are optional: if one of them fails, the report omits it and
logs a warning.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.config import CommonITArguments
from commonit_trl.grouping import EmbeddingGrouper, Grouper
from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.plan import EpochPlan
from commonit_trl.report.optional import optional
from commonit_trl.report.summary import epoch_summary, largest
from commonit_trl.rows import Rows
from commonit_trl.sanitize import cut

EXAMPLES_PER_GROUP = 3
GROUPS_WITH_EXAMPLES = 100
EXAMPLE_CHARACTERS = 400
MAP_ROWS = 500
MAP_CHARACTERS = 200
CHART_GROUPS = 20
ORDER_WINDOWS = 400
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}

Losses = Mapping[str, Sequence[tuple[int, float]]]
"""Group -> the logged training losses as (optimizer step, loss)."""

# Thresholds of the warnings.
_MOST_ROWS = 0.75  # share of all rows in one group
_FAR_ABOVE = 1.25  # planned steps relative to baseline steps
_MANY_REPEATS = 0.01  # repeats relative to all samples


@dataclass(frozen=True, kw_only=True)
class GroupNumbers:
    """One group that has rows or dropped rows; counts of the epoch are as in `epoch_summary`."""

    name: str
    samples: int
    steps: float
    left_out: int
    repeated: int
    dropped: int
    """Rows that training cannot use; `rows` excludes them."""
    id: int | None
    """None for a group of which every row was dropped."""
    rows: int
    share: float
    """Fraction of all rows."""
    prompt_tokens: dict[str, float] | None
    """Quantiles of the tokens per row, interpolated linearly: the keys of `QUANTILES`."""
    response_tokens: dict[str, float] | None
    examples: tuple[dict[str, str], ...]
    """`prompt` and `response` of some rows, cut to `EXAMPLE_CHARACTERS` and not sanitized."""


@dataclass(frozen=True, kw_only=True)
class BatchNumbers:
    """Measures of the batches of an epoch; ratios are None without token counts."""

    steps: int
    pure_micro_batches: float
    """Share of micro-batches that hold one group."""
    pure_micro_steps: float
    """Share of micro-steps whose micro-batches, on all ranks, hold one group."""
    pure_steps: float
    """Share of optimizer steps that hold one group."""
    padding_ratio: float | None
    straggler_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """A row on the embedding map; the text is not sanitized."""

    x: float
    y: float
    group: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Data that only the charts need, of bounded size."""

    order_groups: tuple[int, ...]
    """The `CHART_GROUPS` largest groups, by id, and -1 for other groups and mixed micro-batches."""
    order: tuple[tuple[float, ...], ...]
    """(order groups, windows) share of each group in a window's micro-batches; at most `ORDER_WINDOWS` windows."""
    steps_per_window: float
    map: tuple[MapPoint, ...]
    """A random sample of at most `MAP_ROWS` rows; empty without embeddings."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All numbers of one metric on one dataset, for tables, JSON and HTML."""

    metric: str
    name: str
    """Its name beside others: the metric, or a strategy of `--compare`."""
    rows: int
    samples: int
    """Samples of the plan: the rows, or packs of them."""
    possible_groups: int
    """Number of fitted groups; some may have no rows."""
    groups: tuple[GroupNumbers, ...]
    planned: BatchNumbers
    random: BatchNumbers
    by_length: BatchNumbers | None
    """Baseline of the Trainer's `group_by_length`; None without token counts."""
    longest_run: int
    """Most consecutive steps of the same group."""
    dropped: dict[str, Any]
    """Rows that training cannot use: `rows`, `by_reason` and `by_group`."""
    left_out: int
    """Samples that remainder or weights leave out of the epoch."""
    repeated: int
    mixed_samples: int
    """Samples in steps that the plan mixes."""
    micro_batch_size: int
    world_size: int
    accumulation_steps: int
    purity: str
    remainder: str
    pure_fraction: list[float] | None
    order: str
    weights: Any
    seed: int
    warnings: tuple[str, ...]
    drawing: Drawing

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON values, without the data of the charts and groups of which no row remains."""
        values = dataclasses.asdict(self)
        del values["drawing"]
        return values | {"groups": [group for group in values["groups"] if group["rows"]]}


def inspect_groups(
    grouper: Grouper,
    group_ids: NDArray[np.int64],
    rows: Rows,
    plan: EpochPlan,
    *,
    options: CommonITArguments,
    lengths: NDArray[np.int64] | None = None,
    padding_free: bool = False,
    seed: int = 0,
    embed: bool = False,
    dropped: DroppedRows = NONE_DROPPED,
) -> Inspection:
    """Measure `plan`, the plan of one epoch over these groups.

    Args:
        grouper: a fitted grouper.
        group_ids: (rows,) group ids, none -1.
        rows: the grouped rows.
        plan: a plan of the rows, or of packs of them.
        options: the options of the run.
        lengths: (samples,) cost of each sample of the plan in tokens, None if unknown.
        padding_free: whether micro-batches are computed without padding.
        seed: seed of the random batches and of the examples.
        embed: whether to encode a sample of the rows for the embedding map; metric 'embedding' only.
        dropped: rows that training cannot use.

    Returns:
        Numbers, warnings and chart data.
    """
    summary = epoch_summary(plan, grouper.names, dropped)
    samples = summary["samples"]
    count = len(grouper.names)
    sizes = np.bincount(group_ids, minlength=count)
    members = np.split(np.argsort(group_ids, kind="stable"), np.cumsum(sizes)[:-1])
    rng = np.random.default_rng(seed)
    total = prompt = response = None
    examples: dict[int, tuple[dict[str, str], ...]] = {}
    by_length = None
    drawn: tuple[MapPoint, ...] = ()
    if rows.tokenized:
        with optional("token counts"):
            total = rows.token_counts("total")
        with optional("response lengths"):
            response = rows.token_counts("response")
            prompt = None if total is None else np.maximum(total - response, 0)
    with optional("examples"):
        examples = _examples(rows, members, rng)
    with_rows = {grouper.names[group]: group for group in np.flatnonzero(sizes).tolist()}
    groups = []
    for counts in summary["groups"]:
        group = with_rows.get(counts["name"])
        its_rows = np.zeros(0, dtype=np.int64) if group is None else members[group]
        groups.append(
            GroupNumbers(
                **counts,
                id=group,
                rows=len(its_rows),
                share=len(its_rows) / len(group_ids),
                prompt_tokens=_quantiles(prompt, its_rows),
                response_tokens=_quantiles(response, its_rows),
                examples=() if group is None else examples.get(group, ()),
            )
        )
    # With a collator that pads to a multiple, rows cost more than their tokens.
    tokens = lengths if total is None or len(total) != samples else total
    measure = functools.partial(_measure, plan=plan, lengths=lengths, tokens=tokens, padding_free=padding_free)
    random = measure(*_baseline_batches(rng.permutation(samples), plan))
    if lengths is not None:
        with optional("the baseline by length"):
            by_length = measure(*_baseline_batches(_order_by_length(lengths, plan, seed), plan))
    if embed:
        with optional("the map of the embeddings"):
            drawn = _embedding_map(grouper, group_ids, rows, rng)
    runs = (len(list(steps)) for group, steps in itertools.groupby(plan.step_groups.tolist()) if group >= 0)
    inspection = Inspection(
        metric=grouper.metric,
        name=grouper.metric,
        rows=len(group_ids),
        samples=samples,
        possible_groups=count,
        groups=tuple(groups),
        planned=measure(plan.indices, plan.offsets),
        random=random,
        by_length=by_length,
        longest_run=max(runs, default=0),
        dropped=summary["dropped"],
        left_out=summary["left_out"],
        repeated=summary["repeated"],
        mixed_samples=summary["mixed_samples"],
        micro_batch_size=plan.micro_batch_size,
        world_size=plan.world_size,
        accumulation_steps=plan.accumulation_steps,
        purity=options.commonit_purity,
        remainder=options.commonit_remainder,
        pure_fraction=options.commonit_pure_fraction,
        order=options.commonit_order,
        weights=options.commonit_weights,
        seed=seed,
        warnings=(),
        drawing=_draw_order(plan, sizes, drawn),
    )
    return dataclasses.replace(inspection, warnings=(*grouper.notices, *_advice(inspection)))


def _quantiles(tokens: NDArray[np.int64] | None, rows: NDArray[np.int64]) -> dict[str, float] | None:
    if tokens is None or not len(rows):
        return None
    return dict(zip(QUANTILES, np.quantile(tokens[rows], list(QUANTILES.values())).tolist(), strict=True))


def _examples(
    rows: Rows, members: Sequence[NDArray[np.int64]], rng: np.random.Generator
) -> dict[int, tuple[dict[str, str], ...]]:
    """Return random rows of each of the largest groups, in dataset order; empty without text."""
    groups = [group for group, its_rows in enumerate(members) if len(its_rows)]
    groups = largest(groups, GROUPS_WITH_EXAMPLES, lambda group: len(members[group]))
    picked = [
        np.sort(rng.choice(members[group], min(EXAMPLES_PER_GROUP, len(members[group])), replace=False))
        for group in groups
    ]
    selected = rows.select(np.concatenate(picked))
    try:
        prompts = selected.texts("prompt")
        # Of a row without a prompt, both texts are the same.
        responses = [text if text != prompt else "" for text, prompt in zip(selected.texts("response"), prompts)]
    except ValueError:  # tokens, but no text and no tokenizer
        return {}
    examples = (
        {"prompt": cut(prompt, EXAMPLE_CHARACTERS), "response": cut(response, EXAMPLE_CHARACTERS)}
        for prompt, response in zip(prompts, responses, strict=True)
    )
    return {group: tuple(itertools.islice(examples, len(picks))) for group, picks in zip(groups, picked, strict=True)}


# --- batches ------------------------------------------------------------------------------------------------------


def _baseline_batches(order: NDArray[np.int64], plan: EpochPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return `indices` and `offsets`, as in `EpochPlan`, of samples batched in `order`.

    With several ranks, accelerate (`BatchSamplerShard` with `even_batches`) fills the last micro-step with the first
    samples of the epoch.
    """
    size, ranks = plan.micro_batch_size, plan.world_size
    if ranks > 1:
        order = np.resize(order, -(-len(order) // (size * ranks)) * size * ranks)
    return order, np.append(np.arange(0, len(order), size), len(order))


def _order_by_length(lengths: NDArray[np.int64], plan: EpochPlan, seed: int) -> NDArray[np.int64]:
    """Return the (samples,) order of transformers' `group_by_length`, called as `Trainer` does."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    sampler = LengthGroupedSampler(
        plan.micro_batch_size * plan.accumulation_steps,
        lengths=lengths.tolist(),
        generator=torch.Generator().manual_seed(seed),
    )
    return np.fromiter(sampler, dtype=np.int64, count=len(lengths))


def _measure(
    indices: NDArray[np.int64],
    offsets: NDArray[np.int64],
    plan: EpochPlan,
    lengths: NDArray[np.int64] | None,
    tokens: NDArray[np.int64] | None,
    padding_free: bool,
) -> BatchNumbers:
    """Measure micro-batches in the geometry and groups of `plan`; a sample has `tokens`, and costs `lengths`."""
    starts = offsets[:-1]
    groups = plan.group_ids[indices]
    lowest = np.minimum.reduceat(groups, starts).reshape(-1, plan.world_size)
    highest = np.maximum.reduceat(groups, starts).reshape(-1, plan.world_size)
    steps = np.arange(0, len(lowest), plan.accumulation_steps)  # first micro-step of each step
    in_micro_steps = lowest.min(axis=1), highest.max(axis=1)
    in_steps = np.minimum.reduceat(in_micro_steps[0], steps), np.maximum.reduceat(in_micro_steps[1], steps)
    padding_ratio = straggler_ratio = None
    if lengths is not None and tokens is not None and tokens.any():
        each = np.asarray(lengths, dtype=np.int64)[indices]
        costs = (
            np.add.reduceat(each, starts) if padding_free else np.maximum.reduceat(each, starts) * np.diff(offsets)
        ).reshape(-1, plan.world_size)
        of_ranks = np.add.reduceat(costs, steps, axis=0)
        means = np.maximum(of_ranks.mean(axis=1), 1e-9)  # no division by 0 where a step's rows are empty
        padding_ratio = float(costs.sum() / tokens[indices].sum())
        straggler_ratio = float((of_ranks.max(axis=1) / means).mean())
    return BatchNumbers(
        steps=len(steps),
        pure_micro_batches=float((lowest == highest).mean()),
        pure_micro_steps=float((in_micro_steps[0] == in_micro_steps[1]).mean()),
        pure_steps=float((in_steps[0] == in_steps[1]).mean()),
        padding_ratio=padding_ratio,
        straggler_ratio=straggler_ratio,
    )


# --- advice -------------------------------------------------------------------------------------------------------


def _advice(inspection: Inspection) -> list[str]:
    """Return warnings about the epoch, each with a remedy."""
    advice = []
    baseline, planned, samples = inspection.random.steps, inspection.planned.steps, inspection.samples
    whole, micro_batches = "step", inspection.world_size * inspection.accumulation_steps
    if inspection.purity == "micro":
        whole, micro_batches = "micro-batch", 1
    capacity = inspection.micro_batch_size * micro_batches
    groups = [group for group in inspection.groups if group.rows]
    small = sum(group.samples < capacity for group in groups)
    biggest = max(groups, key=lambda group: group.rows)
    if len(groups) == 1:
        advice.append(
            f"All rows are in one group, {biggest.name!r}: grouping has no effect. Choose another metric, or more "
            "groups."
        )
    elif biggest.share > _MOST_ROWS:
        advice.append(
            f"The group {biggest.name!r} holds {biggest.share:.0%} of the rows, so most steps equal the baseline's. "
            "Choose another metric, or more groups, to split it."
        )
    if small and inspection.remainder == "keep":
        advice.append(
            f"{small} of {len(groups)} groups have fewer than the {capacity} samples of a full {whole}, and train in "
            f"smaller ones at the full learning rate: commonit_remainder='mix' fills full ones of several groups, "
            f"commonit_min_group_size={capacity} merges groups."
        )
    if planned > _FAR_ABOVE * baseline:
        advice.append(
            f"An epoch takes {planned} steps, {planned / baseline:.1f} times the baseline's {baseline}: "
            "commonit_remainder='mix' takes as many, larger groups (commonit_min_group_size) take fewer."
        )
    if count := inspection.dropped["rows"]:
        reasons = "; ".join(f"{reason}: {rows:,}" for reason, rows in inspection.dropped["by_reason"].items())
        most = sorted(inspection.dropped["by_group"].items(), key=lambda item: -item[1])[:5]
        advice.append(
            f"Training cannot use {count:,} of {inspection.rows + count:,} rows ({reasons}), most in "
            f"{', '.join(f'{name!r} ({rows:,})' for name, rows in most)}: raise max_length, or check these rows."
        )
    if inspection.left_out:
        advice.append(
            f"An epoch leaves out {inspection.left_out} of {samples} samples (commonit_remainder="
            f"{inspection.remainder}, commonit_weights={inspection.weights}): commonit_remainder='keep' or 'mix' with "
            "commonit_weights='proportional' trains all of them, but groups that commonit_small_groups drops."
        )
    if inspection.repeated > _MANY_REPEATS * samples:
        advice.append(
            f"An epoch repeats samples {inspection.repeated:,} times, {inspection.repeated / samples:.0%} of "
            f"{samples:,}: commonit_remainder='mix', larger groups (commonit_min_group_size) or fewer micro-batches a "
            "step reduce repeats."
        )
    return advice


# --- charts -------------------------------------------------------------------------------------------------------


def _draw_order(plan: EpochPlan, sizes: NDArray[np.int64], points: tuple[MapPoint, ...]) -> Drawing:
    """Return the share of each group in each window of steps, and `points`."""
    lines = largest(np.flatnonzero(sizes).tolist(), CHART_GROUPS, sizes.__getitem__)
    has_others = np.count_nonzero(sizes) > len(lines) or np.any(plan.micro_batch_groups < 0)
    listed = [*lines, -1] if has_others else lines
    line_of_group = np.full(len(sizes) + 1, len(lines))  # and of mixed micro-batches, which have id -1
    line_of_group[lines] = np.arange(len(lines))
    windows = min(plan.num_steps, ORDER_WINDOWS)
    window_of_step = np.arange(plan.num_micro_steps) // plan.accumulation_steps * windows // plan.num_steps
    cells = line_of_group[plan.micro_batch_groups] * windows + window_of_step[:, None]
    counts = np.bincount(cells.ravel(), minlength=len(listed) * windows).reshape(len(listed), windows)
    shares = (counts / counts.sum(axis=0)).round(3)
    return Drawing(
        order_groups=tuple(listed),
        order=tuple(map(tuple, shares.tolist())),
        steps_per_window=plan.num_steps / windows,
        map=points,
    )


def _embedding_map(
    grouper: Grouper, group_ids: NDArray[np.int64], rows: Rows, rng: np.random.Generator
) -> tuple[MapPoint, ...]:
    """Project the embeddings of a sample of the rows to two dimensions by PCA.

    The sample is encoded again: the cache holds groups, not embeddings (gigabytes for 10^6 rows).
    """
    if not isinstance(grouper, EmbeddingGrouper) or len(group_ids) < 2:
        return ()
    from sklearn.decomposition import PCA

    numbers = np.sort(rng.choice(len(group_ids), min(MAP_ROWS, len(group_ids)), replace=False))
    texts = rows.select(numbers).texts(grouper.options["text"])
    positions = PCA(2, random_state=0).fit_transform(grouper.encode(texts)).round(4).tolist()
    return tuple(
        MapPoint(x=x, y=y, group=int(group), text=cut(text, MAP_CHARACTERS))
        for (x, y), group, text in zip(positions, group_ids[numbers], texts, strict=True)
    )
