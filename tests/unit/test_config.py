"""`CommonITArguments` validates every option, and errors name a fix in one line.

1. Types, ranges and choices are checked; an invalid choice gets the nearest valid one as a suggestion.
2. An unknown `commonit_*` name gets the nearest valid one as a suggestion.
3. An option that the metric does not use is an error; `none` accepts all options.
4. All front ends of the dataclass agree: keyword arguments, the command line, YAML.
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


def refusal(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        CommonITArguments(**options)
    return str(caught.value)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, read",
    [
        ({"commonit_metric": "task", "commonit_task_column": "kind"}, ["kind"]),
        ({"commonit_metric": "task", "commonit_task_column": ("a", "b")}, ["a", "b"]),
        ({"commonit_metric": "length", "commonit_num_groups": "4"}, 4),
        ({"commonit_metric": "length", "commonit_num_groups": 4.0}, 4),
        ({"commonit_metric": "length", "commonit_length_of": "total"}, "total"),
        ({"commonit_metric": "length", "commonit_length_edges": ["64", 256]}, [64, 256]),
        ({"commonit_metric": "length", "commonit_length_edges": [64]}, [64]),
        ({"commonit_metric": "embedding", "commonit_embedding_model": "org/name"}, "org/name"),
        ({"commonit_metric": "embedding", "commonit_embedding_text": "both"}, "both"),
        ({"commonit_metric": "embedding", "commonit_num_groups": 1}, 1),
        ({"commonit_metric": "embedding", "commonit_reference_dataset": "ref.jsonl"}, "ref.jsonl"),
        ({"commonit_metric": "task", "commonit_purity": "micro"}, "micro"),
        ({"commonit_metric": "task", "commonit_remainder": "drop"}, "drop"),
        ({"commonit_metric": "task", "commonit_min_group_size": "12"}, 12),
        ({"commonit_metric": "task", "commonit_weights": "sqrt"}, "sqrt"),
        ({"commonit_metric": "task", "commonit_weights": {"a": 1, "b": 0.5}}, {"a": 1, "b": 0.5}),
        ({"commonit_metric": "task", "commonit_weights": {7: 1, 8: 0}}, {"7": 1, "8": 0}),
        ({"commonit_metric": "task", "commonit_weights": ' {"a": 2}'}, {"a": 2}),
        ({"commonit_metric": "task", "commonit_balance_lengths": "false"}, False),
        ({"commonit_metric": "task", "commonit_cache_dir": "somewhere"}, "somewhere"),
        ({"commonit_metric": "none"}, "none"),
    ],
)
def test_valid_values_are_converted_to_their_type(given: dict[str, Any], read: Any) -> None:
    value = getattr(CommonITArguments(**given), list(given)[-1])
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({}, ["commonit_metric is not set", "'task', 'length' or 'embedding'", "'none'"]),
        ({"commonit_metric": "lenght"}, ["commonit_metric='lenght'", "did you mean 'length'"]),
        ({"commonit_metric": 3}, ["commonit_metric='3'", "task, length, embedding, none"]),
        ({"commonit_metric": ["task"]}, ["commonit_metric=['task']", "valid string"]),
        ({"commonit_metric": "task", "commonit_task_column": []}, ["commonit_task_column=[]", "name one"]),
        ({"commonit_metric": "task", "commonit_task_column": {"a": 1}}, ["commonit_task_column={'a': 1}"]),
        ({"commonit_metric": "length", "commonit_num_groups": 0}, ["commonit_num_groups=0", "at least 1"]),
        (
            {"commonit_metric": "length", "commonit_num_groups": "many"},
            ["commonit_num_groups='many'", "integer"],
        ),
        ({"commonit_metric": "length", "commonit_num_groups": 2.5}, ["commonit_num_groups=2.5", "integer"]),
        (
            {"commonit_metric": "length", "commonit_length_of": "answer"},
            ["commonit_length_of='answer'", "response"],
        ),
        (
            {"commonit_metric": "length", "commonit_length_edges": []},
            ["commonit_length_edges=[]", "[64, 256]"],
        ),
        ({"commonit_metric": "length", "commonit_length_edges": [9, 9]}, ["commonit_length_edges=[9, 9]"]),
        ({"commonit_metric": "length", "commonit_length_edges": [9, 4]}, ["ascending token counts"]),
        ({"commonit_metric": "length", "commonit_length_edges": [9, 2**63]}, ["ascending token counts", "under 2**63"]),
        ({"commonit_metric": "length", "commonit_length_edges": [0, 4]}, ["above 0"]),
        ({"commonit_metric": "length", "commonit_length_edges": 64}, ["commonit_length_edges=64", "list"]),
        (
            {"commonit_metric": "length", "commonit_length_edges": [64], "commonit_num_groups": 2},
            ["commonit_num_groups=2", "commonit_length_edges=[64]", "remove one"],
        ),
        (
            {"commonit_metric": "embedding", "commonit_embedding_text": "promt"},
            ["commonit_embedding_text='promt'", "did you mean 'prompt'"],
        ),
        (
            {"commonit_metric": "embedding", "commonit_embedding_model": None},
            ["commonit_embedding_model=None"],
        ),
        (
            {"commonit_metric": "embedding", "commonit_reference_dataset": "r.csv", "commonit_num_groups": 8},
            ["commonit_num_groups=8", "commonit_reference_dataset='r.csv'", "remove one"],
        ),
        (
            {"commonit_metric": "embedding", "commonit_reference_task_column": "subject"},
            ["commonit_reference_task_column='subject'", "without commonit_reference_dataset"],
        ),
        (
            {"commonit_metric": "task", "commonit_purity": "batch"},
            ["commonit_purity='batch'", "step, micro"],
        ),
        ({"commonit_metric": "task", "commonit_remainder": "dorp"}, ["commonit_remainder='dorp'", "'drop'"]),
        (
            {"commonit_metric": "task", "commonit_min_group_size": 0},
            ["commonit_min_group_size=0", "at least 1"],
        ),
        ({"commonit_metric": "task", "commonit_min_group_size": None}, ["commonit_min_group_size=None"]),
        (
            {"commonit_metric": "task", "commonit_balance_lengths": "perhaps"},
            ["commonit_balance_lengths='perhaps'"],
        ),
        ({"commonit_metric": "task", "commonit_cache_dir": ["a"]}, ["commonit_cache_dir=['a']", "string"]),
        (
            {"commonit_metric": "task", "commonit_weights": "uniformly"},
            ["commonit_weights", "did you mean 'uniform'"],
        ),
        ({"commonit_metric": "task", "commonit_weights": None}, ["commonit_weights=None", "'proportional'"]),
        ({"commonit_metric": "task", "commonit_weights": '{"a": }'}, ["is not JSON", '{"group": 0.5}']),
        (
            {"commonit_metric": "task", "commonit_weights": {"a": -1}},
            ["weight -1 of group 'a'", "number >= 0"],
        ),
        ({"commonit_metric": "task", "commonit_weights": {"a": float("nan")}}, ["weight nan of group 'a'"]),
        ({"commonit_metric": "task", "commonit_weights": {"a": float("inf")}}, ["weight inf of group 'a'"]),
        ({"commonit_metric": "task", "commonit_weights": {"a": 10**400}}, ["of group 'a'", "at most 1e+100"]),
        ({"commonit_metric": "task", "commonit_weights": '{"a":' + "[" * 100_000}, ["is not JSON", '{"group": 0.5}']),
        ({"commonit_metric": "task", "commonit_weights": {"a": "1"}}, ["weight '1' of group 'a'"]),
        ({"commonit_metric": "task", "commonit_weights": {"a": 0, "b": 0.0}}, ["above 0"]),
        ({"commonit_metric": "task", "commonit_weights": {}}, ["above 0"]),
        ({"commonit_metric": "none", "commonit_purity": "batch"}, ["commonit_purity='batch'"]),
    ],
)
def test_invalid_values_raise_one_line_errors(options: dict[str, Any], parts: list[str]) -> None:
    message = refusal(**options)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_every_option_has_help_and_validates_its_value() -> None:
    for name, option in OPTIONS.items():
        assert option.metadata["help"].endswith("."), name
        message = refusal(**{"commonit_metric": "none", name: object()})
        assert message.startswith(f"{name}=<object"), message
        assert "\n" not in message


def test_check_weights_accepts_names_and_group_ids() -> None:
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
def test_unknown_option_suggests_the_nearest(wrong: str, right: str) -> None:
    assert refusal(commonit_metric="none", **{wrong: 1}) == f"Unknown option {wrong}: did you mean {right}?"


def test_options_of_other_libraries_are_accepted() -> None:
    check_option_names(["learning_rate", "commit", *OPTIONS])


def test_nearest_always_returns_a_member() -> None:
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
def test_option_unused_by_the_metric_is_an_error(metric: str, name: str) -> None:
    value, metrics = READ_BY[name]
    if metric == "none" or metric in metrics:
        assert getattr(CommonITArguments(commonit_metric=metric, **{name: value}), name) == value
    else:
        message = refusal(commonit_metric=metric, **{name: value})
        assert message.startswith(f"{name}={value!r} is read by commonit_metric=")
        assert f"not by {metric!r}" in message and all(repr(reader) in message for reader in metrics)


@pytest.mark.parametrize("metric", ["task", "length", "embedding", "none"])
def test_explicit_defaults_are_accepted(metric: str) -> None:
    defaults = {name: option.default for name, option in OPTIONS.items() if name != "commonit_metric"}
    assert CommonITArguments(commonit_metric=metric, **defaults) == CommonITArguments(commonit_metric=metric)


def test_commonit_on_is_false_for_none_only() -> None:
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


def test_mixin_validates_and_calls_the_parent() -> None:
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
def test_command_line_parses_every_option(line: str) -> None:
    (parsed,) = HfArgumentParser(Mixed).parse_args_into_dataclasses(line.split())
    for name, value in COMMAND_LINES[line].items():
        assert getattr(parsed, name) == value


def test_command_line_parses_weights_as_json() -> None:
    line = ["--commonit_metric", "task", "--commonit_weights", '{"a b": 0.5, "c": 2}']
    (parsed,) = HfArgumentParser(Mixed).parse_args_into_dataclasses(line)
    assert parsed.commonit_weights == {"a b": 0.5, "c": 2}
    # COMMAND_LINES covers all options.
    flags = {flag for line in COMMAND_LINES for flag in line.split() if flag.startswith("--")}
    assert flags == {f"--{field.name}" for field in fields(CommonITArguments)}


def test_yaml_parses_every_option(tmp_path: Path) -> None:
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
