"""Wrong settings and data raise one line when the trainer is made: the option, its value and the fix; no file is left.

tests/unit/test_config.py has the rules of `config.py`; one of them shows here that they hold before loading a model.
"""

from dataclasses import fields

import pytest
from datasets import DatasetDict, IterableDataset
from helpers.bad_input import check_refusal, no_new_file
from helpers.kinds import our_arguments, ours
from helpers.toys import id_rows
from helpers.trainers import make_trainer
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig

from commonit_trl import CommonITSFTTrainer

ROWS = id_rows([5, 4, 3])
MISSING_MODEL = "no-such-owner/no-such-model"  # loading it would raise another error
FIELDS = {field.name: field for field in fields(TrainingArguments)}
OTHER_STRATEGIES = set(FIELDS["train_sampling_strategy"].metadata["choices"]) - {"random"}


def check_error(tmp_path, *says, rows=ROWS, **options):
    """Check that the trainer raises one line with these parts and leaves no file in the output directory."""
    with no_new_file(tmp_path), pytest.raises(ValueError) as error:
        make_trainer(tmp_path, rows, model=MISSING_MODEL, **options)
    check_refusal(str(error.value), says)


SETTINGS = [
    *(({"train_sampling_strategy": name}, f"={name!r} | leave it at 'random'") for name in sorted(OTHER_STRATEGIES)),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True | set it to False"),
    ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches=True | set it to"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last=True | commonit_remainder='drop'"),
    (
        {"auto_find_batch_size": True, "commonit_resume": "replan"},
        "auto_find_batch_size=True | 'replan'",
    ),
    ({"ignore_data_skip": True}, "ignore_data_skip=True | set it to False"),
    ({"commonit_task_column": "taks"}, "commonit_task_column='taks' | task, row"),
    ({"commonit_matric": "task"}, "commonit_matric | did you mean commonit_metric?"),
]


@pytest.mark.parametrize(("options", "says"), SETTINGS, ids=str)
def test_settings_before_the_model_is_loaded(tmp_path, options, says):
    check_error(tmp_path, *says.split(" | "), **options)


DATASETS = {
    "streaming": (IterableDataset.from_generator(lambda: iter(ROWS)), "train_dataset is a IterableDataset | streaming"),
    "list": (list(ROWS), "train_dataset is a list | Dataset.from_list"),
    "splits": (DatasetDict({"train": ROWS}), "train_dataset is a DatasetDict | give a datasets.Dataset"),
    "empty": (ROWS.select([]), "train_dataset has no rows"),
    "no task column": (
        ROWS.remove_columns("task"),
        "commonit_metric='task' | input_ids, labels, row | commonit_task_column",
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_before_the_model_is_loaded(tmp_path, name):
    rows, says = DATASETS[name]
    check_error(tmp_path, *says.split(" | "), rows=rows)


@pytest.mark.parametrize("config", [SFTConfig, TrainingArguments, None], ids=str)
def test_arguments_without_options(tmp_path, config):
    args = config and config(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=r"no commonit_\* options: .*CommonITSFTConfig"):
        CommonITSFTTrainer(model=MISSING_MODEL, args=args, train_dataset=ROWS)


@pytest.mark.parametrize(
    ("trainer", "config", "options", "parts"),
    [
        (KTOTrainer, KTOConfig, {}, ["loss_type='kto'", "apo_zero_unpaired", "train_sampling_strategy='random'"]),
        (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}, ["train_sampling_strategy='sequential'", "random"]),
        (GRPOTrainer, GRPOConfig, {}, ["GRPOTrainer._get_train_sampler", "commonit_metric='none'"]),
    ],
    ids=str,
)
def test_trainers_that_compose_their_own_batches(tmp_path, trainer, config, options, parts):
    """They are refused before the model is loaded, with a fix."""
    options = {
        "output_dir": str(tmp_path / "out"),
        "commonit_metric": "task",
        "bf16": False,
        "use_cpu": True,
        **options,
    }
    with pytest.raises(ValueError) as error:
        ours(trainer)(model=MISSING_MODEL, args=our_arguments(config)(**options), train_dataset=ROWS)
    assert all(part in str(error.value) for part in parts), error.value
    assert "SFT" not in str(error.value)


@pytest.mark.parametrize("column", ["image", "images"])
def test_lengths_of_rows_with_images(tmp_path, column):
    """TRL's collator tokenises them, so the refusal does not advise to tokenise before, and comes before the model."""
    rows = ROWS.remove_columns(["input_ids", "labels"]).add_column(column, [b""] * len(ROWS))
    check_error(tmp_path, column, "commonit_metric='task'", rows=rows, commonit_metric="length")
