"""Small real parts for the tests: a byte tokenizer, tiny models, numbered rows and a recorder of the model's inputs."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
    set_seed,
)

from commonit_trl.plan import EpochPlan, plan_epoch

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUIET_TRAINER = {  # default training arguments of test runs
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
}
QUIET = {**QUIET_TRAINER, "max_length": None}  # of TRL's trainers
RUN_TIME = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
ID_DIGITS = 3
ID_BASE = 100


def accept_cpu_ranks() -> None:
    """Let torch load to "cpu:0", where transformers 5.16 wants the optimizer's state on several CPU ranks."""
    torch.serialization.register_package(
        50, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, `<pad>`, `<eos>` and a chat template with generation marks."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(architecture: str = "llama", seed: int = 0, vocab_size: int = 258, dropout: float = 0.0) -> Any:
    """Make a random two-layer float32 model of a paper's architecture: `llama`, `qwen2` or `bloom`."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    config = {
        "llama": lambda: LlamaConfig(**common, **layers, attention_dropout=dropout),
        "qwen2": lambda: Qwen2Config(**common, **layers, attention_dropout=dropout),
        "bloom": lambda: BloomConfig(**common, n_layer=2, n_head=2, attention_dropout=dropout),
    }[architecture]()
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def id_rows(group_sizes: list[int], seed: int = 0, max_tokens: int = 40) -> Dataset:
    """Make shuffled tokenised rows of different lengths for the given groups.

    `input_ids` starts with the row number, `labels` masks the number and one more token, `task` names the group, and
    `row` is the number.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rng.shuffle(groups)
    rows = []
    for number, group in enumerate(groups):
        digits = [number // ID_BASE**place % ID_BASE for place in reversed(range(ID_DIGITS))]
        filler = rng.integers(ID_BASE, 250, size=int(rng.integers(2, max_tokens - ID_DIGITS))).tolist()
        tokens = digits + filler
        labels = [-100] * (ID_DIGITS + 1) + tokens[ID_DIGITS + 1 :]
        rows.append({"input_ids": tokens, "labels": labels, "task": f"g{group:03d}", "row": number})
    return Dataset.from_list(rows)


def read_ids(inputs: dict[str, torch.Tensor]) -> list[int]:
    """Read the row numbers from a micro-batch of `id_rows`, padded or padding-free."""
    tokens = inputs["input_ids"]
    if "attention_mask" not in inputs and "position_ids" in inputs:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
        digits = torch.stack([tokens[0, starts + place] for place in range(ID_DIGITS)], dim=1)
    else:
        digits = tokens[:, :ID_DIGITS]
    places = torch.tensor([ID_BASE**place for place in reversed(range(ID_DIGITS))], device=tokens.device)
    return (digits * places).sum(dim=1).tolist()


def plan_of(rows: Dataset, **arguments: Any) -> EpochPlan:
    """Plan an epoch of `id_rows` by task with micro-batches of 2 and other `arguments` of `plan_epoch`."""
    groups, lengths = [int(task[1:]) for task in rows["task"]], [len(tokens) for tokens in rows["input_ids"]]
    return plan_epoch(groups, lengths, micro_batch_size=QUIET["per_device_train_batch_size"], **arguments)


def row_losses(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
    """Compute each row's summed loss over its trained tokens, and the number of these tokens.

    Repeats the forward pass of a Llama, since TRL's may return no logits.
    """
    names = {"input_ids", "attention_mask", "position_ids"} & set(inputs)
    with torch.no_grad():
        hidden = model.model(**{name: inputs[name] for name in names}).last_hidden_state
        log_likelihood = model.lm_head(hidden)[:, :-1].double().log_softmax(-1)
    labels = inputs["shift_labels"][:, :-1] if "shift_labels" in inputs else inputs["labels"][:, 1:]
    chosen = log_likelihood.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    trained = labels != -100
    return (-chosen * trained).sum(1).tolist(), trained.sum(1).tolist()


def group_losses(model: Any, rows: Dataset, groups: Sequence[str]) -> dict[str, float]:
    """Compute the token-weighted loss of each group of `id_rows`, row by row, with a Llama.

    Args:
        groups: (rows,) group of each row.
    """
    sums: dict[str, list[float]] = {}
    for row, group in zip(rows, groups, strict=True):
        (loss,), (tokens,) = row_losses(model, {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")})
        total = sums.setdefault(group, [0.0, 0])
        total[0] += loss
        total[1] += tokens
    return {name: loss / tokens for name, (loss, tokens) in sums.items()}


def check_saved_losses(directory: Path, name: str, sizes: list[int]) -> dict[str, Any]:
    """Check the group losses of the last evaluation of a run, whose training set has the groups g000 and g001.

    Args:
        directory, name: of the files that the run wrote.
        sizes: of the groups of the evaluation set.

    Returns:
        The result of the run.
    """
    result = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    model, rows = tiny_model().eval(), id_rows(sizes, seed=1)
    model.load_state_dict(load_file(directory / f"{name}.safetensors"))
    groups = [task if task in ("g000", "g001") else "(unseen task)" for task in rows["task"]]
    logged = [entry for entry in result["log"] if "eval_loss" in entry][-1]
    for group, loss in group_losses(model, rows, groups).items():
        assert abs(logged[f"eval_{group}_loss"] - loss) <= 1e-5 * loss
    return result


class Recorder(TrainerCallback):
    """Writes the model's inputs on this rank: a JSON line per micro-step, so that none is lost when killed.

    Each line is `{"step": optimizer step, "ids": row numbers}`; with `losses`, also the result of `row_losses`.
    """

    def __init__(self, path: str | Path, losses: bool = False) -> None:
        self.losses = losses
        self.path = f"{path}.rank{os.environ.get('RANK', '0')}"
        self.step = 0

    def attach(self, trainer: Any) -> "Recorder":
        trainer.model.register_forward_pre_hook(self._record, with_kwargs=True)
        trainer.add_callback(self)
        return self

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def _record(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        line = {"step": self.step, "ids": read_ids(kwargs)}
        if self.losses:
            line["losses"], line["trained"] = row_losses(model, kwargs)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def recorded(path: str | Path, world_size: int = 1) -> dict[int, list[list[list[int]]]]:
    """Read the files of `Recorder`: optimizer step -> rank -> micro-step -> row numbers."""
    steps: dict[int, list[list[list[int]]]] = {}
    for rank in range(world_size):
        for line in Path(f"{path}.rank{rank}").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], [[] for _ in range(world_size)])[rank].append(entry["ids"])
    return steps


def rows_in(steps: Iterable[list[list[list[int]]]]) -> list[int]:
    """Return the row numbers of recorded steps."""
    return [row for step in steps for rank in step for batch in rank for row in batch]


def epochs_of(steps: dict[int, Any], count: int = 2) -> list[list[Any]]:
    """Divide recorded steps into epochs of as many steps each."""
    assert sorted(steps) == list(range(len(steps))) and len(steps) % count == 0
    size = len(steps) // count
    return [[steps[step] for step in range(epoch * size, (epoch + 1) * size)] for epoch in range(count)]


def check_two_epochs(steps: dict[int, list[list[list[int]]]], rows: Dataset, **arguments: Any) -> int:
    """Check that recorded steps are two epochs of the plan: its micro-batches on each rank, pure, every row in each.

    Args:
        arguments: of `plan_of`, with `world_size`.

    Returns:
        The number of steps in an epoch.
    """
    for epoch, own in enumerate(epochs_of(steps)):
        plan = plan_of(rows, **arguments, epoch=epoch)
        assert plan.num_steps == len(own)
        for rank in range(arguments["world_size"]):
            assert [batch for step in own for batch in step[rank]] == list(plan.batches(rank))
        check_pure(own, rows)
        assert set(rows_in(own)) == set(range(len(rows)))
        assert len(rows_in(own)) == len(rows) + plan.summary().repeated
    return len(steps) // 2


def check_pure(steps: Iterable[list[list[list[int]]]], rows: Dataset) -> None:
    """Check that each recorded step holds rows of one task."""
    tasks = rows["task"][:]
    for step in steps:
        assert len({tasks[row] for row in rows_in([step])}) == 1
