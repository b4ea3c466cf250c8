"""The model check and the trainer of `commonit sft`; `commonit compare` shares both."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from commonit_trl.trainer.sft import CommonITSFTTrainer


class TrainingStarted(TrainerCallback):
    """Records whether training has started, after which an error is no user error."""

    value = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.value = True


@contextlib.contextmanager
def found_at(option: str, name: str) -> Iterator[None]:
    """Name the option in errors of the hub, which may not even name the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{option}={name!r}: not found or not valid. Give a hub name or a directory. {reason}"
        ) from error


def model_config(model_args: Any, training_args: Any) -> Any:
    """Return the config of the model, which fails before the data are loaded if the model cannot be found.

    Raises:
        ValueError: naming `model_name_or_path`.
    """
    from transformers import AutoConfig

    model = model_args.model_name_or_path
    if model is None:
        raise ValueError("model_name_or_path is not set. Give a hub name or a directory.")
    with found_at("model_name_or_path", model):
        return AutoConfig.from_pretrained(model, **model_source(model_args, training_args))


def make_trainer(model_args: Any, training_args: Any, train: Any, evaluation: Any) -> CommonITSFTTrainer:
    """Make the trainer of `commonit sft`.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: a `CommonITSFTConfig`; this sets its `model_init_kwargs`.
        train: the training rows.
        evaluation: the evaluation rows or None.
    """
    from trl import get_peft_config, get_quantization_config

    training_args.model_init_kwargs = {
        **model_source(model_args, training_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return CommonITSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def model_source(model_args: Any, training_args: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that select the model's files."""
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
