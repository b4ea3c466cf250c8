"""Undocumented behaviour of TRL, transformers, accelerate and torch that the package relies on.

Each docstring names the failure, silent or late, that a change would cause; read it when a new version breaks a test.
"""

import inspect
from collections import defaultdict
from dataclasses import fields

import pytest
from accelerate import skip_first_batches
from helpers.toys import id_rows, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from commonit_trl import CommonITBatchSampler, CommonITSFTConfig, CommonITSFTTrainer
from commonit_trl.plan.sampler import CommonITDataLoader

ROWS = id_rows([5, 4])
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


def make(directory, trainer_class=SFTTrainer, config_class=SFTConfig, rows=ROWS, callbacks=None, **options):
    args = config_class(**{"output_dir": str(directory), "per_device_train_batch_size": 2, **QUIET, **options})
    return trainer_class(
        model=tiny_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_prepare_dataset_is_where_trl_prepares_and_packs(tmp_path):
    """`CommonITSFTTrainer` overrides `SFTTrainer._prepare_dataset` to group rows before packing.

    A changed signature fails at construction. If TRL passed another object than `train_dataset`, called it before
    setting `_tokenizer` and `chat_template`, or not at all, packs would be grouped instead of rows.
    """
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert parameters(SFTTrainer._prepare_dataset) == expected
    calls = []

    class Watched(SFTTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
            calls.append((dataset is ROWS, packing, dataset_name, self._tokenizer is not None, self.chat_template))
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    make(tmp_path, Watched, packing=True, max_length=64)
    assert calls == [(True, True, "train", True, None), (True, True, "eval", True, None)]


def test_eval_metrics_gather_in_metrics(tmp_path):
    """The loss per group runs the parent's evaluation loop and restores `SFTTrainer._metrics["eval"]` afterwards.

    If TRL stored them elsewhere, entropy and token accuracy would count every row twice.
    """
    trainer = make(tmp_path)
    assert isinstance(trainer._metrics["eval"], defaultdict)
    trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", True, None, "eval")
    kept = trainer._metrics["eval"]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(kept)
    assert all(isinstance(values, list) for values in kept.values())
    trainer.evaluate()
    assert not trainer._metrics["eval"]


def test_packed_rows_have_no_other_columns(tmp_path):
    """An evaluation set with only these columns counts as packed and has no loss per group."""
    for strategy, columns in (
        ("bfd", {"input_ids", "labels", "seq_lengths"}),
        ("wrapped", {"input_ids", "labels"}),
    ):
        trainer = make(tmp_path, packing=True, packing_strategy=strategy, max_length=64)
        assert set(trainer.eval_dataset.column_names) == columns
    assert {"task", "row"} <= set(make(tmp_path).eval_dataset.column_names)


def test_train_batch_size_is_the_current_one(tmp_path):
    """Plans use `Trainer._train_batch_size`, which `auto_find_batch_size` lowers; `args` keeps the initial size."""
    trainer = make(tmp_path, per_device_train_batch_size=3)
    assert trainer._train_batch_size == 3
    trainer._update_auto_batch_size(1)
    assert trainer._train_batch_size == 1 and trainer.args.per_device_train_batch_size == 3


def test_trainer_passes_our_dataloader_to_on_epoch_begin(tmp_path):
    """`_EpochStart` sets the sampler's epoch through the `train_dataloader` of `on_epoch_begin`.

    Otherwise a resumed run and every later epoch would repeat the order of epoch 0.
    """
    loaders, epochs = [], []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
            loaders.append(train_dataloader)

        def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
            epochs.append(train_dataloader.commonit_sampler.epoch)

    options = {
        "commonit_metric": "task",
        "commonit_cache_dir": str(tmp_path / "cache"),
        "num_train_epochs": 2,
    }
    trainer = make(tmp_path, CommonITSFTTrainer, CommonITSFTConfig, callbacks=[Watch()], **options)
    trainer.train()
    assert [type(loader) for loader in loaders] == [CommonITDataLoader] * 2
    assert sorted(epochs) == epochs and set(epochs) == {0, 1}


def test_skip_first_batches_keeps_our_sampler(tmp_path):
    """Resuming within an epoch wraps our sampler, which must yield the remaining micro-batches of the epoch set before.

    The wrapped loader has no `set_epoch`, so `_EpochStart` sets it on the sampler.
    """
    options = {"commonit_metric": "task", "commonit_cache_dir": str(tmp_path / "cache")}
    loader = make(tmp_path, CommonITSFTTrainer, CommonITSFTConfig, **options).get_train_dataloader()
    loader.set_epoch(3)
    skipped = skip_first_batches(loader, 2)
    assert skipped.batch_sampler.batch_sampler is loader.commonit_sampler
    assert list(skipped.batch_sampler) == list(loader.commonit_sampler)[2:]
    assert skipped.collate_fn is loader.collate_fn and skipped.worker_init_fn is loader.worker_init_fn
    assert skipped.generator is loader.generator


def test_dataloader_options_are_copied(tmp_path):
    """Our dataloader has the user's options, as the parent's has."""
    options = {
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": False,
        "dataloader_multiprocessing_context": "spawn",
        "dataloader_in_order": False,
    }
    with_metric = {"commonit_metric": "task", "commonit_cache_dir": str(tmp_path / "cache")}
    ours = make(tmp_path, CommonITSFTTrainer, CommonITSFTConfig, **options, **with_metric).get_train_dataloader()
    parents = make(tmp_path, **options).get_train_dataloader()
    for name in ("num_workers", "pin_memory", "timeout", "prefetch_factor", "persistent_workers", "in_order"):
        assert getattr(ours, name) == getattr(parents, name), name
    assert ours.multiprocessing_context.get_start_method() == "spawn"
    assert ours.worker_init_fn.func is parents.worker_init_fn.func
    assert ours.dataset.column_names == parents.dataset.column_names == ["input_ids", "labels"]
    assert isinstance(ours.batch_sampler, CommonITBatchSampler)


def test_test_dataloaders_are_not_kept(tmp_path):
    """The loss per group uses `get_test_dataloader`: with persistent workers the Trainer caches evaluation loaders.

    If it cached test loaders too, every group would get the rows of the first.
    """
    trainer = make(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader()
    assert len(trainer.get_test_dataloader(ROWS.select([0])).dataset) == 1
    assert len(trainer.get_test_dataloader(ROWS).dataset) == len(ROWS)


def test_methods_that_the_mixin_overrides():
    """The mixin passes these arguments by position."""
    assert parameters(Trainer.train)[:2] == ["self", "resume_from_checkpoint"]
    assert parameters(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    assert parameters(Trainer.get_eval_dataloader) == ["self", "eval_dataset"]
    assert parameters(Trainer.get_train_dataloader) == ["self"]
    expected = [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ]
    assert parameters(Trainer.evaluation_loop) == expected


@pytest.mark.parametrize(
    "name",
    [
        "accelerator_config",
        "auto_find_batch_size",
        "average_tokens_across_devices",
        "dataloader_drop_last",
        "ignore_data_skip",
        "train_sampling_strategy",
    ],
)
def test_unsupported_settings_exist(name):
    """The trainer rejects these settings by name; a renamed one would be accepted."""
    assert name in {option.name for option in fields(TrainingArguments)}


def test_trainer_attributes_select_the_loss_normalisation(tmp_path):
    """Lengths are balanced only if the loss is normalised by the step's token count.

    The Trainer decides that by these two attributes, in `_get_num_items_in_batch`.
    """
    trainer = make(tmp_path)
    assert trainer.model_accepts_loss_kwargs is True and trainer.compute_loss_func is None
    source = inspect.getsource(Trainer._get_num_items_in_batch)
    assert "self.model_accepts_loss_kwargs" in source and "self.compute_loss_func is not None" in source
    assert [trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()] == [1, 1, 1]


def test_init_training_state_sets_the_resume_position():
    """`CommonITMixin` overrides it for commonit_resume='replan'.

    tests/integration/faults/test_replan.py fails where the Trainer resumes elsewhere.
    """
    assert parameters(Trainer._init_training_state)[:3] == ["self", "max_steps", "num_update_steps_per_epoch"]
