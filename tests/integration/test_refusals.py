"""What does not go together is refused when the trainer is made, in one line that names the option, its value
and the way out, and leaves nothing behind."""

from dataclasses import dataclass, fields

import pytest
from datasets import IterableDataset
from helpers.toys import id_rows
from helpers.trainers import make_trainer
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig

from commonit_trl import CommonITArguments, CommonITMixin, CommonITSFTTrainer

ROWS = id_rows([5, 4, 3])
MISSING_MODEL = "no-such-owner/no-such-model"  # loading it would raise another error
FIELDS = {field.name: field for field in fields(TrainingArguments)}
OTHER_STRATEGIES = set(FIELDS["train_sampling_strategy"].metadata["choices"]) - {"random"}


def refusal(tmp_path, model, rows=ROWS, **options):
    """The error's text; nothing may be in the output directory."""
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, rows, model=model, **options)
    assert not list(tmp_path.glob("out/*"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        *(
            ({"train_sampling_strategy": name}, [f"train_sampling_strategy={name!r}", "leave it at 'random'"])
            for name in sorted(OTHER_STRATEGIES)
        ),
        (
            {"accelerator_config": {"split_batches": True}},
            ["accelerator_config.split_batches=True", "set it to False"],
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            ["accelerator_config.dispatch_batches=True", "set it to"],
        ),
        ({"dataloader_drop_last": True}, ["dataloader_drop_last=True", "commonit_remainder='drop'"]),
        ({"ignore_data_skip": True}, ["ignore_data_skip=True", "set it to False"]),
        ({"commonit_task_column": "taks"}, ["commonit_task_column='taks'", "task, row"]),
    ],
    ids=str,
)
def test_settings_before_the_model_is_loaded(tmp_path, options, parts):
    said = refusal(tmp_path, MISSING_MODEL, **options)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            IterableDataset.from_generator(lambda: iter(ROWS)),
            ["train_dataset is a IterableDataset", "datasets.Dataset"],
        ),
        (list(ROWS), ["train_dataset is a list", "Dataset.from_list"]),
        (ROWS.select([]), ["train_dataset has no rows"]),
        (
            ROWS.remove_columns("task"),
            ["commonit_metric='task'", "input_ids, labels, row", "commonit_task_column"],
        ),
    ],
    ids=["streaming", "list", "empty", "no task column"],
)
def test_datasets_before_the_model_is_loaded(tmp_path, rows, parts):
    said = refusal(tmp_path, MISSING_MODEL, rows)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("config", [SFTConfig, TrainingArguments, None], ids=str)
def test_arguments_without_options(tmp_path, config):
    args = config and config(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=r"no commonit_\* options: .*CommonITSFTConfig"):
        CommonITSFTTrainer(model=MISSING_MODEL, args=args, train_dataset=ROWS)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"gradient_accumulation_steps": 13},
            ["12 samples", "13 micro-batches", "less gradient accumulation"],
        ),
        (
            {"per_device_train_batch_size": 8, "commonit_remainder": "drop"},
            ["remainder='drop' leaves no step", "largest group has 5", "remainder='keep'"],
        ),
        (
            {"commonit_weights": {"g000": 1, "g001": 1, "g02": 1}},
            ["commonit_weights: 'g02'", "'g002'"],
        ),
        ({"commonit_weights": {"g000": 1, "g001": 1}}, ["commonit_weights", "'g002'"]),
    ],
    ids=str,
)
def test_what_the_groups_tell(tmp_path, options, parts):
    """These need the groups, so the model is there already; still before any training."""
    said = refusal(tmp_path, "llama", **options)
    assert all(part in said for part in parts), said


def test_dataset_replaced_after_grouping(tmp_path):
    """A training set that is not the one that was grouped is an error, not a wrong order."""
    trainer = make_trainer(tmp_path, ROWS)
    trainer.train_dataset = ROWS.select(range(6))
    with pytest.raises(ValueError, match=r"train_dataset \(6 rows\) is not the dataset that was grouped \(12 rows\)"):
        trainer.train()


@dataclass(kw_only=True)
class KTOArguments(CommonITArguments, KTOConfig):
    pass


@dataclass(kw_only=True)
class GRPOArguments(CommonITArguments, GRPOConfig):
    pass


@pytest.mark.parametrize(
    ("trainer_class", "arguments", "options", "parts"),
    [
        (KTOTrainer, KTOArguments, {}, ["loss_type='kto'", "apo_zero_unpaired", "train_sampling_strategy='random'"]),
        (
            KTOTrainer,
            KTOArguments,
            {"loss_type": "apo_zero_unpaired"},
            ["train_sampling_strategy='sequential'", "'random'"],
        ),
        (GRPOTrainer, GRPOArguments, {}, ["GRPOTrainer._get_train_sampler", "commonit_metric='none'"]),
    ],
    ids=str,
)
def test_trainers_whose_batches_cannot_be_composed_anew(tmp_path, trainer_class, arguments, options, parts):
    """Each is refused before the model is loaded, with a fix that goes through."""

    class Mixed(CommonITMixin, trainer_class):
        pass

    args = arguments(output_dir=str(tmp_path / "out"), commonit_metric="task", bf16=False, use_cpu=True, **options)
    with pytest.raises(ValueError) as error:
        Mixed(model=MISSING_MODEL, args=args, train_dataset=ROWS)
    assert all(part in str(error.value) for part in parts), error.value
    assert "SFT" not in str(error.value)


@pytest.mark.parametrize("column", ["image", "images"])
def test_lengths_of_rows_with_images(tmp_path, column):
    """TRL's collator tokenises them, so the refusal does not advise to tokenise before, and comes before the model."""
    rows = ROWS.remove_columns(["input_ids", "labels"]).add_column(column, [b""] * len(ROWS))
    said = refusal(tmp_path, MISSING_MODEL, rows, commonit_metric="length")
    assert column in said and "commonit_metric='task'" in said
