"""I8: evaluation reports what `SFTTrainer` reports, unchanged, and the token-weighted loss of each group.

Other trainers: tests/differential. Two ranks: test_evaluation_ranks.py.
"""

import math
import multiprocessing
import re

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from helpers import toys
from helpers.toys import id_rows, tiny_model
from helpers.trainers import Seen, make_trainer, without_run_times
from trl import SFTTrainer

from commonit_trl import CommonITSFTTrainer

TRAIN = id_rows([6, 5, 4])
EVAL = id_rows([7, 5, 4], seed=1)
OTHER = id_rows([2, 9, 0], seed=2)


def count_rows(prediction):
    return {"rows": len(prediction.label_ids), "highest": float(np.max(prediction.predictions))}


class CountRowsByBatch:
    """The same for `batch_eval_metrics`, which calls it with each batch."""

    rows = 0

    def __call__(self, prediction, compute_result):
        self.rows += len(prediction.label_ids)
        return {"rows": self.rows} if compute_result else {}


def parents_part(metrics, prefix="eval"):
    """`metrics` without run times and without the losses of groups."""
    groups = {f"{prefix}_{name}_loss" for name in group_losses(metrics, prefix)}
    return {name: value for name, value in without_run_times(metrics).items() if name not in groups}


def group_losses(metrics, prefix="eval"):
    return {match[1]: value for name, value in metrics.items() if (match := re.fullmatch(rf"{prefix}_(.+)_loss", name))}


def expected_losses(rows, groups=None):
    """The losses of groups of rows under the toy model; of tasks by default."""
    return toys.group_losses(tiny_model().eval(), rows, rows["task"] if groups is None else groups)


def both(tmp_path, eval_dataset=EVAL, make_extra=dict, **options):
    """Our trainer and `SFTTrainer`, with the same weights and data."""
    return [
        make_trainer(
            tmp_path / trainer_class.__name__,
            TRAIN,
            trainer_class=trainer_class,
            extra={"eval_dataset": eval_dataset, **make_extra()},
            **options,
        )
        for trainer_class in (CommonITSFTTrainer, SFTTrainer)
    ]


VARIANTS = {
    "plain": ({}, dict),
    "compute_metrics": ({}, lambda: {"compute_metrics": count_rows}),
    "batch_eval_metrics": ({"batch_eval_metrics": True}, lambda: {"compute_metrics": CountRowsByBatch()}),
    "loss only": ({"prediction_loss_only": True}, lambda: {"compute_metrics": count_rows}),
    "accumulated": ({"eval_accumulation_steps": 1}, lambda: {"compute_metrics": count_rows}),
    "workers": ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, dict),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parents_metrics_and_group_losses(tmp_path, name):
    """The parent's metrics and logs are equal to the last bit; group losses are those of the evaluated rows."""
    options, make_extra = VARIANTS[name]
    second = EVAL if name == "workers" else OTHER  # a Trainer with persistent workers keeps its first loader
    logs = []
    for trainer in both(tmp_path, make_extra=make_extra, **options):
        trainer.evaluate()
        trainer.evaluate(second)
        logs.append(trainer.state.log_history)
    for ours, parent, rows in zip(*logs, (EVAL, second), strict=True):
        assert parents_part(ours) == parents_part(parent)
        assert group_losses(ours) == pytest.approx(expected_losses(rows), rel=1e-5)


def test_evaluation_makes_the_parents_loaders_and_forward_passes(tmp_path):
    """Group losses take no loader, worker process or forward pass besides the parent's."""
    counts = []
    for trainer in both(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True):
        workers, loaders, passes = set(multiprocessing.active_children()), len(trainer.accelerator._dataloaders), []
        trainer.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer.evaluate()
        trainer.evaluate()
        workers = set(multiprocessing.active_children()) - workers
        counts.append((len(workers), len(trainer.accelerator._dataloaders) - loaders, len(passes)))
    assert counts[0] == counts[1]


def test_length_bins_of_the_training_rows_divide_the_evaluation_rows(tmp_path):
    trainer = make_trainer(tmp_path, TRAIN, commonit_metric="length", commonit_length_edges=[15, 25])
    counts = np.array([sum(label != -100 for label in labels) for labels in EVAL["labels"]])
    bins, names = np.searchsorted([15, 25], counts, side="right"), trainer.commonit_grouper.names
    expected = expected_losses(EVAL, [names[number] for number in bins])
    assert group_losses(trainer.evaluate(EVAL)) == pytest.approx(expected, rel=1e-5)


def test_set_without_task_column_warns_once(tmp_path, caplog):
    ours, parent = both(tmp_path, eval_dataset=EVAL.remove_columns("task"))
    metrics = [ours.evaluate(), ours.evaluate()]
    assert parents_part(metrics[0]) == parents_part(parent.evaluate())
    assert group_losses(metrics[0]) == {}
    warnings = [record.getMessage() for record in caplog.records if "No loss per group" in record.getMessage()]
    assert len(warnings) == 1 and "'task'" in warnings[0]


def test_evaluating_does_not_change_training(tmp_path):
    """Rows, training metrics and weights are the same with and without evaluations in between."""
    weights, rows, logs = [], [], []
    for number, options in enumerate([{}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}]):
        trainer, _ = both(tmp_path / str(number), **options)
        seen = Seen(trainer)
        trainer.train()
        weights.append(trainer.model.state_dict())
        rows.append(seen.steps)
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert rows[0] == rows[1]
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_best_model_by_the_loss_of_a_group(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2}
    trainer, _ = both(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_g001_loss", **options)
    trainer.train()
    losses = [entry["eval_g001_loss"] for entry in trainer.state.log_history if "eval_g001_loss" in entry]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses) < max(losses)


@pytest.mark.parametrize(
    ("metric", "fix"),
    [("eval_loss_g001", "'eval_g001_loss'"), ("g003_loss", "'eval_g000_loss'"), ("eval_g01_loss", "'eval_loss'")],
)
def test_best_model_by_an_unknown_loss_is_refused(tmp_path, metric, fix):
    """The names of an earlier version and of groups without evaluation rows are refused before training."""
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}'.*{fix}"):
        options = {"eval_strategy": "epoch", "metric_for_best_model": metric}
        make_trainer(tmp_path, id_rows([4, 4, 4, 4]), extra={"eval_dataset": EVAL}, **options)


def test_group_whose_rows_are_not_evaluated_is_nan_with_a_message(tmp_path, caplog):
    """A loader that drops its last batch leaves out rows; a group without rows is NaN, and a warning counts them."""
    rows = id_rows([6], seed=1).add_column("kept", ["g000"] * 6)
    last = id_rows([1], seed=2).add_column("kept", ["g001"])
    rows = concatenate_datasets([rows, last]).remove_columns("task").rename_column("kept", "task")
    ours, _ = both(tmp_path, eval_dataset=rows)
    ours.args.dataloader_drop_last = True  # after construction: training would refuse it
    metrics = ours.evaluate()
    assert math.isnan(metrics["eval_g001_loss"]) and metrics["eval_g000_loss"] > 0
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "1 of 7 rows" in warning and "'g001'" in warning


def test_label_smoothing_gives_no_group_losses(tmp_path, caplog):
    """With label smoothing, the parent's loss is not the cross entropy of the labels."""
    trainers = both(tmp_path, label_smoothing_factor=0.4, loss_type="nll")
    for trainer in trainers:  # a head that is far from uniform, of which the smoothed loss differs
        trainer.model.lm_head.weight.data.mul_(200)
    ours, parent = (trainer.evaluate() for trainer in trainers)
    assert parents_part(ours) == parents_part(parent) and group_losses(ours) == {}
    assert any("No loss per group" in record.getMessage() for record in caplog.records)


def test_predict_is_the_parents(tmp_path):
    ours, parent = both(tmp_path)
    ours.get_eval_dataloader()
    ours, parent = ours.predict(OTHER), parent.predict(OTHER)
    assert np.array_equal(ours.predictions, parent.predictions)
    assert without_run_times(ours.metrics) == without_run_times(parent.metrics)
