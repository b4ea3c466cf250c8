"""Checks of the Axolotl internals that the plugin depends on; a failure names the code to adapt."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import axolotl.utils.data.sft as sft
import axolotl.utils.data.shared as shared
import axolotl.utils.data.wrappers as wrappers
import pytest
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_training_args
from helpers.axolotl_recipes import PLUGIN
from helpers.toys import QUIET, id_rows, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from axolotl_plugin import labels
from axolotl_plugin.trainer import CommonITAxolotlTrainer, accepts_loss_kwargs

# --- data preparation: functions that axolotl_plugin/labels.py replaces and calls -------------------------------------

CALLERS = [
    (sft._load_and_process_single_dataset, sft, ["get_dataset_wrapper"]),
    (
        sft._load_tokenized_prepared_datasets,
        sft,
        ["generate_dataset_hash_from_config", "load_preprocessed_dataset", "try_load_from_hub"],
    ),
    (
        sft._load_raw_datasets,
        sft,
        ["generate_dataset_hash_from_config", "deduplicate_and_log_datasets", "save_preprocessed_dataset"],
    ),
    (shared.create_train_validation_split, shared, ["deduplicate_and_log_datasets"]),
    (wrappers._handle_loaded_strategy, wrappers, ["wrap_dataset_for_tokenized_prompt"]),
    (wrappers._handle_custom_dataset_type, wrappers, ["wrap_dataset_for_tokenized_prompt"]),
    *((handler, wrappers, ["wrap_dataset_for_tokenized_prompt"]) for handler in wrappers.DATASET_HANDLERS.values()),
]


@pytest.mark.parametrize("name", sorted({name for _, name in labels._REPLACED}))
def test_replacements_have_original_signatures(name: str) -> None:
    ours = inspect.signature(getattr(labels, name)).parameters.values()
    for (module, replaced), theirs in labels._REPLACED.items():
        if replaced == name:
            parameters = inspect.signature(theirs).parameters.values()
            described = [[(p.name, p.kind, p.default) for p in side] for side in (ours, parameters)]
            assert described[0] == described[1], f"{module.__name__}.{name} takes other arguments than labels.{name}"
            assert module.__name__.startswith("axolotl.") and theirs is not getattr(labels, name)


def test_axolotl_calls_replaced_functions_by_name() -> None:
    """Callers must look the function up by name in the module, or replacing it has no effect."""
    replaced = set()
    for caller, module, names in CALLERS:
        caller = inspect.unwrap(caller)
        for name in names:
            message = (
                f"{caller.__module__}.{caller.__name__} does not call {module.__name__}.{name} by its name any more"
            )
            assert caller.__globals__ is vars(module) and name in caller.__code__.co_names, message
            replaced.add((module, name))
    assert replaced == set(labels._REPLACED), "what labels.py replaces and what is checked here differ"


# --- the trainer ------------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, **settings: Any) -> Any:
    """Make training arguments as Axolotl does for a recipe with the plugin."""
    PluginManager.get_instance().register(PLUGIN)

    @dataclass
    class Arguments(merge_training_args(), TrainingArguments):
        pass

    quiet = {name: value for name, value in QUIET.items() if name != "max_length"}
    return Arguments(output_dir=str(tmp_path), commonit_cache_dir=str(tmp_path), **{**quiet, **settings})


def adapted() -> Any:
    return get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


MODELS = {name: lambda name=name: tiny_model(name) for name in ("llama", "qwen2", "bloom")} | {"peft": adapted}


@pytest.mark.parametrize("name", MODELS)
def test_accepts_loss_kwargs_matches_transformers(tmp_path: Path, name: str) -> None:
    """`AxolotlTrainer` sets the flag to False for these models, so a step's loss would be a mean of means."""
    args = arguments(tmp_path)
    rows = id_rows([6, 6]).remove_columns(["task", "row"])
    expected = Trainer(model=MODELS[name](), args=args, train_dataset=rows).model_accepts_loss_kwargs
    assert accepts_loss_kwargs(MODELS[name]()) == expected
    plain = AxolotlTrainer(model=MODELS[name](), args=args, train_dataset=rows)
    assert not plain.model_accepts_loss_kwargs, "axolotl_plugin.trainer.accepts_loss_kwargs is not needed any more"
    args.commonit_metric = "length"
    args.commonit_num_groups = 2
    ours = CommonITAxolotlTrainer(
        model=MODELS[name](), args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    assert ours.model_accepts_loss_kwargs == expected


@pytest.mark.parametrize("real_batches", [True, False])
def test_bin_capacity_matches_axolotl(tmp_path: Path, real_batches: bool) -> None:
    args = arguments(
        tmp_path,
        sample_packing=True,
        multipack_real_batches=real_batches,
        max_seq_length=64,
        per_device_train_batch_size=4,
        dataset_num_proc=1,
    )
    rows = id_rows([20, 20])
    given = {"train_dataset": rows, "processing_class": tiny_tokenizer()}
    plain = AxolotlTrainer(model=tiny_model(), args=args, **given)
    sampler = plain._create_multipack_sampler(SequentialSampler(rows), rows)
    args.commonit_metric = "task"
    args.commonit_task_column = ["task"]
    ours = CommonITAxolotlTrainer(model=tiny_model(), args=args, **given)
    assert ours.commonit.bins.capacity == sampler.batch_max_len == (64 if real_batches else 256)
    assert ours.commonit_plan().micro_batch_size == sampler.batch_size == (4 if real_batches else 1)
    ours._train_batch_size = 2  # as `auto_find_batch_size` sets it
    ours.get_train_dataloader()
    assert ours.commonit.bins.capacity == (64 if real_batches else 128)
    assert ours.commonit_plan().micro_batch_size == (2 if real_batches else 1)
    taken = inspect.signature(type(sampler)).parameters
    assert {"group_size", "bin_size", "sequential", "num_processes", "mp_start_method"} <= set(taken)
