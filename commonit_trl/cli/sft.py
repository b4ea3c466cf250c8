"""The model check and the trainer of `commonit sft`; `commonit compare` shares both."""

from typing import Any

from transformers import TrainerCallback

from commonit_trl.trainer.sft import CommonITSFTTrainer


class TrainingStarted(TrainerCallback):
    """Records whether training has started, after which an error is no user error."""

    value = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.value = True


def check_model(model_args: Any, training_args: Any) -> None:
    """Refuse a model that cannot be found, before the data are loaded.

    The hub's own error may not name the model.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: a `CommonITSFTConfig`.

    Raises:
        ValueError: naming `model_name_or_path`.
    """
    from transformers import AutoConfig

    model = model_args.model_name_or_path
    if model is None:
        raise ValueError("model_name_or_path is not set. Give a hub name or a directory.")
    try:
        AutoConfig.from_pretrained(model, **_model_source(model_args, training_args))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={model!r}: no model found. Give a hub name or a directory. {error}"
        ) from error


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
        **_model_source(model_args, training_args),
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


def _model_source(model_args: Any, training_args: Any) -> dict[str, Any]:
    return {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
