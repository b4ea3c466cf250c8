"""Evaluation: all that `SFTTrainer` reports, unchanged, and the loss of each group, which is that of its
rows."""

import multiprocessing

import numpy as np
import pytest
import torch
from helpers import Seen, make_trainer, without_run_times
from toys import id_rows, tiny_model
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
    return {name: value for name, value in without_run_times(metrics).items() if not name.startswith(f"{prefix}_loss_")}


def group_losses(metrics, prefix="eval"):
    start = f"{prefix}_loss_"
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}


def loss_of_rows(rows, batch_size=3):
    """The Trainer's evaluation loss of `rows` under the toy model, from forward passes of our own: the mean
    over batches, by samples, of the mean over a batch's tokens."""
    model = tiny_model().eval()
    losses = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length = max(map(len, batch["input_ids"]))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in batch["input_ids"]])
        labels = torch.tensor([row + [-100] * (length - len(row)) for row in batch["labels"]])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses += [loss.item()] * len(tokens)
    return float(np.mean(losses))


def expected_group_losses(rows):
    tasks = np.array(rows["task"])
    return {task: loss_of_rows(rows.select(np.flatnonzero(tasks == task))) for task in sorted(set(tasks))}


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
    """The parent's metrics are equal to the last bit; group losses are those of the rows."""
    options, make_extra = VARIANTS[name]
    ours, parent = (trainer.evaluate() for trainer in both(tmp_path, make_extra=make_extra, **options))
    assert parents_part(ours) == parents_part(parent)
    assert group_losses(ours) == pytest.approx(expected_group_losses(EVAL), rel=1e-5)


def test_logged_metrics_are_the_parents(tmp_path):
    """What is logged, entropy and token accuracy among it, is `SFTTrainer`'s, evaluation after evaluation."""
    logs = []
    for trainer in both(tmp_path):
        trainer.evaluate()
        trainer.evaluate()
        logs.append([parents_part(entry) for entry in trainer.state.log_history])
    assert logs[0] == logs[1]
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= set(logs[0][1])


def test_dict_of_eval_sets(tmp_path):
    """Each set of a dict has its own group losses under its own prefix."""
    sets = {"one": EVAL, "two": OTHER}
    ours, parent = (trainer.evaluate() for trainer in both(tmp_path, eval_dataset=sets))
    for name, rows in sets.items():
        prefix = f"eval_{name}"
        assert group_losses(ours, prefix) == pytest.approx(expected_group_losses(rows), rel=1e-5)
    kept = {name: value for name, value in ours.items() if "_loss_g" not in name}
    assert parents_part(kept) == parents_part(parent)


def test_set_passed_to_evaluate(tmp_path):
    """`evaluate(rows)` reports the groups of those rows, not of the set that the trainer was given."""
    ours, parent = (trainer.evaluate(OTHER) for trainer in both(tmp_path))
    assert parents_part(ours) == parents_part(parent)
    assert group_losses(ours) == pytest.approx(expected_group_losses(OTHER), rel=1e-5)


def test_persistent_workers_do_not_pile_up(tmp_path):
    """Every evaluation makes loaders for the groups; their worker processes end with it."""
    left = []
    for trainer in both(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True):
        before = set(multiprocessing.active_children())
        trainer.evaluate()
        trainer.evaluate()
        left.append(len(set(multiprocessing.active_children()) - before))
    assert left == [1, 1]


def test_groups_of_lengths(tmp_path):
    """Metric `length`: the bins fitted to the training rows divide the evaluation rows too."""
    ours, _ = both(tmp_path, commonit_metric="length", commonit_length_edges=[15, 25])
    counts = np.array([sum(label != -100 for label in labels) for labels in EVAL["labels"]])
    bins = np.searchsorted([15, 25], counts, side="right")
    expected = {
        ours.commonit_grouper.names[number]: loss_of_rows(EVAL.select(np.flatnonzero(bins == number)))
        for number in set(bins)
    }
    assert group_losses(ours.evaluate()) == pytest.approx(expected, rel=1e-5)


def test_tasks_that_training_did_not_see(tmp_path):
    """Rows of unknown tasks are a group of their own."""
    ours, _ = both(tmp_path, eval_dataset=id_rows([3, 3, 3, 2, 2], seed=1))
    rows = id_rows([3, 3, 3, 2, 2], seed=1)
    unseen = rows.select([n for n, task in enumerate(rows["task"]) if task in ("g003", "g004")])
    losses = group_losses(ours.evaluate())
    assert list(losses) == ["(unseen task)", "g000", "g001", "g002"]
    assert losses["(unseen task)"] == pytest.approx(loss_of_rows(unseen), rel=1e-5)


def test_set_without_task_column_warns_once(tmp_path, caplog):
    """Without the task column there is a warning, once, and the parent's metrics."""
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
    """`metric_for_best_model` may be the loss of a group."""
    trainer, _ = both(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss_g001",
        greater_is_better=False,
    )
    trainer.train()
    losses = [entry["eval_loss_g001"] for entry in trainer.state.log_history if "eval_loss_g001" in entry]
    assert trainer.state.best_metric == min(losses)


def test_predict_is_the_parents(tmp_path):
    """`predict` gives the parent's predictions and metrics, also after an evaluation loader was asked for."""
    ours, parent = both(tmp_path)
    ours.get_eval_dataloader()
    ours, parent = ours.predict(OTHER), parent.predict(OTHER)
    assert np.array_equal(ours.predictions, parent.predictions)
    assert without_run_times(ours.metrics) == without_run_times(parent.metrics)
