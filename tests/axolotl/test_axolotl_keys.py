"""Axolotl's validation of the `commonit_*` keys.

Valid keys are kept; wrong values and conflicts are refused in one line with the fix; recipes without the plugin are
unchanged.
"""

import importlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args, merge_training_args
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from helpers.axolotl_recipes import PLUGIN, make_rows, recipe, write_recipe, write_rows
from transformers import TrainingArguments

from axolotl_plugin.args import read_options
from commonit_trl.config import METRICS, OPTIONS, CommonITArguments

LIGER = "axolotl.integrations.liger.LigerPlugin"
CUT_CROSS_ENTROPY = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
DISTILLATION = "axolotl.integrations.kd.KDPlugin"
DIFFUSION = "axolotl.integrations.diffusion.DiffusionPlugin"
EVERY_OPTION = {
    "task": {"commonit_task_column": ["subject", "level"]},
    "length": {"commonit_length_of": "total", "commonit_length_edges": [16, 64]},
    "embedding": {
        "commonit_embedding_model": "some/encoder",
        "commonit_embedding_text": "both",
        "commonit_embedding_dtype": "float32",
        "commonit_reference_dataset": "mmlu.jsonl",
        "commonit_reference_task_column": "subject",
    },
    "none": {"commonit_num_groups": 4},
}
FOR_ALL = {
    "commonit_purity": "micro",
    "commonit_remainder": "drop",
    "commonit_min_group_size": 3,
    "commonit_weights": {"a group": 0.5, "b.c": 2, 7: 1},
    "commonit_balance_lengths": False,
    "commonit_cache_dir": "groups",
    "commonit_report": False,
    "commonit_resume": "replan",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    write_rows(directory / "rows.jsonl", make_rows({"a": 3}))
    return directory


def written(directory: Path, **keys: Any) -> DictDefault:
    """Return a recipe with metric length and `keys`, as Axolotl reads it from a file."""
    ours = {"commonit_metric": "length", "commonit_cache_dir": None, "commonit_report": None}
    keys = {"plugins": [PLUGIN], **ours, **keys}
    return DictDefault(yaml.safe_load(yaml.safe_dump(recipe(directory, directory / "rows.jsonl", **keys))))


def validated(directory: Path, **keys: Any) -> DictDefault:
    cfg = written(directory, **keys)
    prepare_plugins(cfg)
    return validate_config(cfg)


def refusal(directory: Path, **keys: Any) -> str:
    """Return the one-line error that refuses a recipe before Axolotl validates it."""
    with pytest.raises(ValueError) as error:
        prepare_plugins(written(directory, **keys))
    assert type(error.value) is ValueError and "\n" not in str(error.value), error.value
    return str(error.value)


# --- one list of options ----------------------------------------------------------------------------------------------


def test_schema_has_all_options(directory: Path) -> None:
    prepare_plugins(written(directory))
    for schema in merge_input_args():
        ours = {name: field for name, field in schema.model_fields.items() if name.startswith("commonit")}
        assert list(ours) == list(OPTIONS)
        for name, option in OPTIONS.items():
            assert ours[name].default == option.default, name
            assert ours[name].description == option.metadata["help"], name


def test_training_arguments_have_all_options(directory: Path) -> None:
    prepare_plugins(written(directory, plugins=[DISTILLATION, PLUGIN]))

    @dataclass
    class Arguments(merge_training_args(), TrainingArguments):
        pass

    ours = {field.name: field for field in fields(Arguments) if field.name.startswith("commonit")}
    assert list(ours) == list(OPTIONS)
    assert issubclass(Arguments, CommonITArguments)
    assert not Arguments(use_cpu=True).commonit_on, "a later recipe of the process that does not name the plugin"
    for name in OPTIONS.keys() - {"commonit_metric"}:
        assert ours[name].default == OPTIONS[name].default, name


@pytest.mark.parametrize("metric", METRICS)
def test_validation_keeps_every_key(directory: Path, metric: str) -> None:
    given = {"commonit_metric": metric, **FOR_ALL, **EVERY_OPTION[metric]}
    cfg = validated(directory, **given)
    assert read_options(cfg) == CommonITArguments(**given)
    again = validate_config(DictDefault(cfg.to_dict()))  # as on a Ray worker
    assert read_options(again) == CommonITArguments(**given)


def test_parametrization_covers_every_option() -> None:
    named = set(FOR_ALL).union(*EVERY_OPTION.values())
    assert named | {"commonit_metric"} == set(OPTIONS)


def test_other_options_have_defaults(directory: Path) -> None:
    cfg = validated(directory)
    assert asdict(read_options(cfg)) == asdict(CommonITArguments(commonit_metric="length"))


def test_single_task_column_becomes_list(directory: Path) -> None:
    cfg = validated(directory, commonit_metric="task", commonit_task_column="subject")
    assert cfg.commonit_task_column == ["subject"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"commonit_purity": "micro"}], ids=["no key", "another key"])
def test_missing_metric_lists_metrics(directory: Path, keys: dict[str, Any]) -> None:
    message = refusal(directory, commonit_metric=None, **keys)
    assert "commonit_metric is not set" in message
    assert all(metric in message for metric in METRICS)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("commonit_num_group", "commonit_num_groups"),
        ("commonit_tasks_column", "commonit_task_column"),
        ("commonit_balance_length", "commonit_balance_lengths"),
        ("commonitpurity", "commonit_purity"),
    ],
)
@pytest.mark.parametrize("metric", ["length", "none"])
def test_misspelt_key_suggests_nearest(directory: Path, metric: str, key: str, nearest: str) -> None:
    message = refusal(directory, commonit_metric=metric, **{key: 4})
    assert message == f"Unknown option {key}: did you mean {nearest}?"


def test_misspelt_metric_key_suggests_metric(directory: Path) -> None:
    assert "did you mean commonit_metric?" in refusal(directory, commonit_metric=None, commonit_metrics="length")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"commonit_metric": "lenght"}, ["commonit_metric='lenght'", "'length'"]),
        ({"commonit_metric": False}, ["commonit_metric=False", "'none' (baseline batches)"]),
        ({"commonit_purity": "steps"}, ["commonit_purity='steps'", "'step'"]),
        ({"commonit_num_groups": "many"}, ["commonit_num_groups='many'", "valid integer"]),
        ({"commonit_num_groups": 0}, ["commonit_num_groups=0", "at least 1"]),
        ({"commonit_length_edges": [64, 32]}, ["commonit_length_edges=[64, 32]", "ascending"]),
        ({"commonit_balance_lengths": "maybe"}, ["commonit_balance_lengths='maybe'", "valid boolean"]),
        ({"commonit_weights": {"a": -1}}, ["commonit_weights", "'a'", ">= 0"]),
        ({"commonit_task_column": "task"}, ["commonit_task_column=['task']", "'length'", "remove it"]),
    ],
    ids=lambda value: ",".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_value_names_option_value_and_fix(directory: Path, keys: dict[str, Any], expected: list[str]) -> None:
    message = refusal(directory, **keys)
    assert all(part in message for part in expected), message


CONFLICTS = {
    "rl": ("dpo", "supervised"),
    "reward_model": (True, "remove one"),
    "process_reward_model": (True, "remove one"),
    "trainer_cls": ("my.Trainer", "remove trainer_cls"),
    "group_by_length": (True, "commonit_balance_lengths"),
    "curriculum_sampling": (True, "remove it"),
    "streaming": (True, "set it to false"),
    "pretraining_dataset": ("some/dataset", "list the data in datasets:"),
    "skip_prepare_dataset": (True, "set it to false"),
    "dataloader_drop_last": (True, "commonit_remainder: drop"),
    "context_parallel_size": (2, "set it to 1"),
    "sequence_parallel_degree": (2, "set it to 1"),
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_conflicting_key_is_refused(directory: Path, key: str) -> None:
    value, way_out = CONFLICTS[key]
    message = refusal(directory, **{key: value})
    assert message.startswith(f"{key}: {value!r} does not go with commonit_metric: length: "), message
    assert way_out in message


def test_replan_refuses_sample_packing(directory: Path) -> None:
    message = refusal(directory, commonit_resume="replan", sample_packing=True)
    assert message.startswith("commonit_resume: 'replan' does not go with sample_packing: true: "), message
    assert validated(directory, commonit_resume="replan").commonit_resume == "replan"


def test_conflicting_keys_are_allowed_when_off(directory: Path) -> None:
    allowed = {"trainer_cls": "my.Trainer", "curriculum_sampling": True, "dataloader_drop_last": True}
    assert validated(directory, commonit_metric="none", group_by_length=True, **allowed).group_by_length
    off = {"group_by_length": False, "streaming": False, "dataloader_drop_last": False, "context_parallel_size": 1}
    assert validated(directory, **off).commonit_metric == "length"


# --- other plugins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    ("other", "keys"), [(DIFFUSION, {}), (DISTILLATION, {"kd_trainer": True})], ids=["diffusion", "kd"]
)
def test_plugin_with_other_trainer_is_refused(
    directory: Path, other: str, keys: dict[str, Any], ours_first: bool
) -> None:
    plugins = [PLUGIN, other] if ours_first else [other, PLUGIN]
    cfg = validated(directory, plugins=plugins, **keys)
    for preprocess in (True, False):
        with pytest.raises(ValueError, match="also selects the trainer") as error:
            PluginManager.get_instance().load_datasets(cfg, preprocess=preprocess)
        assert other in str(error.value) and "commonit_metric: none" in str(error.value)
        assert "\n" not in str(error.value)
    off = validated(directory, plugins=plugins, commonit_metric="none", **keys)
    assert PluginManager.get_instance().load_datasets(off) is None


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_plugins_with_own_keys_combine(directory: Path, place: int) -> None:
    plugins = [LIGER, CUT_CROSS_ENTROPY, DISTILLATION]
    plugins.insert(place, PLUGIN)
    keys = {"liger_rms_norm": True, "cut_cross_entropy": True, "bf16": True, "kd_alpha": 0.5}
    cfg = validated(directory, plugins=plugins, commonit_num_groups=4, **keys)
    assert (cfg.commonit_num_groups, cfg.liger_rms_norm, cfg.cut_cross_entropy, cfg.kd_alpha) == (4, True, True, 0.5)
    assert PluginManager.get_instance().load_datasets(cfg) is None
    assert PluginManager.get_instance().get_trainer_cls(cfg).__name__ == "CommonITAxolotlTrainer"
    with pytest.raises(ValueError, match="fp16/bf16"):  # checks of other plugins still run
        validated(directory, plugins=plugins, **{**keys, "bf16": False})


# --- recipes of one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [DISTILLATION]], ids=["no plugins", "another plugin"])
@pytest.mark.parametrize("metric", ["task", "length", "none"])
def test_later_recipe_without_plugin_is_unchanged(directory: Path, metric: str, others: list[str]) -> None:
    """Axolotl still calls the plugins of earlier recipes in the same process."""
    validated(directory, commonit_metric=metric)
    manager = PluginManager.get_instance()
    later = validated(directory, plugins=others or None, commonit_metric=None)
    assert PLUGIN in manager.plugins
    assert later.commonit_metric is None
    assert manager.load_datasets(later) is None
    assert manager.get_trainer_cls(later) is None
    assert not any(name.startswith("commonit") for name in manager.get_training_args(later))
    manager.post_trainer_create(later, object())


def test_earlier_recipe_without_plugin_has_no_effect(directory: Path) -> None:
    """Axolotl builds its training arguments once per process, from the plugins registered by then."""
    from axolotl.core import training_args

    PluginManager.get_instance().plugins.clear()
    importlib.reload(training_args)
    assert not issubclass(training_args.AxolotlTrainingArguments, CommonITArguments)
    validated(directory)
    assert issubclass(training_args.AxolotlTrainingArguments, CommonITArguments)


def test_load_recipe_from_file(directory: Path) -> None:
    path = write_recipe(directory / "file.yml", written(directory, commonit_num_groups=4).to_dict())
    cfg = load_cfg(str(path))
    assert read_options(cfg) == CommonITArguments(commonit_metric="length", commonit_num_groups=4)
    overridden = load_cfg(str(path), commonit_num_groups="5")  # as `accelerate launch -m axolotl.cli.train` does
    assert overridden.commonit_num_groups == 5
