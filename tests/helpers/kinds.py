"""Kinds of trainer and forms of data of the differential tests, and records of their runs.

To add a kind, add one `Kind(...)` to `KINDS`: the parent trainer, its arguments class, a function that makes a tiny
model, the default form of its data (a name in `FORMS`), and any options or trainer arguments.
"""

import atexit
import copy
import functools
import gc
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from commonit_trl import CommonITArguments, CommonITMixin, CommonITSFTConfig, CommonITSFTTrainer
from helpers.toys import QUIET_TRAINER, RUN_TIME, tiny_tokenizer

gc.collect()
gc.freeze()  # the Trainer collects garbage when training starts; skip the objects of the imports
atexit.register(gc.unfreeze)

IGNORED_LABEL = -100
MASK = 258
"""Id of the mask token."""
GROUP_SIZES = {"a": 12, "b": 12, "c": 9}
"""With 6 samples per step (or 4, or 8 on two ranks), each micro-batch has a sample without repeats."""
QUIET = {
    **QUIET_TRAINER,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "seed": 7,
}


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The content of a row in any form."""

    number: int
    group: str
    tokens: list[int]
    """Starts with the number; a third of the samples are four times as long as the others."""

    @property
    def text(self) -> str:
        return f"{self.number:03d} " + self.group * len(self.tokens)


@functools.cache
def samples() -> list[Sample]:
    """Make the samples of every run, in an order that mixes groups and lengths."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(list(GROUP_SIZES), list(GROUP_SIZES.values())))
    made = []
    for number, group in enumerate(groups):
        length = int(rng.integers(24, 40) if number % 3 == 0 else rng.integers(3, 10))
        made.append(Sample(number, str(group), [number, *rng.integers(100, 250, length).tolist()]))
    return made


def _labels(tokens: list[int]) -> list[int]:
    return [IGNORED_LABEL] * 2 + tokens[2:]


FORMS: dict[str, Callable[[Sample], dict[str, Any]]] = {
    "tokens": lambda s: {"input_ids": s.tokens, "labels": _labels(s.tokens)},
    "text": lambda s: {"text": s.text},
    "prompt_completion": lambda s: {"prompt": s.text[:6], "completion": s.text[6:]},
    "messages": lambda s: {
        "messages": [{"role": "user", "content": s.text[:6]}, {"role": "assistant", "content": s.text[6:]}]
    },
    "classes": lambda s: {"input_ids": s.tokens, "label": s.number % 2},
    "numbers": lambda s: {"input_ids": s.tokens, "label": s.number / 10},
    "tags": lambda s: {"input_ids": s.tokens, "labels": [IGNORED_LABEL, *(token % 3 for token in s.tokens[1:])]},
    "unlabelled": lambda s: {"input_ids": s.tokens},
    "translations": lambda s: {"input_ids": s.tokens, "labels": s.tokens[: 2 + len(s.tokens) // 2][::-1]},
    "preferences": lambda s: {"prompt": s.text[:6], "chosen": s.text[6:], "rejected": f"{s.number} no"},
    "chosen_rejected": lambda s: {"chosen": s.text, "rejected": f"{s.number:03d} no"},
    "unpaired": lambda s: {"prompt": s.text[:6], "completion": s.text[6:], "label": s.number % 3 > 0},
    "pixels": lambda s: {"pixel_values": _pixels(s).tolist(), "labels": s.number % 2},
    "images": lambda s: {
        "images": [_image(s)],
        "prompt": [{"role": "user", "content": s.text[:6]}],
        "completion": [{"role": "assistant", "content": s.text[6:]}],
    },
}


def _pixels(sample: Sample) -> np.ndarray:
    return np.random.default_rng(sample.number).random((3, 8, 8), dtype=np.float32)


def _image(sample: Sample) -> Any:
    from PIL import Image

    return Image.fromarray((_pixels(sample).transpose(1, 2, 0) * 255).astype(np.uint8))


def dataset(form: str, rows: slice = slice(None)) -> Dataset:
    """Make the dataset of the samples in a form, with their group in the column `task`."""
    return Dataset.from_list([{**FORMS[form](sample), "task": sample.group} for sample in samples()[rows]])


def image_rows() -> Dataset:
    """Make the rows of form `images`, a third of them without an image, with their modality."""
    rows = []
    for sample in samples():
        modality = "text" if sample.number % 3 == 0 else "image"
        row = {**FORMS["images"](sample), "task": sample.group, "modality": modality}
        rows.append(row | {"images": row["images"] if modality == "image" else []})
    return Dataset.from_list(rows)


# --- models -------------------------------------------------------------------------------------------------------


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "dropout_rate")


def make_config(name: str, dropout: float = 0.0, **options: Any) -> Any:
    """Make a configuration of two small layers; `dropout` is that of all layers that have one."""
    config_class, tokenizer = getattr(transformers, name), tiny_tokenizer()
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 260}
    given = {**SIZES, **tokens, **dict.fromkeys(DROPOUTS, dropout)}
    known = {name for name in given if name in config_class.__annotations__ or hasattr(config_class, name)}
    return config_class(**{**{name: given[name] for name in known}, **options})


def make_model(name: str, config: str, dropout: float = 0.0, **options: Any) -> Any:
    """Make a random float32 model from the names of its classes in transformers."""
    set_seed(0)
    return getattr(transformers, name)(make_config(config, dropout, **options))


def tiny_llava(dropout: float = 0.0) -> Any:
    """Make a LLaVA model of a CLIP encoder for 8 x 8 pixels in 4 patches and a Llama."""
    tokenizer = image_processor().tokenizer
    config = transformers.LlavaConfig(
        text_config=make_config("LlamaConfig", dropout, vocab_size=len(tokenizer)),
        vision_config=make_config("CLIPVisionConfig", dropout, image_size=8, patch_size=4),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    set_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def image_processor() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


# --- custom trainers and losses -------------------------------------------------------------------------------------


class MeanLoss(Trainer):
    """Overrides `compute_loss` with a mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        return (loss, outputs) if return_outputs else loss


class DeclaredMeanLoss(MeanLoss):
    """Declares by transformers' flag that its loss is a mean."""

    loss_is_scaled_for_ga = False


def token_loss(outputs, labels, num_items_in_batch=None):
    """Divide the loss by the step's tokens, as transformers documents for `compute_loss_func`."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / ((labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


def mean_loss(outputs, labels, num_items_in_batch=None):
    """Ignore the step's tokens and return the mean."""
    return token_loss(outputs, labels)


class MaskByToken(DataCollatorForLanguageModeling):
    """Masks the same tokens of a row in every batch, so that runs with different orders are comparable."""

    def torch_mask_tokens(self, inputs, special_tokens_mask=None, **kwargs):
        masked = (inputs * 7 + torch.arange(inputs.shape[1])) % 5 == 0
        masked &= inputs != self.tokenizer.pad_token_id
        return torch.where(masked, MASK, inputs), torch.where(masked, inputs, IGNORED_LABEL)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# --- kinds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A trainer, its model and its data."""

    name: str
    model: Callable[..., Any]
    """Takes `dropout`."""
    form: str
    """Of its data where a case names no other; see `FORMS`."""
    parent: type[Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments
    options: dict[str, Any] = field(default_factory=dict)
    """Of `arguments`."""
    extra: Callable[[], dict[str, Any]] = lambda: {"processing_class": tiny_tokenizer()}
    """More arguments of the trainer."""
    loss_over: str = "samples"
    """What its loss of a micro-batch is a mean over, and so what group losses are weighted by: `samples`, `tokens`, or
    `next tokens`, where the first label of a row is not trained."""
    any_cut: bool = False
    """Whether the parent's update is the same however the rows of a step are cut into micro-batches: the loss is a sum
    divided by the number of items of the step. Only then may steps be balanced by length."""
    balances: bool = False
    """Whether its steps are balanced by length."""

    def make(self, directory: Path, metric: str | None, form: str = "", dropout: float = 0.0, **options: Any) -> Any:
        """Make a trainer.

        Args:
            directory: of its outputs and caches.
            metric: `commonit_metric`; None makes the parent's trainer.
            form: of the data; empty for the kind's default.
            options: of the arguments; `extra` returns trainer arguments, `evaluated` names evaluation sets.
        """
        extra = {"train_dataset": dataset(form or self.form), **self.extra(), **options.pop("extra", dict)()}
        evaluated = options.pop("evaluated", ())
        sets = {name: dataset(form or self.form, slice(n, 7 + 3 * n)) for n, name in enumerate(evaluated)}
        if sets:
            extra["eval_dataset"] = next(iter(sets.values())) if len(sets) == 1 else sets
        options = {"output_dir": str(directory / "out"), **QUIET, **self.options, **options}
        if metric is None:
            options = {name: value for name, value in options.items() if not name.startswith("commonit")}
            trainer, arguments = self.parent, self.arguments
        else:
            options |= {"commonit_metric": metric, "commonit_report": False}
            options["commonit_cache_dir"] = str(directory / "cache")
            trainer, arguments = ours(self.parent), our_arguments(self.arguments)
        model = self.model(dropout=dropout)
        if isinstance(extra.get("data_collator"), DataCollatorForSeq2Seq):
            extra["data_collator"].model = model  # creates the decoder's inputs for label smoothing
        return trainer(model=model, args=arguments(**options), **extra)


@functools.cache
def ours(parent: type[Trainer]) -> type[Trainer]:
    """Return a subclass of the parent with `CommonITMixin`, as a user writes it."""
    if parent is SFTTrainer:
        return CommonITSFTTrainer
    return type(f"CommonIT{parent.__name__}", (CommonITMixin, parent), {})


@functools.cache
def our_arguments(parent: type[TrainingArguments]) -> type[TrainingArguments]:
    if parent is SFTConfig:
        return CommonITSFTConfig
    name, bases = f"CommonIT{parent.__name__}", (CommonITArguments, parent)
    made = make_dataclass(name, [], bases=bases, kw_only=True, namespace={"__module__": __name__})
    return globals().setdefault(name, made)  # a checkpoint pickles the arguments by the name of their class


def _with(collator: Callable[[Any], Any]) -> Callable[[], dict[str, Any]]:
    def extra() -> dict[str, Any]:
        tokenizer = tiny_tokenizer()
        tokenizer.mask_token = "<mask>"
        return {"processing_class": tokenizer, "data_collator": collator(tokenizer)}

    return extra


def _models(name: str, config: str, **options: Any) -> Callable[..., Any]:
    return functools.partial(make_model, name, config, **options)


LLAMA = _models("LlamaForCausalLM", "LlamaConfig")
SCORES = _models("LlamaForSequenceClassification", "LlamaConfig", num_labels=1)
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MIXTRAL = _models("MixtralForCausalLM", "MixtralConfig", **MOE)
BERT = _models("BertForSequenceClassification", "BertConfig")
TAGGER = _models("BertForTokenClassification", "BertConfig", num_labels=3)
MASKER = _models("BertForMaskedLM", "BertConfig")
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
T5 = _models("T5ForConditionalGeneration", "T5Config", **T5_SIZES)
VIT = _models("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4)

PADDED = _with(DataCollatorWithPadding)
CAUSAL = _with(lambda tokenizer: DataCollatorForSeq2Seq(tokenizer, padding=True))
TAGS = _with(DataCollatorForTokenClassification)
MASKED = _with(MaskByToken)
SEQ2SEQ = _with(DataCollatorForSeq2Seq)
WITH_REFERENCE = lambda: {"processing_class": tiny_tokenizer(), "ref_model": LLAMA()}  # noqa: E731
IMAGES = lambda: {"processing_class": image_processor()}  # noqa: E731


def _sft(name: str, **options: Any) -> Kind:
    options = {"model": LLAMA, "form": "tokens", "loss_over": "next tokens", "any_cut": True, **options}
    return Kind(name=name, parent=SFTTrainer, arguments=SFTConfig, **options)


def _causal(name: str, **options: Any) -> Kind:
    return Kind(name=name, **{"model": LLAMA, "form": "tokens", "loss_over": "next tokens", "extra": CAUSAL, **options})


KINDS = {
    kind.name: kind
    for kind in [
        _sft("sft", balances=True),
        _sft("sft-moe", model=MIXTRAL, any_cut=False),
        _sft("sft-vision", model=tiny_llava, form="images", extra=IMAGES, options={"max_length": None}),
        _causal("causal", any_cut=True, balances=True),
        _causal("mean-loss", parent=MeanLoss),
        _causal("declared-mean-loss", parent=DeclaredMeanLoss),
        _causal("token-loss-func", extra=lambda: {**CAUSAL(), "compute_loss_func": token_loss}, any_cut=True),
        _causal("mean-loss-func", extra=lambda: {**CAUSAL(), "compute_loss_func": mean_loss}),
        Kind(
            name="bert-classes",
            model=BERT,
            form="classes",
            extra=lambda: {**PADDED(), "compute_metrics": accuracy},
        ),
        Kind(name="llama-regression", model=SCORES, form="numbers", extra=PADDED),
        Kind(name="bert-tags", model=TAGGER, form="tags", extra=TAGS, loss_over="tokens"),
        Kind(name="bert-masked", model=MASKER, form="unlabelled", extra=MASKED, loss_over="tokens"),
        Kind(
            name="t5",
            parent=Seq2SeqTrainer,
            arguments=Seq2SeqTrainingArguments,
            model=T5,
            form="translations",
            extra=SEQ2SEQ,
            loss_over="tokens",
        ),
        Kind(name="dpo", parent=DPOTrainer, arguments=DPOConfig, model=LLAMA, form="preferences", extra=WITH_REFERENCE),
        Kind(
            name="dpo-precomputed",
            parent=DPOTrainer,
            arguments=DPOConfig,
            model=LLAMA,
            form="preferences",
            options={"precompute_ref_log_probs": True},
        ),
        Kind(name="orpo", parent=ORPOTrainer, arguments=ORPOConfig, model=LLAMA, form="preferences"),
        Kind(name="cpo", parent=CPOTrainer, arguments=CPOConfig, model=LLAMA, form="preferences"),
        Kind(name="reward", parent=RewardTrainer, arguments=RewardConfig, model=SCORES, form="chosen_rejected"),
        Kind(
            name="kto",
            parent=KTOTrainer,
            arguments=KTOConfig,
            model=LLAMA,
            form="unpaired",
            extra=WITH_REFERENCE,
            options={"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
        ),
        Kind(name="vit-classes", model=VIT, form="pixels", extra=dict, any_cut=True),
    ]
}


# --- records of runs ------------------------------------------------------------------------------------------------


@dataclass
class Run(TrainerCallback):
    """Records the model's inputs and the results of a run."""

    steps: list[list[dict[str, Any]]] = field(default_factory=list)
    """Optimizer steps of micro-batches, as the model's forward gets them."""
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    """Batches of the evaluation, likewise."""
    losses: list[list[tuple[dict[str, Any], torch.Tensor | None]]] = field(default_factory=list)
    """Optimizer steps of micro-batches, as `compute_loss` gets them: the inputs, and the step's number of items."""
    updates: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """The gradient of each optimizer step before it is clipped."""
    logs: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append([])
        self.losses.append([])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        self.updates.append({name.removeprefix("module."): grad.clone() for name, grad in gradients.items()})

    def see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = copied(named(args, kwargs))
        if not model.training:
            self.evaluated.append(inputs)
        elif torch.is_grad_enabled():  # TRL repeats some forward passes without gradient for its metrics
            self.steps[-1].append(inputs)

    @property
    def rows(self) -> list[list[list[tuple[Any, ...]]]]:
        """Rows of each micro-batch of each step; see `rows_of`."""
        return [[rows_of(batch) for batch in step] for step in self.steps]

    @property
    def sizes(self) -> list[list[int]]:
        """Rows in each micro-batch of each step."""
        return [[len(batch) for batch in step] for step in self.rows]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Inputs of `compute_loss` for all micro-batches."""
        return [inputs for step in self.losses for inputs, _ in step]


def train(trainer: Any, evaluates: bool = False, resume: Path | None = None) -> Run:
    """Train, from the checkpoint `resume` on if there is one, and return the record."""
    run = Run()
    hook = trainer.model.register_forward_pre_hook(run.see, with_kwargs=True)
    trainer.add_callback(run)
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        if model.training:
            run.losses[-1].append((copied(inputs), kwargs.get("num_items_in_batch")))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded  # patch the object: its class must stay the user's
    trainer.train(resume_from_checkpoint=resume and str(resume))
    if evaluates:
        trainer.evaluate()
    trainer.compute_loss = compute_loss
    hook.remove()
    run.logs = [
        {name: value for name, value in entry.items() if not name.endswith(RUN_TIME)}
        for entry in trainer.state.log_history
    ]
    run.weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return run


def named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's forward by name; ORPO and CPO give `input_ids` without one."""
    return {**dict(zip(("input_ids",), args)), **kwargs}


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if torch.is_tensor(value) else copy.copy(value) for name, value in inputs.items()}


def outcome(make: Callable[[], Any], evaluates: bool = False) -> Run | tuple[str, str]:
    """Train the result of `make`; if it is refused, return type and message without CommonIT's class names."""
    try:
        return train(make(), evaluates)
    except Exception as error:
        return type(error).__name__, re.sub(r"CommonIT(?=\w)", "", str(error))


class Fed:
    """Mixin for a parent trainer that trains on given micro-batches instead of a sampler's.

    `fed` is a list of micro-batches: row numbers, or collated inputs.
    """

    fed: Sequence[Any] = ()

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.fed[0], dict):
            return DataLoader(self.fed, batch_size=None, collate_fn=copied)
        loader = super().get_train_dataloader()
        return DataLoader(loader.dataset, batch_sampler=self.fed, collate_fn=loader.collate_fn)


def feed(kind: Kind, directory: Path, micro_batches: Sequence[Any], form: str = "", **options: Any) -> Run:
    """Run the parent on given micro-batches, with `max_grad_norm` and learning rate 0."""
    trainer = kind.make(directory, None, form, **{**FROZEN, **options})
    trainer.__class__ = type(kind.parent.__name__, (Fed, kind.parent), {"fed": micro_batches})
    return train(trainer)


FROZEN = {"learning_rate": 0.0, "max_grad_norm": 0.0}
"""The model stays as it is, so that the updates of all steps can be compared."""


# --- rows and losses ------------------------------------------------------------------------------------------------


def rows_of(inputs: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the rows of a batch without padding, as comparable values.

    Batches of preferences hold two sequences for each.
    """
    tokens, labels = inputs.get("input_ids"), inputs.get("labels")
    if tokens is None:
        return [tuple(image.flatten().tolist()) for image in inputs["pixel_values"]]
    if labels is not None and labels.shape == tokens.shape:  # masked language modelling replaces input tokens
        tokens = torch.where((tokens == MASK) & (labels != IGNORED_LABEL), labels, tokens)
    if "attention_mask" in inputs:
        return [tuple(row[mask.bool()].tolist()) for row, mask in zip(tokens, inputs["attention_mask"], strict=True)]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()  # padding-free
    ends = [*starts[1:], tokens.shape[1]]
    return [tuple(tokens[0, start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def row_groups(kind: Kind, directory: Path, form: str = "") -> dict[tuple[Any, ...], str]:
    """Map each row, collated alone by the parent trainer, to its group."""
    trainer = kind.make(directory, None, form)
    loader = trainer.get_train_dataloader()
    groups: dict[tuple[Any, ...], str] = {}
    seen: list[tuple[Any, ...]] = []
    hook = lambda model, args, kwargs: seen.extend(rows_of(named(args, kwargs)))  # noqa: E731
    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for number, sample in enumerate(samples()):
            seen.clear()
            trainer.compute_loss(trainer.model, loader.collate_fn([loader.dataset[number]]))
            groups |= dict.fromkeys(seen, sample.group)
    return groups


def trained_tokens(inputs: dict[str, Any], shifted: bool) -> int:
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, int(shifted) :]
    return int((labels != IGNORED_LABEL).sum())


def number_of_samples(inputs: dict[str, Any]) -> int:
    return max(len(value) for value in inputs.values() if torch.is_tensor(value) and value.ndim)


def group_loss(kind: Kind, trainer: Any, micro_batches: list[dict[str, Any]]) -> float:
    """Compute the trainer's loss over micro-batches, weighted by the kind's rule."""
    trainer.model.train()
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, copied(inputs))) for inputs in micro_batches]
    if kind.loss_over == "samples":
        weights = [number_of_samples(inputs) for inputs in micro_batches]
    else:
        weights = [trained_tokens(inputs, kind.loss_over == "next tokens") for inputs in micro_batches]
    return float(np.average(losses, weights=weights))


def change(update: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two updates, relative to the reference."""
    assert update.keys() == reference.keys()
    difference = torch.cat([(update[name] - reference[name]).double().flatten() for name in reference])
    return float(difference.norm() / torch.cat([value.double().flatten() for value in reference.values()]).norm())


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """List the paths at which two nested values differ exactly."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for name in a for found in differences(a[name], b[name], f"{path}.{name}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [found for n, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}[{n}]")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]


def save(run: Run, path: Path) -> None:
    stream = io.BytesIO()
    torch.save({name: getattr(run, name) for name in run.__dataclass_fields__}, stream)
    path.write_bytes(stream.getvalue())


def load(path: Path) -> Run:
    return Run(**torch.load(path, weights_only=False))


def counts(rows: Any) -> Counter:
    return Counter(row for step in rows for batch in step for row in batch)
