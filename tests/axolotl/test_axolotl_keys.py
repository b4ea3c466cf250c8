"""The `commonit_*` keys of a recipe through Axolotl's validation.

Axolotl's schema and training arguments have every option; conflicts with other keys are errors of one line; recipes
without the plugin are unchanged.
"""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args, merge_training_args
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from helpers.axolotl_recipes import PLUGIN, make_rows, recipe, write_rows
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
    "column": {"commonit_column": "difficulty", "commonit_num_groups": 4},
    "task+length": {"commonit_task_file": "tasks.parquet", "commonit_num_groups": 4},
    "embedding+column": {
        "commonit_embedding_column": "vector",
        "commonit_column": "difficulty",
        "commonit_num_groups": [16, 4],
    },
    "none": {"commonit_num_groups": 4},
}
FOR_ALL = {
    "commonit_purity": "micro",
    "commonit_remainder": "mix",
    "commonit_pure_fraction": [1.0, 0.0],
    "commonit_order": "pure_first",
    "commonit_heaviest_first": True,
    "commonit_min_group_size": 3,
    "commonit_small_groups": "mix",
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
    """A recipe as Axolotl reads it from a file: length, and `keys`."""
    ours = {"commonit_metric": "length", "commonit_cache_dir": None, "commonit_report": None}
    keys = {"plugins": [PLUGIN], **ours, **keys}
    return DictDefault(yaml.safe_load(yaml.safe_dump(recipe(directory, directory / "rows.jsonl", **keys))))


def validated(directory: Path, **keys: Any) -> DictDefault:
    cfg = written(directory, **keys)
    prepare_plugins(cfg)
    return validate_config(cfg)


def refusal(directory: Path, **keys: Any) -> str:
    """Return the error line of a recipe that fails before Axolotl validates it."""
    with pytest.raises(ValueError) as error:
        prepare_plugins(written(directory, **keys))
    assert type(error.value) is ValueError and "\n" not in str(error.value), error.value
    return str(error.value)


# --- one list of options ----------------------------------------------------------------------------------------------


def test_the_schema_is_the_list_of_options(directory: Path) -> None:
    prepare_plugins(written(directory))
    for schema in merge_input_args():
        ours = {name: field for name, field in schema.model_fields.items() if name.startswith("commonit")}
        assert list(ours) == list(OPTIONS)
        for name, option in OPTIONS.items():
            assert ours[name].default == option.default, name
            assert ours[name].description == option.metadata["help"], name


def test_the_training_arguments_are_the_list_of_options(directory: Path) -> None:
    prepare_plugins(written(directory, plugins=[DISTILLATION, PLUGIN]))

    @dataclass
    class Arguments(merge_training_args(), TrainingArguments):
        """As Axolotl makes them."""

    ours = {field.name: field for field in fields(Arguments) if field.name.startswith("commonit")}
    assert list(ours) == list(OPTIONS)
    assert issubclass(Arguments, CommonITArguments)
    assert not Arguments(use_cpu=True).commonit_on, "a later recipe of the process that does not name the plugin"
    for name in OPTIONS.keys() - {"commonit_metric"}:
        assert ours[name].default == OPTIONS[name].default, name


@pytest.mark.parametrize("options", [{}, FOR_ALL], ids=["defaults", "all"])
@pytest.mark.parametrize("metric", [metric for metric in EVERY_OPTION if metric != "none"])
def test_every_key_survives_validation(directory: Path, metric: str, options: dict[str, Any]) -> None:
    needed = {"commonit_column": "difficulty"} if "column" in metric else {}
    given = {"commonit_metric": metric, **needed, **options, **(EVERY_OPTION[metric] if options else {})}
    cfg = validated(directory, **given)
    assert read_options(cfg) == CommonITArguments(**given)
    again = validate_config(DictDefault(cfg.to_dict()))  # as on a worker of Ray
    assert read_options(again) == CommonITArguments(**given)


def test_the_options_above_are_all() -> None:
    assert set(FOR_ALL).union(*EVERY_OPTION.values()) | {"commonit_metric"} == set(OPTIONS)
    assert set(METRICS) < set(EVERY_OPTION)


# --- refusals ---------------------------------------------------------------------------------------------------------


CONFLICTS = {
    "rl": ("dpo", "CommonITMixin and DPOTrainer"),
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
def test_a_conflict_is_an_error_with_a_fix(directory: Path, key: str) -> None:
    value, fix = CONFLICTS[key]
    line = refusal(directory, **{key: value})
    assert line.startswith(f"{key}: {value!r} does not go with commonit_metric: length: ") and fix in line


BAD_KEYS = [
    # tests/unit/test_config.py tests the rules; these are values and names as YAML reads them
    ({"commonit_metric": None}, "commonit_metric is not set"),
    ({"commonit_metric": True}, "commonit_metric=True"),
    ({"commonit_metric": "none", "commonitpurity": 4}, "commonitpurity: did you mean commonit_purity?"),
    ({"commonit-metric": "task"}, "commonit-metric: did you mean commonit_metric?"),
    ({"commonit_weights": {"a": float("nan")}}, "commonit_weights: the weight nan of group 'a'"),
]


@pytest.mark.parametrize(("keys", "part"), BAD_KEYS)
def test_a_wrong_key_is_an_error(directory: Path, keys: dict[str, Any], part: str) -> None:
    assert part in refusal(directory, **keys)


def test_replanning_needs_unpacked_rows(directory: Path) -> None:
    line = refusal(directory, commonit_resume="replan", sample_packing=True)
    assert line.startswith("commonit_resume: 'replan' does not go with sample_packing: true: ") and "exact" in line


def test_conflicting_keys_may_be_off_and_go_with_none(directory: Path) -> None:
    allowed = {"trainer_cls": "my.Trainer", "curriculum_sampling": True, "dataloader_drop_last": True}
    assert validated(directory, commonit_metric="none", group_by_length=True, **allowed).group_by_length
    off = {"group_by_length": False, "streaming": False, "dataloader_drop_last": False, "context_parallel_size": 1}
    assert validated(directory, **off).commonit_metric == "length"


# --- other plugins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    ("other", "keys"), [(DIFFUSION, {}), (DISTILLATION, {"kd_trainer": True})], ids=["diffusion", "kd"]
)
def test_another_trainer_is_refused_in_either_order(
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


@pytest.mark.parametrize("plugins", [[PLUGIN, LIGER, CUT_CROSS_ENTROPY, DISTILLATION], [LIGER, DISTILLATION, PLUGIN]])
def test_plugins_with_keys_of_their_own_are_combined(directory: Path, plugins: list[str]) -> None:
    keys = {"liger_rms_norm": True, "bf16": True, "kd_alpha": 0.5}
    keys |= {"cut_cross_entropy": True} if CUT_CROSS_ENTROPY in plugins else {}
    cfg = validated(directory, plugins=plugins, commonit_num_groups=4, **keys)
    assert (cfg.commonit_num_groups, cfg.liger_rms_norm, cfg.kd_alpha) == ([4], True, 0.5)
    assert PluginManager.get_instance().load_datasets(cfg) is None
    assert PluginManager.get_instance().get_trainer_cls(cfg).__name__ == "CommonITAxolotlTrainer"
    if CUT_CROSS_ENTROPY in plugins:
        with pytest.raises(ValueError, match="fp16/bf16"):  # the check of another plugin
            validated(directory, plugins=plugins, **{**keys, "bf16": False})


# --- recipes of one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [DISTILLATION]], ids=["no plugins", "another plugin"])
@pytest.mark.parametrize("metric", ["task", "none"])
def test_a_later_recipe_without_the_plugin_is_unchanged(directory: Path, metric: str, others: list[str]) -> None:
    """Axolotl calls the plugins of earlier recipes of the process."""
    validated(directory, commonit_metric=metric)
    manager = PluginManager.get_instance()
    later = validated(directory, plugins=others or None, commonit_metric=None)
    assert PLUGIN in manager.plugins
    assert later.commonit_metric is None
    assert manager.load_datasets(later) is None
    assert manager.get_trainer_cls(later) is None
    assert not any(name.startswith("commonit") for name in manager.get_training_args(later))
    manager.post_trainer_create(later, object())


def test_an_earlier_recipe_without_the_plugin_does_not_matter(directory: Path) -> None:
    """Axolotl makes its training arguments once in a process, from the plugins of that moment."""
    from axolotl.core import training_args

    PluginManager.get_instance().plugins.clear()
    importlib.reload(training_args)
    assert not issubclass(training_args.AxolotlTrainingArguments, CommonITArguments)
    validated(directory)
    assert issubclass(training_args.AxolotlTrainingArguments, CommonITArguments)
