"""Define every `commonit_*` option: its type, default, help and validation.

`CommonITArguments` is a plain dataclass, so it works with `HfArgumentParser`, `TrlParser` and any subclass of
`TrainingArguments`; other front ends derive their options from its fields. `__post_init__` validates: types with
pydantic, choices and combinations here. Every error is a one-line `ValueError` with the option, its value and a fix.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Self, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

METRICS = ("task", "length", "embedding", "column")
"""The metrics that group; two joined by `+` group by both."""
NO_METRIC = "none"
DEFAULT_TASK_COLUMNS = ("task", "task_name", "category", "source", "dataset")
DEFAULT_NUM_GROUPS = {"length": 8, "embedding": 32, "column": 8}

PURITIES = ("step", "micro")
REMAINDERS = ("keep", "mix", "drop")
ORDERS = ("random", "ascending", "descending", "pure_first", "mixed_first")
_CHOICES = {
    "commonit_length_of": ("response", "prompt", "total"),
    "commonit_embedding_text": ("prompt", "response", "both"),
    "commonit_embedding_dtype": ("auto", "float32", "bfloat16", "float16"),
    "commonit_purity": PURITIES,
    "commonit_remainder": REMAINDERS,
    "commonit_order": ORDERS,
    "commonit_small_groups": ("merge", "mix", "drop"),
    "commonit_resume": ("exact", "replan"),
}
_WRAPPED = ("commonit_task_column", "commonit_num_groups", "commonit_pure_fraction")
_LARGEST_WEIGHT = 1e100  # keeps the sum of weights finite
WEIGHT_NAMES = ("proportional", "uniform", "sqrt")
READ_BY = {
    "commonit_task_column": ("task",),
    "commonit_task_file": ("task",),
    "commonit_column": ("column",),
    "commonit_num_groups": ("length", "embedding", "column"),
    "commonit_length_of": ("length",),
    "commonit_length_edges": ("length",),
    "commonit_embedding_model": ("embedding",),
    "commonit_embedding_column": ("embedding",),
    "commonit_embedding_text": ("embedding",),
    "commonit_embedding_dtype": ("embedding",),
    "commonit_reference_dataset": ("embedding",),
    "commonit_reference_task_column": ("embedding",),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the member of `known` closest in spelling to `word`."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


@dataclass(kw_only=True)
class CommonITArguments:
    """Mix in the `commonit_*` options: `class MyArgs(CommonITArguments, Parent)`.

    Raises:
        ValueError: if the metric is missing, an option is unknown or unused by the metric, or a value is invalid.
    """

    commonit_metric: str | None = field(
        default=None,
        metadata={
            "help": "Required. How to group the data: 'task', 'length', 'embedding', 'column', two joined as in "
            "'task+length' (the second inside each group of the first), or 'none' (baseline batches)."
        },
    )
    commonit_task_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metric 'task': the label column, or several to combine. Default: the "
            f"dataset's first of {', '.join(DEFAULT_TASK_COLUMNS)}."
        },
    )
    commonit_task_file: str | None = field(
        default=None,
        metadata={
            "help": "Metric 'task': Parquet file with the task of each row of the training data, by row number, "
            "instead of a label column; `commonit group` writes one."
        },
    )
    commonit_column: str | None = field(
        default=None,
        metadata={"help": "Metric 'column': the column of numbers (difficulty, quality, ...), cut into quantile bins."},
    )
    commonit_num_groups: list[int] | None = field(
        default=None,
        metadata={
            "help": "Number of quantile bins (metrics 'length' and 'column', default 8) or of k-means clusters (metric "
            "'embedding' without a reference dataset, default 32). Two joined metrics take one number each."
        },
    )
    commonit_length_of: str = field(
        default="response",
        metadata={"help": "Metric 'length': tokens of the 'response', 'prompt' or 'total', after truncation."},
    )
    commonit_length_edges: list[int] | None = field(
        default=None,
        metadata={"help": "Metric 'length': explicit bin edges in tokens, ascending, instead of quantiles."},
    )
    commonit_embedding_model: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Metric 'embedding': name or local path of a sentence-transformers model."},
    )
    commonit_embedding_column: str | None = field(
        default=None,
        metadata={
            "help": "Metric 'embedding': a column of vectors that were computed elsewhere, instead of the encoder; a "
            "reference dataset needs it too."
        },
    )
    commonit_embedding_text: str = field(
        default="prompt",
        metadata={"help": "Metric 'embedding': text to encode, 'prompt', 'response' or 'both'."},
    )
    commonit_embedding_dtype: str = field(
        default="auto",
        metadata={
            "help": "Metric 'embedding': precision of the encoder, 'float32', 'bfloat16' or 'float16'. Default: "
            "'bfloat16' if the device supports it: faster, but rows near two centroids may change group."
        },
    )
    commonit_reference_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Metric 'embedding': hub name or local file of a reference set; each row joins the nearest "
            "reference task (the paper uses the MMLU dev set). Default: k-means."
        },
    )
    commonit_reference_task_column: str = field(
        default="task",
        metadata={"help": "Metric 'embedding': the task label column of the reference dataset."},
    )
    commonit_purity: str = field(
        default="step",
        metadata={
            "help": "Scope within which all samples share a group: an optimizer 'step' (all its micro-batches, on all "
            "ranks) or a single micro-batch ('micro')."
        },
    )
    commonit_remainder: str = field(
        default="keep",
        metadata={
            "help": "Samples of a group that do not fill a step: 'keep' (its steps differ in size by at most one "
            "sample), 'mix' (they fill steps of several groups, so an epoch has as many steps as the baseline's) "
            "or 'drop'."
        },
    )
    commonit_pure_fraction: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of the full steps that stay pure, from 0 to 1 (default); the samples of the others are "
            "mixed. A list has one number per epoch, the last for all that follow. Needs commonit_remainder 'mix' or "
            "'drop'."
        },
    )
    commonit_order: str = field(
        default="random",
        metadata={
            "help": "Order of steps: 'random'; 'ascending' or 'descending' by length, by the column's value or by task "
            "name; 'pure_first' or 'mixed_first'."
        },
    )
    commonit_heaviest_first: bool = field(
        default=False,
        metadata={
            "help": "Start the first epoch with the step whose largest micro-batch has the most tokens, so that "
            "running out of memory happens at once."
        },
    )
    commonit_min_group_size: int = field(
        default=1,
        metadata={"help": "Rows below which a group is small; commonit_small_groups says what becomes of it."},
    )
    commonit_small_groups: str = field(
        default="merge",
        metadata={
            "help": "Groups under commonit_min_group_size: 'merge' (a bin into its smaller neighbour, a cluster into "
            "the nearest, small tasks into 'other'), 'mix' (all their rows, with commonit_remainder 'mix') or 'drop'."
        },
    )
    # HfArgumentParser reads a union in this order as str.
    commonit_weights: dict[str, Any] | str | None = field(
        default="proportional",
        metadata={
            "help": "Weight of each group in an epoch of unchanged length: 'proportional' to its rows (every row "
            "once), 'uniform', 'sqrt' of its rows, or a mapping of group name to weight (JSON on the command line)."
        },
    )
    commonit_balance_lengths: bool = field(
        default=True,
        metadata={
            "help": "Balance the token lengths in each step: micro-batches with different sample counts, less padding, "
            "equal cost per rank. The step's gradient does not change."
        },
    )
    commonit_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Directory of the group cache. Default: 'commonit' in the datasets cache."},
    )
    commonit_report: bool = field(
        default=True,
        metadata={
            "help": "Write a report on groups and batches to <output_dir>/commonit/report.html before training, and "
            "update it afterwards with the loss of each group."
        },
    )

    commonit_resume: str = field(
        default="exact",
        metadata={
            "help": "Resume from a checkpoint with other settings (ranks, batch size, accumulation, seed, grouping): "
            "'exact' fails, 'replan' plans the remaining samples of the epoch with the new settings."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_option_names(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        validate_options(self)
        parent_init = getattr(super(), "__post_init__", None)
        if parent_init is not None:
            parent_init()

    @property
    def commonit_on(self) -> bool:
        """Whether the metric groups the data; `none` trains exactly as the parent trainer."""
        return self.commonit_metric != NO_METRIC


OPTIONS = {option.name: option for option in fields(CommonITArguments)}
# Not `Field.type`, which HfArgumentParser overwrites. A group named 7 is a number in YAML.
_VALIDATORS = {
    name: TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
    for name, hint in get_type_hints(CommonITArguments).items()
}


def check_option_names(names: Iterable[str]) -> None:
    """Raise a `ValueError` with the closest valid option for an unknown `commonit_*` name."""
    for name in names:
        if name.startswith("commonit") and name not in OPTIONS:
            raise ValueError(f"Unknown option {name}: did you mean {nearest(name, OPTIONS)}?")


def parts_of(metric: str | None) -> list[str]:
    """Return the metrics that a metric joins; of a single one, itself."""
    return str(metric).split("+")


def is_read(option: str, metric: str | None) -> bool:
    """Return whether a metric reads an option; some are read by every metric that groups."""
    return any(part in READ_BY.get(option, METRICS) for part in parts_of(metric))


def check_metric(option: str, metric: str) -> None:
    """Raise a `ValueError` for a metric that is neither known nor two known ones joined."""
    parts = parts_of(metric)
    if metric == NO_METRIC:
        return
    for part in parts:
        check_choice(option, part, METRICS if len(parts) > 1 else (*METRICS, NO_METRIC))
    if len(parts) > 2 or len(set(parts)) < len(parts):
        raise ValueError(
            f"{option}={metric!r} joins {len(parts)} metrics: join two different ones, as in 'task+length'."
        )


def wrap_lists(options: Any) -> None:
    """Make lists of options that take one and were given a single value, in place."""
    for name in _WRAPPED:
        value = getattr(options, name)
        if value is not None and not isinstance(value, list | tuple):
            setattr(options, name, [value])


def _as_given(value: Any) -> Any:
    """Return the value of a list of one, which `wrap_lists` may have made."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def check_choice(option: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"{option}={value!r} is not one of {', '.join(choices)}: did you mean {nearest(str(value), choices)!r}?"
        )


def validate_options(options: CommonITArguments) -> None:
    """Check and normalise all options in place.

    Raises:
        ValueError: see `CommonITArguments`.
    """
    if options.commonit_metric is None:
        raise ValueError(
            "commonit_metric is not set: write commonit_metric='task', 'length', 'embedding' or 'column', or 'none' to "
            "train with baseline batches."
        )
    wrap_lists(options)
    if isinstance(options.commonit_weights, str) and options.commonit_weights.lstrip().startswith("{"):
        options.commonit_weights = _parse_mapping("commonit_weights", options.commonit_weights)
    for name, option in OPTIONS.items():
        value = getattr(options, name)
        try:
            setattr(options, name, _VALIDATORS[name].validate_python(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            given = _as_given(value) if name in _WRAPPED else value
            raise ValueError(f"{name}={given!r}: {reason}. {option.metadata['help']}") from None
    check_metric("commonit_metric", options.commonit_metric)
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(options, name), choices)
    if options.commonit_on:
        _check_combinations(options)


def _parse_mapping(option: str, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        example = '{"group": 0.5}'
        raise ValueError(f"{option}={text!r} is not JSON: {error}. Write for example {example!r}.") from None


def _check_combinations(options: CommonITArguments) -> None:
    metric = options.commonit_metric
    for name, metrics in READ_BY.items():
        if not is_read(name, metric) and getattr(options, name) != OPTIONS[name].default:
            raise ValueError(
                f"{name}={getattr(options, name)!r} is read by "
                f"commonit_metric={' or '.join(map(repr, metrics))} only, not by {metric!r}: remove it or "
                "change commonit_metric."
            )
    if options.commonit_min_group_size < 1:
        raise ValueError(f"commonit_min_group_size={options.commonit_min_group_size} must be at least 1.")
    _check_num_groups(options)
    _check_composition(options)
    edges = options.commonit_length_edges
    if edges is not None and (
        not edges or edges[0] < 1 or edges[-1] >= 2**63 or any(low >= high for low, high in pairwise(edges))
    ):
        raise ValueError(
            f"commonit_length_edges={edges} must be one or more ascending token counts above 0 and under 2**63, "
            "e.g. [64, 256]."
        )
    if options.commonit_cache_dir == "":
        raise ValueError("commonit_cache_dir='' names no directory: name one, or remove the option.")
    if options.commonit_task_column is not None and not options.commonit_task_column:
        raise ValueError("commonit_task_column=[] names no column: name one or more, or remove the option.")
    if options.commonit_task_column is not None and options.commonit_task_file is not None:
        raise ValueError(
            f"commonit_task_column={options.commonit_task_column} and commonit_task_file="
            f"{options.commonit_task_file!r} both name the tasks: remove one."
        )
    if "column" in parts_of(metric) and not options.commonit_column:
        raise ValueError("commonit_metric='column' needs commonit_column: name a column of numbers.")
    for name in ("commonit_embedding_model", "commonit_embedding_text", "commonit_embedding_dtype"):
        value = getattr(options, name)
        if options.commonit_embedding_column is not None and value != OPTIONS[name].default:
            raise ValueError(
                f"{name}={value!r} has no use with commonit_embedding_column={options.commonit_embedding_column!r}, "
                "which replaces the encoder: remove one."
            )
    column = options.commonit_reference_task_column
    if options.commonit_reference_dataset is None and column != OPTIONS["commonit_reference_task_column"].default:
        raise ValueError(
            f"commonit_reference_task_column={column!r} has no use without commonit_reference_dataset: set "
            "that too, or remove it."
        )
    if options.commonit_weights is None:
        raise ValueError("commonit_weights=None: write 'proportional', the default, or another weighting.")
    check_weights(options.commonit_weights)


def num_groups_by_metric(options: CommonITArguments) -> dict[str, int]:
    """Return metric -> `commonit_num_groups`, or its default, for the metrics that make a number of groups."""
    counted, given = _counted_metrics(options), options.commonit_num_groups
    return dict(zip(counted, [DEFAULT_NUM_GROUPS[part] for part in counted] if given is None else given, strict=True))


def _counted_metrics(options: CommonITArguments) -> list[str]:
    """Return the metrics that make a number of groups: not by explicit edges, nor by a reference."""
    fixed = {"length": options.commonit_length_edges, "embedding": options.commonit_reference_dataset}
    parts = parts_of(options.commonit_metric)
    return [part for part in parts if part in DEFAULT_NUM_GROUPS and fixed.get(part) is None]


def _check_num_groups(options: CommonITArguments) -> None:
    given, counted = options.commonit_num_groups, _counted_metrics(options)
    if given is None:
        return
    if not given or min(given) < 1:
        raise ValueError(f"commonit_num_groups={_as_given(given)} must be at least 1.")
    if not counted:
        other = "commonit_length_edges" if options.commonit_length_edges else "commonit_reference_dataset"
        raise ValueError(
            f"commonit_num_groups={_as_given(given)} has no use with {other}={getattr(options, other)!r}, which makes "
            "the groups: remove one."
        )
    if len(given) != len(counted):
        example = [DEFAULT_NUM_GROUPS[part] for part in counted]
        raise ValueError(
            f"commonit_num_groups={_as_given(given)}: commonit_metric={options.commonit_metric!r} takes "
            f"{len(counted)}, for {' and '.join(counted)}. Write for example {example}."
        )


def _check_composition(options: CommonITArguments) -> None:
    fractions, remainder = options.commonit_pure_fraction, options.commonit_remainder
    if fractions is not None:
        if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(f"commonit_pure_fraction={_as_given(fractions)} must be one or more numbers from 0 to 1.")
        if remainder == "keep" and min(fractions) < 1:
            raise ValueError(
                f"commonit_pure_fraction={_as_given(fractions)} mixes samples, and commonit_remainder='keep' mixes "
                "none: set commonit_remainder='mix' (or 'drop')."
            )
    if options.commonit_order in ("pure_first", "mixed_first") and remainder != "mix" and min(fractions or [1]) == 1:
        raise ValueError(
            f"commonit_order={options.commonit_order!r}: commonit_remainder={remainder!r} mixes no steps. Set "
            "commonit_remainder='mix', or another order."
        )
    small, least = options.commonit_small_groups, options.commonit_min_group_size
    if small != "merge" and least == 1:
        raise ValueError(f"commonit_small_groups={small!r}: no group is small. Set commonit_min_group_size.")
    if small == "mix" and remainder != "mix":
        raise ValueError(f"commonit_small_groups='mix' needs commonit_remainder='mix', not {remainder!r}: set it.")
    parts = parts_of(options.commonit_metric)
    by_value = options.commonit_order in ("ascending", "descending")
    if by_value and "embedding" in parts and not {"length", "column"} & set(parts):
        raise ValueError(
            f"commonit_order={options.commonit_order!r}: clusters have no order. Group by length or column too, as in "
            "commonit_metric='embedding+length', or set another order."
        )


def check_weights(weights: Mapping[Any, Any] | str) -> None:
    """Check `commonit_weights`: a known name, or a mapping to numbers >= 0 that are not all 0."""
    if isinstance(weights, str):
        check_choice("commonit_weights", weights, WEIGHT_NAMES)
        return
    for group, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 <= weight <= _LARGEST_WEIGHT:
            raise ValueError(
                f"commonit_weights: the weight {weight!r} of group {group!r} must be a number >= 0, and at most "
                f"{_LARGEST_WEIGHT:g}."
            )
    if not any(weights.values()):
        raise ValueError(f"commonit_weights={weights!r} gives no group a weight above 0. Give one a weight.")
