"""Quiet in-process trainers of tiny models, and a record of the model's inputs."""

import atexit
import gc
import json
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer
from helpers import toys
from helpers.toys import ID_BASE, ID_DIGITS, RUN_TIME, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # the Trainer collects garbage when training starts; skip the objects of the imports
atexit.register(gc.unfreeze)

QUIET = {
    **toys.QUIET,
    "per_device_eval_batch_size": 3,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "seed": 7,
}

SFT_FLAGS = {  # options of `commonit sft` for a quick run on a CPU
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
}


def rows_of_task(task, count):
    """Make rows with `task`, `prompt` and `completion` of different lengths."""
    return [{"task": task, "prompt": f"Do {task} {n}:", "completion": f" {task}" * (n % 7 + 1)} for n in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def make_trainer(directory, rows, *, trainer_class=CommonITSFTTrainer, model="llama", extra=None, **options):
    """Make a trainer of a tiny model; `SFTTrainer` takes the same `options` without those of CommonIT.

    Args:
        model: architecture of `tiny_model`, or a model.
        extra: more arguments of the trainer.
    """
    options = {"output_dir": str(directory / "out"), **QUIET, **options}
    if trainer_class is SFTTrainer:
        config = SFTConfig(**{name: value for name, value in options.items() if not name.startswith("commonit")})
    else:
        config = CommonITSFTConfig(
            **{
                "commonit_metric": "task",
                "commonit_cache_dir": str(directory / "cache"),
                "commonit_report": False,
                **options,
            }
        )
    arguments = {"processing_class": tiny_tokenizer(), **(extra or {})}
    model = tiny_model(model) if model in ("llama", "qwen2", "bloom") else model
    return trainer_class(model=model, args=config, train_dataset=rows, **arguments)


def train(directory, rows, **arguments):
    """Train and return the trainer of `make_trainer` and the record of its model's inputs."""
    trainer = make_trainer(directory, rows, **arguments)
    seen = Seen(trainer)
    trainer.train()
    return trainer, seen


def without_run_times(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(RUN_TIME)}


@dataclass(frozen=True)
class Row:
    """A row of the model's inputs, without padding."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def number(self):
        """The row number in `toys.id_rows`."""
        return sum(
            token * ID_BASE**place for place, token in zip(reversed(range(ID_DIGITS)), self.tokens, strict=False)
        )

    @property
    def text(self):
        return tiny_tokenizer().decode(self.tokens)

    @property
    def trained(self):
        """The number of trained tokens."""
        return sum(label != -100 for label in self.labels)


@dataclass
class Epoch:
    """The model's inputs in one epoch: optimizer step -> micro-batches of rows."""

    steps: list[list[list[Row]]] = field(default_factory=list)

    @property
    def rows(self):
        return [row for step in self.steps for batch in step for row in batch]

    @property
    def numbers(self):
        """Sorted numbers of the rows."""
        return sorted(row.number for row in self.rows)


class Seen(TrainerCallback):
    """Records the inputs of the trainer's model in `epochs`; restarts with each training."""

    def __init__(self, trainer):
        self.epochs: list[Epoch] = []
        trainer.model.register_forward_pre_hook(self._record, with_kwargs=True)
        trainer.add_callback(self)

    @property
    def steps(self):
        """All optimizer steps; a step is a list of its rows."""
        return [[row for batch in step for row in batch] for epoch in self.epochs for step in epoch.steps]

    @property
    def rows(self):
        return Counter(row for step in self.steps for row in step)

    def on_train_begin(self, args, state, control, **kwargs):
        self.epochs.clear()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append(Epoch())

    def on_step_begin(self, args, state, control, **kwargs):
        self.epochs[-1].steps.append([])

    def _record(self, model, args, kwargs):
        # TRL repeats some forward passes without gradient for its metrics.
        if model.training and torch.is_grad_enabled():
            self.epochs[-1].steps[-1].append(rows_of(kwargs))


def rows_of(inputs):
    """Split a padded or padding-free batch into rows without padding."""
    tokens = inputs["input_ids"]
    labels = inputs.get("labels", tokens)  # label smoothing removes them
    if "attention_mask" in inputs:
        kept = inputs["attention_mask"].bool()
        pairs = [(t[mask], label[mask]) for t, label, mask in zip(tokens, labels, kept, strict=True)]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], tokens.shape[1]]
        pairs = [(tokens[0, start:end], labels[0, start:end]) for start, end in zip(starts, ends, strict=True)]
    return [Row(tuple(t.tolist()), tuple(label.tolist())) for t, label in pairs]


def groups_of_steps(seen, group_of):
    """Return the group of each optimizer step; fail if a step holds several."""
    found = []
    for rows in seen.steps:
        groups = {group_of(row) for row in rows}
        assert len(groups) == 1, f"a step holds {groups}"
        found += groups
    return found


def as_argv(options):
    """Return `--name value ...`; a list gives several values, None omits the option."""
    argv = []
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv
