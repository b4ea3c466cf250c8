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

METRICS = ("task", "length", "embedding", "none")
DEFAULT_TASK_COLUMNS = ("task", "task_name", "category", "source", "dataset")
DEFAULT_NUM_GROUPS = {"length": 8, "embedding": 32}

PURITIES = ("step", "micro")
REMAINDERS = ("keep", "mix", "drop")
ORDERS = ("random", "ascending", "descending", "pure_first", "mixed_first")
_CHOICES = {
    "commonit_metric": METRICS,
    "commonit_length_of": ("response", "prompt", "total"),
    "commonit_embedding_text": ("prompt", "response", "both"),
    "commonit_embedding_dtype": ("auto", "float32", "bfloat16", "float16"),
    "commonit_purity": PURITIES,
    "commonit_remainder": REMAINDERS,
    "commonit_resume": ("exact", "replan"),
}
_LARGEST_WEIGHT = 1e100  # keeps the sum of weights finite
WEIGHT_NAMES = ("proportional", "uniform", "sqrt")
READ_BY = {
    "commonit_task_column": ("task",),
    "commonit_num_groups": ("length", "embedding"),
    "commonit_length_of": ("length",),
    "commonit_length_edges": ("length",),
    "commonit_embedding_model": ("embedding",),
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
            "help": "Required. How to group the data: 'task', 'length', 'embedding' or 'none' (baseline batches)."
        },
    )
    commonit_task_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metric 'task': the label column, or several to combine. Default: the "
            f"dataset's first of {', '.join(DEFAULT_TASK_COLUMNS)}."
        },
    )
    commonit_num_groups: int | None = field(
        default=None,
        metadata={
            "help": "Number of quantile bins (metric 'length', default 8) or of k-means clusters (metric "
            "'embedding' without a reference dataset, default 32)."
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
            "sample) or 'drop'."
        },
    )
    commonit_min_group_size: int = field(
        default=1,
        metadata={
            "help": "Merge groups with fewer rows: a length bin into its smaller neighbour, a cluster into the "
            "nearest, small tasks into 'other'."
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
        return self.commonit_metric != "none"


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
            "commonit_metric is not set: write commonit_metric='task', 'length' or 'embedding', or 'none' to "
            "train with baseline batches."
        )
    if isinstance(options.commonit_task_column, str):
        options.commonit_task_column = [options.commonit_task_column]
    if isinstance(options.commonit_weights, str) and options.commonit_weights.lstrip().startswith("{"):
        options.commonit_weights = _parse_mapping("commonit_weights", options.commonit_weights)
    for name, option in OPTIONS.items():
        value = getattr(options, name)
        try:
            setattr(options, name, _VALIDATORS[name].validate_python(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{name}={value!r}: {reason}. {option.metadata['help']}") from None
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
        if metric not in metrics and getattr(options, name) != OPTIONS[name].default:
            raise ValueError(
                f"{name}={getattr(options, name)!r} is read by "
                f"commonit_metric={' or '.join(map(repr, metrics))} only, not by {metric!r}: remove it or "
                "change commonit_metric."
            )
    for name, least in (("commonit_num_groups", 1), ("commonit_min_group_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    edges = options.commonit_length_edges
    if edges is not None:
        if not edges or edges[0] < 1 or edges[-1] >= 2**63 or any(low >= high for low, high in pairwise(edges)):
            raise ValueError(
                f"commonit_length_edges={edges} must be one or more ascending token counts above 0 and under 2**63, "
                "e.g. [64, 256]."
            )
        if options.commonit_num_groups is not None:
            raise ValueError(
                f"commonit_num_groups={options.commonit_num_groups} and commonit_length_edges={edges} both "
                "set the number of bins: remove one."
            )
    if options.commonit_cache_dir == "":
        raise ValueError("commonit_cache_dir='' names no directory: name one, or remove the option.")
    if options.commonit_task_column is not None and not options.commonit_task_column:
        raise ValueError("commonit_task_column=[] names no column: name one or more, or remove the option.")
    if options.commonit_reference_dataset is not None and options.commonit_num_groups is not None:
        raise ValueError(
            f"commonit_num_groups={options.commonit_num_groups} has no use with commonit_reference_dataset="
            f"{options.commonit_reference_dataset!r}, whose tasks are the groups: remove one."
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
