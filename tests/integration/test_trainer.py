"""`CommonITSFTTrainer` on one rank with the options, models and callbacks that users combine it with.

tests/differential trains other forms of data, other trainers and more options.
"""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from helpers.toys import id_rows, tiny_model, tiny_tokenizer
from helpers.trainers import Seen, groups_of_steps, make_trainer, train
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTTrainer

from commonit_trl import CommonITSFTTrainer

ROWS = id_rows([9, 6, 5, 3])
TASKS = ROWS["task"]
STEPS = 8  # of an epoch: 3 + 2 + 2 + 1 of up to 4 rows


def assert_follows_plan(trainer, seen):
    """Check for pure steps, the micro-batches of the plans, and every row in each whole epoch."""
    groups_of_steps(seen, lambda row: TASKS[row.number])
    for number, epoch in enumerate(seen.epochs):
        plan = trainer.commonit_plan(number)
        batches = [[row.number for row in batch] for step in epoch.steps for batch in step]
        assert batches == list(plan.batches(0))[: len(batches)]
        if len(epoch.steps) == plan.num_steps:
            assert epoch.numbers == list(range(len(TASKS)))


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 2, "gradient_checkpointing": True}, [STEPS, STEPS]),
        ({"num_train_epochs": 3, "dataloader_num_workers": 2, "dataloader_persistent_workers": True}, [STEPS] * 3),
        ({"num_train_epochs": 2, "data_seed": 11}, [STEPS, STEPS]),
        ({"num_train_epochs": 1.5}, [STEPS, STEPS // 2]),
        ({"max_steps": 4}, [4]),
        ({"max_steps": 13}, [STEPS, 5]),
    ],
    ids=str,
)
def test_options(tmp_path, options, steps):
    """Epochs follow the plan, each in another order; the learning rate is 0 after the last step."""
    trainer, seen = train(tmp_path, ROWS, gradient_accumulation_steps=2, **options)
    assert_follows_plan(trainer, seen)
    assert [len(epoch.steps) for epoch in seen.epochs] == steps
    assert all(one.steps != other.steps for one, other in pairwise(seen.epochs))
    assert set(trainer.lr_scheduler.get_last_lr()) == {0}
    trained = [epoch.steps for epoch in seen.epochs]
    if options.get("data_seed"):
        trainer.train()
        assert [epoch.steps for epoch in seen.epochs] == trained, "another `train` begins with epoch 0"


def test_lora(tmp_path):
    """With a LoRA adapter, batches follow the plan and only the adapter is trained."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, seen = train(tmp_path, ROWS, extra={"peft_config": adapter})
    assert_follows_plan(trainer, seen)
    assert trainer.commonit.spec.lengths is not None  # the wrapped model takes the step's token count
    before = tiny_model().state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
        elif "lora_B" in name:
            assert value.abs().sum() > 0


def test_positional_arguments(tmp_path):
    args = make_trainer(tmp_path, ROWS).args
    trainer = CommonITSFTTrainer(tiny_model(), args, None, ROWS, None, tiny_tokenizer())
    assert trainer.commonit_plan().summary().num_samples == len(ROWS)


def test_liger_keeps_the_task_column(tmp_path):
    """TRL 1.9 drops columns when it prepares rows for liger kernels."""
    pytest.importorskip("liger_kernel")
    trainer = make_trainer(tmp_path, ROWS, use_liger_kernel=True)
    assert [trainer.commonit_grouper.names[group] for group in trainer.commonit_group_ids] == TASKS


def test_auto_find_batch_size(tmp_path):
    """After an out-of-memory error the plan has the smaller batch; a checkpoint resumes with the batch size found."""
    options = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 5,
    }

    def too_large(model, args, kwargs):
        if kwargs["input_ids"].shape[0] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    trainer = make_trainer(tmp_path, ROWS, **options)
    trainer.model.register_forward_pre_hook(too_large, with_kwargs=True)
    seen = Seen(trainer)
    trainer.train()
    assert trainer.commonit_plan().micro_batch_size == trainer._train_batch_size < 6
    assert_follows_plan(trainer, seen)
    assert len(seen.epochs) == 2
    assert trainer.state.global_step == sum(len(epoch.steps) for epoch in seen.epochs)

    resumed = make_trainer(tmp_path, ROWS, **options)
    seen_after = Seen(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert seen_after.steps == seen.steps[5:]


def test_model_without_loss_kwargs_keeps_equal_counts(tmp_path, caplog):
    """A loss that is a mean over micro-batches needs micro-batches of equal size; a warning names the model."""
    model = tiny_model()
    model.accepts_loss_kwargs = False
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer, seen = train(tmp_path, ROWS, model=model, **options)
    assert_follows_plan(trainer, seen)
    assert all(abs(len(step[0]) - len(step[1])) <= 1 for step in seen.epochs[0].steps)
    assert sum("LlamaForCausalLM" in record.getMessage() for record in caplog.records) == 1


# --- models and metrics -------------------------------------------------------------------------------------

TOPICS = {
    "translate": ("Translate this sentence to French: the {} is in the garden.", "cat dog bird tree house car bike"),
    "compute": ("Compute the sum of the numbers {} and 12.", "3 17 25 41 58 66 73"),
    "poem": ("Write a short poem about the {} at night, with rhymes.", "sea moon forest wind river stars snow"),
}


def topic_rows():
    rows = []
    for task, (prompt, words) in TOPICS.items():
        for number, word in enumerate(words.split()):
            rows.append({"prompt": prompt.format(word), "completion": "z" * (5 + 4 * number), "task": task})
    return Dataset.from_list(rows).shuffle(seed=0)


def topic_of(row):
    return next(task for task, (prompt, _) in TOPICS.items() if row.text.startswith(prompt[:8]))


@pytest.mark.parametrize(
    ("model", "metric"),
    [("llama", "k-means"), ("llama", "reference"), ("qwen2", "length"), ("bloom", "task"), ("bloom", "reference")],
)
def test_models_and_metrics(tmp_path, minilm, model, metric):
    """The paper's architectures and metrics: each step holds one task, length bin or topic."""
    options = {"commonit_metric": metric}
    if metric == "length":
        options |= {"commonit_length_edges": [15, 25]}
    elif metric != "task":
        options = {"commonit_metric": "embedding", "commonit_embedding_model": str(minilm)}
        if metric == "k-means":
            options |= {"commonit_num_groups": 3}
        else:
            reference = tmp_path / "reference.jsonl"
            examples = [{"task": task, "prompt": p.format("lake"), "completion": ""} for task, (p, _) in TOPICS.items()]
            reference.write_text("\n".join(map(json.dumps, examples)))
            options |= {"commonit_reference_dataset": str(reference)}
    _, seen = train(tmp_path, topic_rows(), model=model, **options)
    if metric == "length":
        groups = groups_of_steps(seen, lambda row: (row.trained >= 15) + (row.trained >= 25))
    else:
        groups = groups_of_steps(seen, topic_of)
    assert len(set(groups)) == 3
    assert set(seen.rows.values()) == {1} and len(seen.rows) == 21


# --- rows that training cannot use ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["task", "length"])
def test_rows_without_a_token_to_train_on_are_dropped_and_counted(tmp_path, caplog, metric):
    """I2: they are in no batch and no group; the warning, the epoch summary and `groups.json` count them."""
    rows = id_rows([9, 6])
    labels = [[-100] * len(row) if number % 3 == 0 else row for number, row in enumerate(rows["labels"])]
    trainer, seen = train(tmp_path, rows.remove_columns("labels").add_column("labels", labels), commonit_metric=metric)
    assert {row.number for row in seen.rows} == {number for number in range(15) if number % 3}
    dropped = trainer.commonit.grouping.dropped
    assert dropped.rows == 5 and dropped.by_reason == {"no token to train on": 5}
    if metric == "task":
        assert dropped.by_group == Counter(rows["task"][0:15:3])
    (warning,) = [record.getMessage() for record in caplog.records if "rows are not trained" in record.getMessage()]
    assert "5 rows" in warning and "no token to train on" in warning
    saved = json.loads((tmp_path / "out" / "commonit" / "groups.json").read_text(encoding="utf-8"))
    assert saved["epoch_summary"]["dropped"]["rows"] == 5


def test_rows_dropped_by_preparation_are_counted_by_group(tmp_path):
    """TRL drops rows whose completion is truncated away; they count for their label, or their length before that."""
    rows = [{"task": f"t{n % 2}", "prompt": "p" * (5 + 45 * (n % 5 < 2)), "completion": "c" * 10} for n in range(12)]
    for metric, by_group in (("task", {"t0": 3, "t1": 3}), ("length", {"response of any length": 6})):
        trainer = make_trainer(tmp_path / metric, Dataset.from_list(rows), commonit_metric=metric, max_length=40)
        dropped = trainer.commonit.grouping.dropped
        assert len(trainer.train_dataset) == 6 and dropped.by_group == by_group
        assert all("max_length=40" in reason for reason in dropped.by_reason)
        if metric == "task":  # the other rows keep their own tasks
            tasks = [trainer.commonit_grouper.names[group] for group in trainer.commonit_group_ids]
            assert tasks == [row["task"] for row in rows if len(row["prompt"]) == 5]


# --- the baseline, replaced parts and callbacks -----------------------------------------------------------------


def test_i7_metric_none_writes_the_parents_files(tmp_path):
    """tests/differential compares batches, logs and weights."""
    files = []
    for trainer_class in (CommonITSFTTrainer, SFTTrainer):
        directory = tmp_path / trainer_class.__name__
        train(directory, ROWS, trainer_class=trainer_class, commonit_metric="none", save_strategy="epoch")
        files.append({str(file.relative_to(directory)) for file in directory.rglob("*")})
    assert files[0] == files[1]


def test_dataset_replaced_by_one_of_equal_length(tmp_path):
    trainer = make_trainer(tmp_path, id_rows([5, 4]))
    trainer.train_dataset = id_rows([5, 4], seed=1)
    with pytest.raises(ValueError, match=r"train_dataset .* is not the dataset that was grouped"):
        trainer.train()


def test_training_sampler_of_a_subclass_is_refused_by_name(tmp_path):
    class Mine(CommonITSFTTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return None

    with pytest.raises(ValueError, match=r"Mine\._get_train_sampler does not go with commonit_metric"):
        make_trainer(tmp_path, id_rows([5, 4]), trainer_class=Mine)
    make_trainer(tmp_path, id_rows([5, 4]), trainer_class=Mine, commonit_metric="none")


def test_metrics_restart_with_each_training(tmp_path):
    """Logs do not contain metrics of an earlier, interrupted `train`."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log, control.should_training_stop = False, True

    rows = id_rows([8])
    logs = []
    for interrupted in (False, True):
        trainer = make_trainer(tmp_path / str(interrupted), rows, learning_rate=0.0, logging_steps=4)
        if interrupted:
            trainer.add_callback(Stop)
            trainer.train()
            trainer.remove_callback(Stop)
        trainer.train()
        logs.append([entry["loss_g000"] for entry in trainer.state.log_history if "loss_g000" in entry])
    assert logs[0] == pytest.approx(logs[1]) and len(logs[0]) == 1


def test_another_dataloader_does_not_change_the_metrics(tmp_path):
    """The group of a step comes from the plan, not from the newest sampler."""

    class MakeLoader(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            next(iter(trainer.get_train_dataloader()))

    logs = []
    for callbacks in ([], [MakeLoader()]):
        extra = {"callbacks": callbacks}
        trainer = make_trainer(tmp_path / str(len(callbacks)), id_rows([7, 5]), extra=extra, num_train_epochs=2)
        trainer.train()
        logs.append([entry["commonit_group"] for entry in trainer.state.log_history if "commonit_group" in entry])
    assert logs[0] == logs[1] and set(logs[0]) == {0, 1}
