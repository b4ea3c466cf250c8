"""`CommonITArguments`: each valid value is read as its type, and each wrong one is an error of one line with the fix.

An option that the metric ignores is an error; `none` ignores and accepts all. Keyword arguments, the command line and
YAML read the same values.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from commonit_trl.config import OPTIONS, CommonITArguments, check_option_names, check_weights


def error_of(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        CommonITArguments(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- values -------------------------------------------------------------------------------------------------

VALID = [
    # metric, option without `commonit_`, given, read
    ("task", "task_column", "kind", ["kind"]),
    ("task", "task_column", ("a", "b"), ["a", "b"]),
    ("task", "min_group_size", "12", 12),
    ("task", "weights", {7: 1, 8: 0}, {"7": 1, "8": 0}),
    ("task", "weights", ' {"a": 2}', {"a": 2}),
    ("task", "balance_lengths", "false", False),
    ("length", "num_groups", 4.0, [4]),
    ("embedding+length", "num_groups", ("16", 4), [16, 4]),
    ("length", "length_edges", ["64", 256], [64, 256]),
]


@pytest.mark.parametrize(("metric", "name", "given", "read"), VALID)
def test_a_valid_value_is_read_as_its_type(metric: str, name: str, given: Any, read: Any) -> None:
    value = getattr(CommonITArguments(commonit_metric=metric, **{f"commonit_{name}": given}), f"commonit_{name}")
    assert value == read and type(value) is type(read)


WRONG_WEIGHTS = [-1, float("nan"), float("inf"), 10**400, "1", None]
WRONG = {
    # metric: the options without `commonit_`, parts of the line besides the first option and its value
    "task": [
        ({"task_column": []}, "name one"),
        ({"task_column": {"a": 1}}, "label column"),
        ({"purity": "batch"}, "step, micro"),
        ({"remainder": "dorp"}, "did you mean 'drop'"),
        ({"order": "up"}, "random, ascending"),
        ({"pure_fraction": 0.5}, "commonit_remainder='mix'"),
        ({"pure_fraction": 1.5, "remainder": "mix"}, "from 0 to 1"),
        ({"order": "pure_first"}, "commonit_remainder='mix'"),
        ({"order": "mixed_first", "remainder": "drop"}, "mixes no steps"),
        ({"pure_fraction": [], "remainder": "mix"}, "one or more"),
        ({"small_groups": "drop"}, "Set commonit_min_group_size"),
        ({"small_groups": "mix", "min_group_size": 5}, "commonit_remainder='mix'"),
        ({"task_column": ["kind"], "task_file": "tasks.parquet"}, "remove one"),
        ({"resume": "yes"}, "exact, replan"),
        ({"min_group_size": 0}, "at least 1"),
        ({"min_group_size": None}, "integer"),
        ({"balance_lengths": "perhaps"}, "boolean"),
        ({"cache_dir": ["a"]}, "string"),
        ({"cache_dir": ""}, "names no directory"),
        ({"weights": "uniformly"}, "did you mean 'uniform'"),
        ({"weights": None}, "'proportional'"),
        ({"weights": [1, 2]}, "mapping"),
        ({"weights": '{"a": }'}, 'is not JSON | {"group": 0.5}'),
        ({"weights": '{"a":' + "[" * 100_000}, 'is not JSON | {"group": 0.5}'),
        ({"weights": {"a": 0, "b": 0.0}}, "above 0"),
        ({"weights": {}}, "above 0"),
        *(({"weights": {"a": weight}}, f"weight {weight!r} of group 'a' | number >= 0") for weight in WRONG_WEIGHTS),
    ],
    "length": [
        ({"num_groups": 0}, "at least 1"),
        ({"num_groups": 2.5}, "integer"),
        ({"num_groups": float("nan")}, "finite number"),
        ({"length_of": "answer"}, "response, prompt, total"),
        ({"length_edges": []}, "[64, 256]"),
        ({"length_edges": [9, 9]}, "ascending token counts"),
        ({"length_edges": [9, 2**63]}, "under 2**63"),
        ({"length_edges": [0, 4]}, "above 0"),
        ({"length_edges": 64}, "list"),
        ({"num_groups": 2, "length_edges": [64]}, "commonit_length_edges=[64] | remove one"),
        ({"num_groups": [2, 3]}, "takes 1"),
    ],
    "embedding": [
        ({"embedding_text": "promt"}, "did you mean 'prompt'"),
        ({"embedding_dtype": "float8"}, "auto, float32, bfloat16, float16"),
        ({"embedding_model": None}, "string"),
        ({"num_groups": 8, "reference_dataset": "r.csv"}, "commonit_reference_dataset='r.csv' | remove one"),
        ({"reference_task_column": "subject"}, "without commonit_reference_dataset | remove it"),
        ({"order": "ascending"}, "'embedding+length'"),
        ({"embedding_text": "both", "embedding_column": "vector"}, "commonit_embedding_column='vector' | remove one"),
    ],
    "column": [({}, "needs commonit_column")],
    "task+length": [({"length_of": "answer"}, "response, prompt, total")],
    "embedding+length": [({"num_groups": 4}, "[32, 8]")],
    "task+lenght": [({}, "did you mean 'length'")],
    "task+task": [({}, "two different ones")],
    "task+length+embedding": [({}, "two different ones")],
    "task+none": [({}, "is not one of task, length")],
    "none": [({"purity": "batch"}, "step, micro")],
    "lenght": [({}, "commonit_metric='lenght' | did you mean 'length'")],
    True: [({}, "commonit_metric=True | 'task'")],
    None: [({}, "commonit_metric is not set | 'task', 'length', 'embedding' or 'column' | 'none'")],
}


@pytest.mark.parametrize(("metric", "case"), [(metric, case) for metric in WRONG for case in WRONG[metric]])
def test_a_wrong_value_is_an_error_in_one_line(metric: Any, case: tuple[dict[str, Any], str]) -> None:
    given, says = case
    message = error_of(commonit_metric=metric, **{f"commonit_{name}": value for name, value in given.items()})
    assert all(part in message for part in says.split(" | ")), message
    name, value = next(iter(given.items()), ("metric", metric))
    assert message.startswith((f"commonit_{name}={value!r}", f"commonit_{name}: the weight")) or not given, message


def test_every_option_has_a_help_and_a_type() -> None:
    for name, option in OPTIONS.items():
        assert option.metadata["help"].endswith("."), name
        message = error_of(**{"commonit_metric": "none", name: object()})
        assert message.startswith(f"{name}=<object"), message


def test_check_weights_accepts_numeric_groups() -> None:
    check_weights({0: 1.0, 1: 0})
    with pytest.raises(ValueError, match="weight None of group 1"):
        check_weights({0: 1.0, 1: None})


# --- names and combinations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("commonit_metrics", "commonit_metric"),
        ("commonit_lengths_edge", "commonit_length_edges"),
        ("commonit_min_size", "commonit_min_group_size"),
        ("commonit-purity", "commonit_purity"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(wrong: str, right: str) -> None:
    check_option_names(["learning_rate", "commit", *OPTIONS])
    message = error_of(commonit_metric="none", **{wrong: 1})
    assert wrong in message and f"did you mean {right}?" in message


READ_BY = {
    "commonit_task_column": (["kind"], {"task"}),
    "commonit_num_groups": ([4], {"length", "embedding", "column"}),
    "commonit_task_file": ("tasks.parquet", {"task"}),
    "commonit_embedding_column": ("vector", {"embedding"}),
    "commonit_length_of": ("total", {"length"}),
    "commonit_length_edges": ([64], {"length"}),
    "commonit_embedding_model": ("model", {"embedding"}),
    "commonit_embedding_text": ("both", {"embedding"}),
    "commonit_embedding_dtype": ("float16", {"embedding"}),
    "commonit_reference_dataset": ("reference.csv", {"embedding"}),
}


@pytest.mark.parametrize("metric", ["task", "length", "embedding", "none"])
def test_an_option_that_the_metric_ignores_is_an_error(metric: str) -> None:
    for name, (value, metrics) in READ_BY.items():
        if metric == "none" or metric in metrics:
            assert getattr(CommonITArguments(commonit_metric=metric, **{name: value}), name) == value
        else:
            message = error_of(commonit_metric=metric, **{name: value})
            assert message.startswith(f"{name}=") and str(value) in message and "remove it" in message
            assert repr(metric) in message and all(repr(reader) in message for reader in metrics)


@pytest.mark.parametrize("metric", ["task", "length", "embedding", "none"])
def test_an_explicit_default_is_never_an_error(metric: str) -> None:
    defaults = {name: option.default for name, option in OPTIONS.items() if name != "commonit_metric"}
    options = CommonITArguments(commonit_metric=metric, **defaults)
    assert options == CommonITArguments(commonit_metric=metric)
    assert options.commonit_on == (metric != "none")


# --- front ends ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Parent:
    learning_rate: float = 0.1
    checked: bool = False

    def __post_init__(self) -> None:
        self.checked = True


@dataclass(kw_only=True)
class Mixed(CommonITArguments, Parent):
    pass


def test_a_subclass_checks_its_options_and_those_of_the_parent() -> None:
    assert Mixed(commonit_metric="task", learning_rate=1.0).checked
    with pytest.raises(ValueError, match="commonit_metric is not set"):
        Mixed(learning_rate=1.0)
    with pytest.raises(ValueError, match="did you mean commonit_metric"):
        Mixed(commonit_metrik="task")


COMMAND_LINES: list[dict[str, tuple[str, Any]]] = [
    # option without `commonit_`: arguments, value
    {
        "metric": ("task", "task"),
        "task_column": ("a b", ["a", "b"]),
        "weights": ('{"a":0.5}', {"a": 0.5}),
        "balance_lengths": ("", True),
        "min_group_size": ("9", 9),
        "purity": ("micro", "micro"),
        "remainder": ("mix", "mix"),
        "pure_fraction": ("1 0.5", [1.0, 0.5]),
        "order": ("pure_first", "pure_first"),
        "heaviest_first": ("true", True),
        "small_groups": ("drop", "drop"),
        "cache_dir": ("there", "there"),
        "report": ("false", False),
        "resume": ("replan", "replan"),
    },
    {"metric": ("length", "length"), "num_groups": ("4", [4]), "length_of": ("total", "total")},
    {"metric": ("column+task", "column+task"), "column": ("score", "score"), "task_file": ("t.parquet", "t.parquet")},
    {"metric": ("embedding", "embedding"), "embedding_column": ("v", "v"), "num_groups": ("4", [4])},
    {"metric": ("length", "length"), "length_edges": ("64 256", [64, 256]), "weights": ("uniform", "uniform")},
    {
        "metric": ("embedding", "embedding"),
        "embedding_model": ("m", "m"),
        "embedding_text": ("both", "both"),
        "embedding_dtype": ("bfloat16", "bfloat16"),
        "reference_dataset": ("r.csv", "r.csv"),
        "reference_task_column": ("s", "s"),
    },
]


@pytest.mark.parametrize("options", COMMAND_LINES)
def test_the_command_line_reads_every_option(options: dict[str, tuple[str, Any]]) -> None:
    words = [word for name, (given, _) in options.items() for word in (f"--commonit_{name}", *given.split())]
    (parsed,) = HfArgumentParser(Mixed).parse_args_into_dataclasses(words)
    assert {name: getattr(parsed, f"commonit_{name}") for name in options} == {
        name: value for name, (_, value) in options.items()
    }
    named = {f"commonit_{name}" for line in COMMAND_LINES for name in line}
    assert named == {field.name for field in fields(CommonITArguments)}


def test_yaml_reads_lists_mappings_and_numbers(tmp_path: Path) -> None:
    from trl import TrlParser

    file = tmp_path / "config.yaml"
    for text, name, value in (
        ("commonit_metric: task\ncommonit_task_column: kind", "task_column", ["kind"]),
        ("commonit_metric: task\ncommonit_weights: {a: 1, 2: 0.5}", "weights", {"a": 1, "2": 0.5}),
        ("commonit_metric: length\ncommonit_length_edges: [64, 256]", "length_edges", [64, 256]),
        ("commonit_metric: none\ncommonit_balance_lengths: false", "balance_lengths", False),
        ("commonit_metric: length\ncommonit_num_groups: 4", "num_groups", [4]),
        ("commonit_metric: embedding+length\ncommonit_num_groups: [16, 4]", "num_groups", [16, 4]),
        ("commonit_metric: none\ncommonit_remainder: mix\ncommonit_pure_fraction: 0.5", "pure_fraction", [0.5]),
    ):
        file.write_text(text)
        (parsed,) = TrlParser([Mixed]).parse_args_and_config(["--config", str(file)])
        assert getattr(parsed, f"commonit_{name}") == value
    line = ["--config", str(file), "--commonit_num_groups", "6"]  # flags override the file
    assert TrlParser([Mixed]).parse_args_and_config(line)[0].commonit_num_groups == [6]
