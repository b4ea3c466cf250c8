"""The trainers on one rank, with what users combine them with: the model sees the plan, in each step one
group and in each epoch every row once."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from helpers.toys import id_rows, tiny_model, tiny_tokenizer
from helpers.trainers import QUIET, Seen, groups_of_steps, make_trainer, train
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from commonit_trl import CommonITMixin, CommonITSFTTrainer
from commonit_trl.config import CommonITArguments

ROWS = id_rows([9, 6, 5, 3])
TASKS = ROWS["task"]


def assert_follows_plan(trainer, seen, rows=ROWS):
    """Pure steps, the micro-batches of the plans, and every row in each whole epoch."""
    groups_of_steps(seen, lambda row: rows["task"][row.number])
    for number, epoch in enumerate(seen.epochs):
        plan = trainer.commonit_plan(number)
        batches = [[row.number for row in batch] for step in epoch.steps for batch in step]
        assert batches == list(plan.batches(0))[: len(batches)]
        if len(epoch.steps) == plan.num_steps:
            assert epoch.numbers == list(range(len(rows)))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- options of the parent ----------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "nll": {"loss_type": "nll"},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1, "loss_type": "nll"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "padding-free": {"padding_free": True},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 3},
    "workers of one epoch": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4},
    "data_seed": {"data_seed": 11},
    "no arrangement": {"commonit_balance_lengths": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path, name):
    """Epochs are the plan's, each in another order; the schedule ends with the last step, at 0."""
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, **OPTIONS[name]}
    trainer, seen = train(tmp_path, ROWS, **options)
    assert_follows_plan(trainer, seen)
    epochs = trainer.args.num_train_epochs
    assert len(seen.epochs) == epochs
    assert all(one.steps != other.steps for one, other in pairwise(seen.epochs))
    assert trainer.state.global_step == epochs * 8  # 3 + 2 + 2 + 1 steps of up to 4 rows
    assert set(trainer.lr_scheduler.get_last_lr()) == {0}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))


def test_lora(tmp_path):
    """With a LoRA adapter batches are the same; only the adapter is trained."""
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


@pytest.mark.parametrize(("max_steps", "per_epoch"), [(4, [4]), (8, [8]), (13, [8, 5])])
def test_max_steps(tmp_path, max_steps, per_epoch):
    """`max_steps` ends training inside an epoch, or goes on into another one."""
    trainer, seen = train(tmp_path, ROWS, max_steps=max_steps, gradient_accumulation_steps=2)
    assert_follows_plan(trainer, seen)
    assert [len(epoch.steps) for epoch in seen.epochs] == per_epoch
    assert set(trainer.lr_scheduler.get_last_lr()) == {0}


def test_fractional_epochs(tmp_path):
    """1.5 epochs are one and a half plans."""
    trainer, seen = train(tmp_path, ROWS, num_train_epochs=1.5, gradient_accumulation_steps=2)
    assert_follows_plan(trainer, seen)
    assert [len(epoch.steps) for epoch in seen.epochs] == [8, 4]


def test_train_twice(tmp_path):
    """A second `train` starts at epoch 0 again, with the same batches."""
    trainer, seen = train(tmp_path, ROWS, num_train_epochs=2, gradient_accumulation_steps=2)
    first = [epoch.steps for epoch in seen.epochs]
    trainer.train()
    assert [epoch.steps for epoch in seen.epochs] == first
    assert set(trainer.lr_scheduler.get_last_lr()) == {0}


def test_positional_arguments(tmp_path):
    """Arguments are found in whatever way they are passed."""
    args = make_trainer(tmp_path, ROWS).args
    trainer = CommonITSFTTrainer(tiny_model(), args, None, ROWS, None, tiny_tokenizer())
    assert trainer.commonit_plan().summary().num_samples == len(ROWS)


def test_liger_keeps_the_task_column(tmp_path):
    """TRL 1.9 drops columns when it prepares rows for liger kernels; the groups are there all the same."""
    pytest.importorskip("liger_kernel")
    trainer = make_trainer(tmp_path, ROWS, use_liger_kernel=True)
    assert [trainer.commonit_grouper.names[group] for group in trainer.commonit_group_ids] == TASKS


@pytest.mark.parametrize("balance", [False, True])
def test_auto_find_batch_size(tmp_path, balance):
    """After an out-of-memory error the plan is that of the smaller batch, and each epoch still sees every row
    once; a checkpoint of such a run is resumed with the batch size that it found."""
    options = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "commonit_balance_lengths": balance,
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


# --- models and metrics -------------------------------------------------------------------------------------

TOPICS = {
    "translate": (
        "Translate this sentence to French: the {} is in the garden.",
        "cat dog bird tree house car bike",
    ),
    "compute": ("Compute the sum of the numbers {} and 12.", "3 17 25 41 58 66 73"),
    "poem": (
        "Write a short poem about the {} at night, with rhymes.",
        "sea moon forest wind river stars snow",
    ),
}


def topic_rows():
    rows = []
    for task, (prompt, words) in TOPICS.items():
        for number, word in enumerate(words.split()):
            rows.append({"prompt": prompt.format(word), "completion": "z" * (5 + 4 * number), "task": task})
    return Dataset.from_list(rows).shuffle(seed=0)


def topic_of(row):
    return next(task for task, (prompt, _) in TOPICS.items() if row.text.startswith(prompt[:8]))


@pytest.fixture(scope="module")
def topics_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("metric", ["task", "length", "k-means", "reference"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "bloom"])
def test_models_and_metrics(tmp_path, topics_cache, minilm, model, metric):
    """The paper's architectures and metrics: each step holds one task, length bin or meaning."""
    options = {"commonit_metric": metric}
    if metric == "length":
        options |= {"commonit_length_edges": [15, 25]}
    elif metric != "task":
        options = {"commonit_metric": "embedding", "commonit_embedding_model": str(minilm)}
        if metric == "k-means":
            options |= {"commonit_num_groups": 3}
        else:
            reference = tmp_path.parent / "reference.jsonl"
            examples = [{"task": task, "prompt": p.format("lake"), "completion": ""} for task, (p, _) in TOPICS.items()]
            reference.write_text("\n".join(map(json.dumps, examples)))
            options |= {"commonit_reference_dataset": str(reference)}
    trainer, seen = train(tmp_path, topic_rows(), model=model, commonit_cache_dir=topics_cache, **options)
    if metric == "length":
        groups = groups_of_steps(seen, lambda row: (row.trained >= 15) + (row.trained >= 25))
    else:
        groups = groups_of_steps(seen, topic_of)
    assert len(set(groups)) == 3
    assert set(seen.rows.values()) == {1} and len(seen.rows) == 21
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))


# --- the mixin on transformers' own Trainer -----------------------------------------------------------------


@dataclass
class PlainArguments(CommonITArguments, TrainingArguments):
    pass


class PlainTrainer(CommonITMixin, Trainer):
    pass


class NoLossKwargs(LlamaForCausalLM):
    """A model whose forward does not take the step's token count."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def plain_trainer(directory, model, trainer_class=PlainTrainer, rows=ROWS, **options):
    tokenizer = tiny_tokenizer()
    quiet = {name: value for name, value in QUIET.items() if name != "max_length"}
    options = {**quiet, "output_dir": str(directory / "out"), "gradient_accumulation_steps": 2, **options}
    if trainer_class is Trainer:
        args = TrainingArguments(**options)
    else:
        args = PlainArguments(**{"commonit_metric": "task", "commonit_cache_dir": str(directory / "cache"), **options})
    return trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def test_mixin_on_trainer(tmp_path):
    """`transformers.Trainer` with the mixin: pure and lossless, arranged by length."""
    trainer = plain_trainer(tmp_path, tiny_model(), num_train_epochs=2)
    seen = Seen(trainer)
    trainer.train()
    assert_follows_plan(trainer, seen)
    assert len(seen.epochs) == 2
    assert trainer.commonit.spec.lengths is not None


def test_mixin_evaluates_by_group(tmp_path):
    """`transformers.Trainer` with the mixin reports the parent's metrics and each group's loss."""
    ours = plain_trainer(tmp_path, tiny_model()).evaluate(ROWS)
    parents = plain_trainer(tmp_path, tiny_model(), Trainer).evaluate(ROWS)
    assert {name for name in ours if name.endswith("_loss")} - {"eval_loss"} == {
        f"eval_{task}_loss" for task in set(TASKS)
    }
    assert ours["eval_loss"] == parents["eval_loss"]


def test_mixin_without_training_set(tmp_path):
    """A trainer that only evaluates has nothing to group."""
    trainer = plain_trainer(tmp_path, tiny_model(), rows=None)
    assert not any(name.endswith("_loss") and name != "eval_loss" for name in trainer.evaluate(ROWS))
    with pytest.raises(ValueError, match="has no plan"):
        trainer.commonit_plan()


def test_model_without_loss_kwargs_keeps_equal_counts(tmp_path, caplog):
    """Where the loss is a mean over micro-batches, these keep equal counts, and a warning says why."""
    model = NoLossKwargs(tiny_model().config)
    trainer = plain_trainer(tmp_path, model, per_device_train_batch_size=4)
    seen = Seen(trainer)
    trainer.train()
    assert_follows_plan(trainer, seen)
    for step in seen.epochs[0].steps:
        assert abs(len(step[0]) - len(step[1])) <= 1
    assert sum("NoLossKwargs" in record.getMessage() for record in caplog.records) == 1


# --- I7 -----------------------------------------------------------------------------------------------------


def test_i7_metric_none_writes_the_parents_files(tmp_path):
    """tests/differential compares batches, logs and weights."""
    files = []
    for trainer_class in (CommonITSFTTrainer, SFTTrainer):
        directory = tmp_path / trainer_class.__name__
        train(directory, ROWS, trainer_class=trainer_class, commonit_metric="none", save_strategy="epoch")
        files.append({str(file.relative_to(directory)) for file in directory.rglob("*")})
    assert files[0] == files[1]


def untrained_rows():
    """Rows of `id_rows`, every third of which has no token to train on; and the numbers of the others."""
    rows = id_rows([9, 6])
    labels = [[-100] * len(row) if number % 3 == 0 else row for number, row in enumerate(rows["labels"])]
    return rows.remove_columns("labels").add_column("labels", labels), {n for n in range(len(rows)) if n % 3}


@pytest.mark.parametrize("metric", ["task", "length"])
def test_rows_without_a_token_to_train_on_are_dropped_and_counted(tmp_path, caplog, metric):
    """They are in no batch and no group; the warning, the epoch summary and `groups.json` count them."""
    rows, trained = untrained_rows()
    trainer, seen = train(tmp_path, rows, commonit_metric=metric)
    assert {row.number for row in seen.rows} == trained
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    dropped = trainer.commonit.grouping.dropped
    assert dropped.rows == 5 and dropped.by_reason == {"no token to train on": 5}
    if metric == "task":
        labels = rows["task"]
        expected = Counter(labels[number] for number in range(len(rows)) if number not in trained)
        assert dropped.by_group == expected
    (warning,) = [record.getMessage() for record in caplog.records if "rows are not trained" in record.getMessage()]
    assert "5 rows" in warning and "no token to train on" in warning
    saved = json.loads((tmp_path / "out" / "commonit" / "groups.json").read_text(encoding="utf-8"))
    assert saved["epoch_summary"]["dropped"]["rows"] == 5


def test_rows_that_preparation_drops_are_counted_by_group(tmp_path):
    """TRL drops rows whose completion truncation removes; their group is that of their label, or of their length
    before truncation."""
    rows = Dataset.from_list(
        [{"task": f"t{n % 2}", "prompt": "p" * (50 if n < 5 else 5), "completion": "c" * 10} for n in range(12)]
    )
    for metric, by_group in (("task", {"t0": 3, "t1": 2}), ("length", {"response of any length": 5})):
        trainer = make_trainer(tmp_path / metric, rows, commonit_metric=metric, max_length=40)
        dropped = trainer.commonit.grouping.dropped
        assert len(trainer.train_dataset) == 7 and dropped.by_group == by_group
        assert all("max_length=40" in reason for reason in dropped.by_reason)


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


def test_report_that_cannot_be_made_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a figure")

    for name in ("inspect_groups", "summary_table"):
        monkeypatch.setattr(f"commonit_trl.trainer.reports.{name}", fail)
    trainer, _ = train(tmp_path, id_rows([5, 4]), commonit_report=True)
    assert trainer.state.global_step == 5
    assert sum("(ZeroDivisionError: a figure)" in record.getMessage() for record in caplog.records) == 2


def test_metrics_start_anew_with_each_training(tmp_path):
    """What an interrupted `train` collected is not in the logs of the next one."""

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


def test_loader_that_a_callback_makes_does_not_change_the_metrics(tmp_path):
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
