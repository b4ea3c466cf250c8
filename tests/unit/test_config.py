"""`CommonITArguments`: valid values are read as their type, and each wrong one raises a line with the fix.

1. Every option has a type, a range or choices; an unknown name or choice is answered with the nearest valid one.
2. An option that the metric ignores is an error; `none` ignores and accepts all.
3. Keyword arguments, the command line and YAML read the same values.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from commonit_trl.config import (
    OPTIONS,
    CommonITArguments,
    check_option_names,
    check_weights,
    nearest,
)


def error_of(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        CommonITArguments(**options)
    return str(caught.value)


# --- values -------------------------------------------------------------------------------------------------


VALID = {
    "task": [
        ("task_column", "kind", ["kind"]),
        ("task_column", ("a", "b"), ["a", "b"]),
        ("purity", "micro", "micro"),
        ("remainder", "drop", "drop"),
        ("min_group_size", "12", 12),
        ("weights", "sqrt", "sqrt"),
        ("weights", {"a": 1, "b": 0.5}, {"a": 1, "b": 0.5}),
        ("weights", {7: 1, 8: 0}, {"7": 1, "8": 0}),
        ("weights", ' {"a": 2}', {"a": 2}),
        ("balance_lengths", "false", False),
        ("cache_dir", "somewhere", "somewhere"),
    ],
    "length": [
        ("num_groups", "4", 4),
        ("num_groups", 4.0, 4),
        ("length_of", "total", "total"),
        ("length_edges", ["64", 256], [64, 256]),
        ("length_edges", [64], [64]),
    ],
    "embedding": [
        ("embedding_model", "org/name", "org/name"),
        ("embedding_text", "both", "both"),
        ("num_groups", 1, 1),
        ("reference_dataset", "ref.jsonl", "ref.jsonl"),
    ],
}


@pytest.mark.parametrize(("metric", "case"), [(metric, case) for metric in VALID for case in VALID[metric]])
def test_a_valid_value_is_read_as_its_type(metric: str, case: tuple[str, Any, Any]) -> None:
    name, given, read = case
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
        ({"resume": "yes"}, "exact, replan"),
        ({"min_group_size": 0}, "at least 1"),
        ({"min_group_size": None}, "integer"),
        ({"balance_lengths": "perhaps"}, "boolean"),
        ({"report": "maybe"}, "boolean"),
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
        ({"num_groups": "many"}, "integer"),
        ({"num_groups": 2.5}, "integer"),
        ({"num_groups": float("nan")}, "finite number"),
        ({"length_of": "answer"}, "response, prompt, total"),
        ({"length_edges": []}, "[64, 256]"),
        ({"length_edges": [9, 9]}, "ascending token counts"),
        ({"length_edges": [9, 4]}, "ascending token counts"),
        ({"length_edges": [9, 2**63]}, "under 2**63"),
        ({"length_edges": [0, 4]}, "above 0"),
        ({"length_edges": 64}, "list"),
        ({"num_groups": 2, "length_edges": [64]}, "commonit_length_edges=[64] | remove one"),
    ],
    "embedding": [
        ({"embedding_text": "promt"}, "did you mean 'prompt'"),
        ({"embedding_dtype": "float8"}, "auto, float32, bfloat16, float16"),
        ({"embedding_model": None}, "string"),
        ({"num_groups": 8, "reference_dataset": "r.csv"}, "commonit_reference_dataset='r.csv' | remove one"),
        ({"reference_task_column": "subject"}, "without commonit_reference_dataset | remove it"),
    ],
    "none": [({"purity": "batch"}, "step, micro")],
    "lenght": [({}, "commonit_metric='lenght' | did you mean 'length'")],
    None: [({}, "commonit_metric is not set | 'task', 'length' or 'embedding' | 'none'")],
}


@pytest.mark.parametrize(("metric", "case"), [(metric, case) for metric in WRONG for case in WRONG[metric]])
def test_a_wrong_value_is_an_error_in_one_line(metric: str | None, case: tuple[dict[str, Any], str]) -> None:
    given, says = case
    message = error_of(commonit_metric=metric, **{f"commonit_{name}": value for name, value in given.items()})
    assert "\n" not in message
    assert all(part in message for part in says.split(" | ")), message
    for name, value in list(given.items())[:1]:
        assert message.startswith((f"commonit_{name}={value!r}", f"commonit_{name}: the weight")), message


@pytest.mark.parametrize("metric", [3, ["task"], True])
def test_a_metric_of_another_type_is_an_error(metric: Any) -> None:
    message = error_of(commonit_metric=metric)
    assert message.startswith("commonit_metric=") and "task" in message


def test_every_option_has_a_help_and_a_type() -> None:
    for name, option in OPTIONS.items():
        assert option.metadata["help"].endswith("."), name
        message = error_of(**{"commonit_metric": "none", name: object()})
        assert message.startswith(f"{name}=<object"), message
        assert "\n" not in message


def test_check_weights_accepts_numeric_groups() -> None:
    check_weights("uniform")
    check_weights({0: 1.0, 1: 0})
    with pytest.raises(ValueError, match="weight None of group 1"):
        check_weights({0: 1.0, 1: None})


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("commonit_metrics", "commonit_metric"),
        ("commonit_taskcolumn", "commonit_task_column"),
        ("commonit_lengths_edge", "commonit_length_edges"),
        ("commonit_min_size", "commonit_min_group_size"),
        ("commonit-purity", "commonit_purity"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    message = error_of(commonit_metric="none", **{wrong: 1})
    assert wrong in message and f"did you mean {right}?" in message


def test_names_without_the_prefix_are_ignored() -> None:
    check_option_names(["learning_rate", "commit", *OPTIONS])


def test_nearest_always_finds_one() -> None:
    assert nearest("zzz", ["only"]) == "only"
    assert nearest("", iter(["a", "b"])) in ("a", "b")


# --- combinations -------------------------------------------------------------------------------------------

READ_BY = {
    "commonit_task_column": (["kind"], {"task"}),
    "commonit_num_groups": (4, {"length", "embedding"}),
    "commonit_length_of": ("total", {"length"}),
    "commonit_length_edges": ([64], {"length"}),
    "commonit_embedding_model": ("model", {"embedding"}),
    "commonit_embedding_text": ("both", {"embedding"}),
    "commonit_embedding_dtype": ("float16", {"embedding"}),
    "commonit_reference_dataset": ("reference.csv", {"embedding"}),
}


@pytest.mark.parametrize("metric", ["task", "length", "embedding", "none"])
@pytest.mark.parametrize("name", READ_BY)
def test_an_option_that_the_metric_ignores_is_an_error(metric: str, name: str) -> None:
    value, metrics = READ_BY[name]
    if metric == "none" or metric in metrics:
        assert getattr(CommonITArguments(commonit_metric=metric, **{name: value}), name) == value
    else:
        message = error_of(commonit_metric=metric, **{name: value})
        assert message.startswith(f"{name}={value!r}") and "remove it" in message
        assert repr(metric) in message and all(repr(reader) in message for reader in metrics)


@pytest.mark.parametrize("metric", ["task", "length", "embedding", "none"])
def test_an_explicit_default_is_never_an_error(metric: str) -> None:
    defaults = {name: option.default for name, option in OPTIONS.items() if name != "commonit_metric"}
    assert CommonITArguments(commonit_metric=metric, **defaults) == CommonITArguments(commonit_metric=metric)


def test_none_is_off_and_the_metrics_are_on() -> None:
    assert not CommonITArguments(commonit_metric="none").commonit_on
    assert CommonITArguments(commonit_metric="length").commonit_on


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


def test_mixed_in_it_checks_its_options_and_lets_the_parent_check_its_own() -> None:
    assert Mixed(commonit_metric="task", learning_rate=1.0).checked
    with pytest.raises(ValueError, match="commonit_metric is not set"):
        Mixed(learning_rate=1.0)
    with pytest.raises(ValueError, match="did you mean commonit_metric"):
        Mixed(commonit_metrik="task")


COMMAND_LINES = {
    "--commonit_metric task --commonit_task_column kind": {"commonit_task_column": ["kind"]},
    "--commonit_metric task --commonit_task_column a b": {"commonit_task_column": ["a", "b"]},
    "--commonit_metric task --commonit_weights uniform": {"commonit_weights": "uniform"},
    "--commonit_metric task --commonit_balance_lengths false": {"commonit_balance_lengths": False},
    "--commonit_metric task --commonit_balance_lengths": {"commonit_balance_lengths": True},
    "--commonit_metric task --commonit_min_group_size 9": {"commonit_min_group_size": 9},
    "--commonit_metric task --commonit_purity micro --commonit_remainder drop": {
        "commonit_purity": "micro",
        "commonit_remainder": "drop",
    },
    "--commonit_metric task --commonit_cache_dir there": {"commonit_cache_dir": "there"},
    "--commonit_metric task --commonit_report false": {"commonit_report": False},
    "--commonit_metric task --commonit_resume replan": {"commonit_resume": "replan"},
    "--commonit_metric length --commonit_num_groups 4 --commonit_length_of total": {
        "commonit_num_groups": 4,
        "commonit_length_of": "total",
    },
    "--commonit_metric length --commonit_length_edges 64 256": {"commonit_length_edges": [64, 256]},
    "--commonit_metric embedding --commonit_embedding_model m --commonit_embedding_text both": {
        "commonit_embedding_model": "m",
        "commonit_embedding_text": "both",
    },
    "--commonit_metric embedding --commonit_embedding_dtype bfloat16": {"commonit_embedding_dtype": "bfloat16"},
    "--commonit_metric embedding --commonit_reference_dataset r.csv --commonit_reference_task_column s": {
        "commonit_reference_dataset": "r.csv",
        "commonit_reference_task_column": "s",
    },
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_command_line_reads_every_option(line: str) -> None:
    (parsed,) = HfArgumentParser(Mixed).parse_args_into_dataclasses(line.split())
    for name, value in COMMAND_LINES[line].items():
        assert getattr(parsed, name) == value


def test_the_command_line_reads_weights_as_json_and_the_lines_above_cover_all_options() -> None:
    line = ["--commonit_metric", "task", "--commonit_weights", '{"a b": 0.5, "c": 2}']
    (parsed,) = HfArgumentParser(Mixed).parse_args_into_dataclasses(line)
    assert parsed.commonit_weights == {"a b": 0.5, "c": 2}
    flags = {flag for line in COMMAND_LINES for flag in line.split() if flag.startswith("--")}
    assert flags == {f"--{field.name}" for field in fields(CommonITArguments)}


def test_yaml_reads_every_option(tmp_path: Path) -> None:
    from trl import TrlParser

    file = tmp_path / "config.yaml"
    for text, expected in {
        "commonit_metric: task\ncommonit_task_column: kind": {"commonit_task_column": ["kind"]},
        "commonit_metric: task\ncommonit_task_column: [a, b]": {"commonit_task_column": ["a", "b"]},
        "commonit_metric: task\ncommonit_weights: {a: 1, 2: 0.5}": {"commonit_weights": {"a": 1, "2": 0.5}},
        "commonit_metric: task\ncommonit_weights: sqrt": {"commonit_weights": "sqrt"},
        "commonit_metric: length\ncommonit_length_edges: [64, 256]": {"commonit_length_edges": [64, 256]},
        "commonit_metric: length\ncommonit_num_groups: 4": {"commonit_num_groups": 4},
        "commonit_metric: none\ncommonit_balance_lengths: false": {"commonit_balance_lengths": False},
    }.items():
        file.write_text(text)
        (parsed,) = TrlParser([Mixed]).parse_args_and_config(["--config", str(file)])
        assert {name: getattr(parsed, name) for name in expected} == expected
    file.write_text("commonit_metric: length\ncommonit_num_groups: 4")
    line = ["--config", str(file), "--commonit_num_groups", "6"]
    assert TrlParser([Mixed]).parse_args_and_config(line)[0].commonit_num_groups == 6
