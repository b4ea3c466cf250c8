"""The test matrix: kinds of trainer x forms of data x options, one `Case` per line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DataCollatorForLanguageModeling

from helpers.kinds import KINDS, MASKED, Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A kind of trainer with a form of data and options."""

    kind: Kind
    form: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    cuts_rows: bool = False
    """Whether packing cuts rows, so that they cannot be found in what the model sees."""

    @property
    def evaluates(self) -> bool:
        return "evaluated" in self.options

    @property
    def name(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items() if name not in ("extra", "evaluated")]
        return " ".join(
            filter(None, [self.kind.name, self.form, *map(str, options), *self.options.get("evaluated", ())])
        )

    def make(self, directory: Path, metric: str | None, **options: Any) -> Any:
        return self.kind.make(directory, metric, self.form, **{**options, **self.options})


def case(kind: str, form: str = "", cuts_rows: bool = False, **options: Any) -> Case:
    return Case(kind=KINDS[kind], form=form, cuts_rows=cuts_rows, options=options)


def _random_masks() -> dict[str, Any]:
    extra = MASKED()
    return {**extra, "data_collator": DataCollatorForLanguageModeling(extra["processing_class"])}


PACKED = {"packing": True, "max_length": 64, "gradient_accumulation_steps": 1}

CASES = [
    *(case(kind) for kind in KINDS),
    *(case(kind, gradient_accumulation_steps=1) for kind in ("sft", "bert-classes", "t5", "dpo")),
    case("sft", "text"),
    case("sft", "prompt_completion"),
    case("sft", "prompt_completion", completion_only_loss=False),
    case("sft", "messages"),
    case("sft", "messages", assistant_only_loss=True),
    case("sft", "text", evaluated=("one", "two"), eval_strategy="steps", eval_steps=2),
    case("sft", **PACKED),
    case("sft", packing_strategy="wrapped", cuts_rows=True, **PACKED),
    case("sft", padding_free=True, max_length=None),
    case("sft", dataloader_num_workers=2),
    case("sft", loss_type="dft"),
    case("sft", loss_type="nll", label_smoothing_factor=0.1),
    case("sft-moe", evaluated=("one",)),
    case("causal", label_smoothing_factor=0.1),
    case("causal", evaluated=("one",)),
    case("bert-classes", evaluated=("one", "two"), eval_strategy="epoch"),
    case("bert-classes", dataloader_num_workers=2),
    case("bert-classes", label_smoothing_factor=0.1),
    case("bert-tags", label_smoothing_factor=0.1),
    case("llama-regression", evaluated=("one",)),
    case("t5", label_smoothing_factor=0.1),
    case("t5", evaluated=("one", "two"), eval_strategy="epoch"),
    case("mean-loss", gradient_accumulation_steps=1),
    case("dpo", evaluated=("one", "two"), eval_strategy="epoch"),
    case("dpo", loss_type="ipo"),
    case("reward", evaluated=("one",), center_rewards_coefficient=0.1),
    case("kto", evaluated=("one",)),
    case("vit-classes", evaluated=("one",)),
]
"""Trained by the parent, and by CommonIT without and with a metric."""

BASELINE_CASES = [
    # Not trained with a metric: random masks depend on the order of rows, or training would be slow.
    case("bert-masked", extra=_random_masks),
    case("bert-masked", extra=_random_masks, evaluated=("one",)),
    case("sft", "text", num_train_epochs=3, max_steps=7, warmup_steps=2),
    case("kto", loss_type="kto", train_sampling_strategy="sequential"),
    # Refused with a metric.
    case("sft", train_sampling_strategy="group_by_length"),
    case("causal", train_sampling_strategy="group_by_length"),
    case("sft", dataloader_drop_last=True),
    case("sft", dataloader_num_workers=2, dataloader_persistent_workers=True),
    case("sft", label_smoothing_factor=0.1),  # TRL 1.9 does not support it
    # Refused by the parent.
    case("sft", "text", assistant_only_loss=True),
    case("sft", "text", completion_only_loss=True),
    case("sft", "text", packing=True, max_length=None),
    case("sft", "text", eval_strategy="epoch"),
    case("sft", "preferences"),
    case("sft", "text", evaluated=("one",), packing=True, max_length=64, eval_packing=False),
    case("dpo", "text"),
    case("kto", loss_type="kto"),
    case("kto", per_device_train_batch_size=1),
    case("reward", "classes"),
    case("bert-classes", "text"),
    case("bert-classes", eval_strategy="epoch"),
    case("vit-classes", train_sampling_strategy="group_by_length"),
    case("bert-classes", extra=lambda: {"processing_class": None, "data_collator": None}),
]
