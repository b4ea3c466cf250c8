"""Undocumented behaviour of TRL, transformers, accelerate and torch that the package relies on.

Each docstring names the failure, silent or late, that a change would cause; read it when a new version breaks a test.
"""

import inspect

from helpers.toys import id_rows, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from commonit_trl import CommonITBatchSampler, CommonITSFTConfig, CommonITSFTTrainer

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


def make_ours(directory, **options):
    options |= {"commonit_metric": "task", "commonit_cache_dir": str(directory / "cache")}
    return make(directory, CommonITSFTTrainer, CommonITSFTConfig, **options)


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_packed_rows_have_no_other_columns(tmp_path):
    """An evaluation set with only these columns counts as packed and has no loss per group."""
    for strategy, columns in (
        ("bfd", {"input_ids", "labels", "seq_lengths"}),
        ("wrapped", {"input_ids", "labels"}),
    ):
        trainer = make(tmp_path, packing=True, packing_strategy=strategy, max_length=64)
        assert set(trainer.eval_dataset.column_names) == columns
    assert {"task", "row"} <= set(make(tmp_path).eval_dataset.column_names)


def test_dataloader_options_are_known():
    """`get_train_dataloader` copies the attributes of the parent's loader; a new torch option would be ignored."""
    copied = {"dataset", "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor"}
    copied |= {"multiprocessing_context", "persistent_workers", "in_order"}
    replaced = {"batch_sampler", "generator", "batch_size", "shuffle", "sampler", "drop_last"}
    without_effect = {"pin_memory_device"}  # deprecated, and read from the accelerator
    assert set(parameters(DataLoader.__init__)) - {"self"} == copied | replaced | without_effect


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
    ours, parents = (build(tmp_path, **options).get_train_dataloader() for build in (make_ours, make))
    for name in ("num_workers", "pin_memory", "timeout", "prefetch_factor", "persistent_workers", "in_order"):
        assert getattr(ours, name) == getattr(parents, name), name
    assert ours.multiprocessing_context.get_start_method() == "spawn"
    assert ours.worker_init_fn.func is parents.worker_init_fn.func
    assert ours.dataset.column_names == parents.dataset.column_names == ["input_ids", "labels"]
    assert isinstance(ours.batch_sampler, CommonITBatchSampler)


def test_methods_that_the_mixin_overrides():
    """The mixin passes these arguments by position.

    tests/integration/faults/test_replan.py fails where `_init_training_state` no longer decides the resumed position.
    """
    loop = ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"]
    for method, expected in (
        (Trainer.train, ["resume_from_checkpoint"]),
        (Trainer.save_model, ["output_dir", "_internal_call"]),
        (Trainer.get_eval_dataloader, ["eval_dataset"]),
        (Trainer.get_train_dataloader, []),
        (Trainer.evaluation_loop, loop),
        (Trainer._init_training_state, ["max_steps", "num_update_steps_per_epoch"]),
    ):
        assert parameters(method)[: 1 + len(expected)] == ["self", *expected]


def test_trainer_attributes_select_the_loss_normalisation(tmp_path):
    """Lengths are balanced only if the loss is normalised by the step's token count.

    The Trainer decides that by these two attributes, in `_get_num_items_in_batch`.
    """
    trainer = make(tmp_path)
    assert trainer.model_accepts_loss_kwargs is True and trainer.compute_loss_func is None
    source = inspect.getsource(Trainer._get_num_items_in_batch)
    assert "self.model_accepts_loss_kwargs" in source and "self.compute_loss_func is not None" in source
    assert [trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()] == [1, 1, 1]
