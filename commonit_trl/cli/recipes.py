"""What a run would train on and how, read before it trains: what `commonit inspect` and `commonit group` work on.

A `Recipe` comes from the options of `commonit sft`, whose rows TRL's own trainer prepares here, on a model without
weights; or, for other front ends, from a package that has an entry point in the group `commonit.recipes`:

    [project.entry-points."commonit.recipes"]
    axolotl = "axolotl_plugin.recipe:read_recipe"    # a function: path of the recipe -> Recipe

Cost: that of preparing the rows, about 1,700 a second on one core of a CPU; datasets keeps the result for training.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from trl import SFTConfig

from commonit_trl.cli.data import check_rows, load_splits, named_data
from commonit_trl.grouping import Grouper
from commonit_trl.grouping.dropped import DroppedRows
from commonit_trl.rows import Rows
from commonit_trl.trainer.mixin import data_seed
from commonit_trl.trainer.sft import CommonITSFTConfig, CommonITSFTTrainer, sft_rows

logger = logging.getLogger(__name__)

ENTRY_POINTS = "commonit.recipes"


# A run's options that need its hardware or write, and decide neither rows nor batches; given last, they win.
_OFF = {
    "use_cpu": "true",
    "bf16": "false",
    "fp16": "false",
    "tf32": "false",
    "deepspeed": "",
    "fsdp": "",
    "torch_compile": "false",
    "use_liger_kernel": "false",
    "activation_offloading": "false",
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "push_to_hub": "false",
    "report_to": "none",
}


@dataclass(kw_only=True)
class SFTRecipeConfig(CommonITSFTConfig):
    """The options of `commonit sft`, whose `commonit_*` are checked later, for one metric at a time."""

    def __post_init__(self) -> None:
        if isinstance(self.commonit_task_column, str):  # in a YAML file; the trainer reads it before the checks
            self.commonit_task_column = [self.commonit_task_column]
        SFTConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run before its groups are fitted."""

    options: Any
    """Has the `commonit_*` options as attributes; they may not have been checked yet."""
    rows: Rows
    """The rows as training groups them: tokenised and cut, not packed; raw where no tokenizer is known."""
    seed: int
    """Of the order of samples and of k-means."""
    micro_batch_size: int
    """Samples of a rank's micro-batch: rows, or packs."""
    accumulation_steps: int
    world_size: int = 1
    """Data-parallel ranks."""
    lengths: NDArray[np.int64] | None = None
    """(rows,) tokens that each row costs; None where they are not known."""
    arranged: bool = False
    """Whether training arranges the samples of a step by these lengths."""
    padding_free: bool = False
    """Whether micro-batches are computed without padding."""
    dropped: DroppedRows = field(default_factory=DroppedRows)
    """Rows that preparation drops, which `rows` does not hold."""
    pack: Callable[[Grouper, NDArray[np.int64], int], tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None
    """With packing: from the fitted grouper, (rows,) group ids and ranks to (packs,) group ids and (packs,) tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which recipe, beside those of `commonit sft`."""
    parser.add_argument("--axolotl", metavar="FILE", help="an Axolotl recipe instead of DATA and options")
    parser.add_argument("--tokenizer", metavar="NAME", help="hub name or directory; default, that of the model")
    parser.add_argument("--load", metavar="DIR", help="groups that were saved, instead of fitting new ones")
    parser.set_defaults(compare=None)


def num_processes(launch_flags: list[str]) -> int:
    """The processes that the launch options of a run start, 1 where they do not say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(launch_flags)[0].num_processes


def sft_flags(data: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `commonit sft` that go before and after a user's own: the data, several of which are the entries of
    a mixture, and what lets the options of another machine's run be read on this one."""
    named = (["--dataset_name", *data] if len(data) == 1 else ["--datasets", *data]) if data else []
    off = {**_OFF, "output_dir": tempfile.gettempdir()}
    return named, [part for name, value in off.items() for part in (f"--{name}", value)]


def read_foreign_recipe(front_end: str, path: str) -> Recipe:
    """The recipe of another front end, such as `axolotl`.

    Raises:
        ValueError: where no installed package reads such recipes, and on what is wrong with this one.
    """
    missing = f"--{front_end} {path}: nothing installed reads such recipes: pip install 'commonit-trl[{front_end}]'."
    readers = list(entry_points(group=ENTRY_POINTS, name=front_end))
    if not readers:
        raise ValueError(missing)
    try:
        read = readers[0].load()
    except (ImportError, RuntimeError) as error:  # the plugin makes one of the other, for Axolotl
        raise ValueError(f"{missing} ({error})") from error
    return read(path)


def sft_recipe(
    script_args: Any,
    training_args: Any,
    model_args: Any,
    mixture: Any,
    *,
    metrics: Sequence[str],
    tokenizer: str | None = None,
    world_size: int = 1,
) -> Recipe:
    """The recipe of `commonit sft` with these arguments, of which `training_args` is an `SFTRecipeConfig`.

    Args:
        metrics: that will be asked for; with `task` among them, the entries of a mixture become the tasks.
        tokenizer: name or directory; default, the model's. Without either, rows stay as they are.
        world_size: data-parallel ranks.

    Raises:
        ValueError: on data, a model or a tokenizer that cannot be read, naming the option, and on settings that
            training refuses.
    """
    training_args.commonit_metric = "task" if "task" in metrics else metrics[0]
    train, _ = load_splits(script_args, mixture, training_args)
    data = named_data(script_args, mixture)
    if len(train) == 0:
        raise ValueError(f"{data}: there are no rows: give some.")
    name = tokenizer or model_args.model_name_or_path
    recipe = Recipe(
        options=training_args,
        rows=Rows(train, text_field=training_args.dataset_text_field),
        seed=data_seed(training_args),
        micro_batch_size=training_args.per_device_train_batch_size,
        accumulation_steps=training_args.gradient_accumulation_steps,
        world_size=world_size,
    )
    if name is None:
        lengths = recipe.rows.token_counts() if recipe.rows.tokenized else None
        return replace(recipe, lengths=lengths, arranged=lengths is not None and training_args.commonit_balance_lengths)
    train = _trainable(train, training_args.dataset_text_field)
    check_rows(train, data, training_args.dataset_text_field)
    return _rehearse(recipe, train, name, model_args)


def _trainable(rows: Dataset, text_field: str) -> Dataset:
    """`rows` with a prompt and a completion, where they have only an instruction and an output."""
    present = set(rows.column_names)
    trainable = {"prompt", "messages", "conversations", "input_ids", text_field}
    if present & trainable or not {"instruction", "output"} <= present:
        return rows
    logger.warning(
        "TRL does not train on the columns instruction and output: they are shown as prompt and completion here, and "
        "training needs these."
    )
    read = [column for column in ("instruction", "input", "output") if column in present]
    return rows.map(_as_prompt_completion, batched=True, remove_columns=read, desc="Reading instruction and output")


def _as_prompt_completion(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    inputs = batch.get("input") or [None] * len(batch["instruction"])
    prompts = ("\n".join(filter(None, parts)) for parts in zip(batch["instruction"], inputs, strict=True))
    return {"prompt": [f"{prompt}\n" for prompt in prompts], "completion": [text or "" for text in batch["output"]]}


class _Rehearsal(CommonITSFTTrainer):
    """Prepares the rows as training does, and stops before it groups them."""

    def _commonit_set_up(self) -> None:
        pass

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        pass  # there are no weights to move

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        if packing:  # it is groups that are packed, and packing cuts rows itself
            args = copy.copy(args)
            args.max_length = None
        return super()._prepare_dataset(dataset, processing_class, args, False, *rest)


def _rehearse(recipe: Recipe, train: Dataset, tokenizer_name: str, model_args: Any) -> Recipe:
    """`recipe` with the rows that `CommonITSFTTrainer` would group, and how it would batch them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    args = recipe.options
    trust = {"trust_remote_code": args.trust_remote_code}
    source = {"revision": model_args.model_revision, **trust}
    is_models = tokenizer_name == model_args.model_name_or_path
    option = "model_name_or_path" if is_models else "--tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **(source if is_models else trust))
        model_name = model_args.model_name_or_path
        config = (
            LlamaConfig(vocab_size=len(tokenizer))
            if model_name is None
            else AutoConfig.from_pretrained(model_name, **source)
        )
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{option}={tokenizer_name!r} is not found, or is none: give a hub name or a directory. {said}"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    trainer = _Rehearsal(model=model, args=args, train_dataset=train, processing_class=tokenizer)
    prepared = trainer.train_dataset

    def pack(
        grouper: Grouper, group_ids: NDArray[np.int64], world_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        trainer.commonit_grouper = grouper
        packs = trainer._commonit_pack(prepared, group_ids, args)
        assert trainer.commonit_group_ids is not None
        return trainer.commonit_group_ids, Rows(packs).token_counts()

    cut_at = args.max_length if args.packing and args.packing_strategy == "bfd" else None
    arrangement = trainer._commonit_arrangement_lengths()
    return replace(
        recipe,
        rows=sft_rows(trainer, prepared, args, max_length=cut_at),
        lengths=Rows(prepared).token_counts() if arrangement is None else arrangement,
        arranged=arrangement is not None,
        padding_free=trainer.padding_free,
        pack=pack if args.packing else None,
    )
