"""Read the data and settings of a run before it trains, for `commonit inspect` and `commonit group`.

A `Recipe` comes from the options of `commonit sft`; TRL's trainer prepares its rows, with a model on the meta device.
For other front ends it comes from a package that has an entry point in the group `commonit.recipes`:

    [project.entry-points."commonit.recipes"]
    axolotl = "axolotl_plugin.recipe:read_recipe"    # a function: path of the recipe -> Recipe

Cost: preparing the rows, about 1,700 a second on one CPU core, and the rows that preparation drops once more without
truncation, to count them by group. The datasets library caches the result for training.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from trl import SFTConfig

from commonit_trl.cli import quiet
from commonit_trl.cli.data import check_rows, load_splits, named_data
from commonit_trl.cli.options import Options
from commonit_trl.cli.sft import found_at, model_config, model_source
from commonit_trl.config import parts_of, wrap_lists
from commonit_trl.grouping import Grouper
from commonit_trl.grouping.dropped import NONE_DROPPED, DroppedRows
from commonit_trl.grouping.fit import data_seed
from commonit_trl.grouping.task import with_task_file
from commonit_trl.grouping.tracing import TracedRows
from commonit_trl.rows import Rows
from commonit_trl.trainer.loss import has_auxiliary_loss, is_causal_lm_loss
from commonit_trl.trainer.run import row_costs
from commonit_trl.trainer.sft import CommonITSFTConfig, CommonITSFTTrainer, pack_by_group, prepare_rows
from commonit_trl.trainer.validate import check_settings

logger = logging.getLogger(__name__)

ENTRY_POINTS = "commonit.recipes"
# They switch off what needs the run's hardware or writes files, and affects neither rows nor batches. They come last,
# so they win.
FLAGS = (
    *("--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--tf32", "false", "--deepspeed", "", "--fsdp", ""),
    *("--torch_compile", "false", "--use_liger_kernel", "false", "--activation_offloading", "false"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--push_to_hub", "false"),
    *("--report_to", "none", "--output_dir", tempfile.gettempdir()),
)


@dataclass(kw_only=True)
class SFTRecipeConfig(CommonITSFTConfig):
    """The options of `commonit sft`, whose `commonit_*` options are checked later, for one metric at a time."""

    def __post_init__(self) -> None:
        wrap_lists(self)  # a YAML file may have one value
        SFTConfig.__post_init__(self)


@dataclass(kw_only=True)
class PreparationConfig(SFTRecipeConfig):
    """The options of `commonit sft`, for a trainer that prepares rows and never trains."""

    @property
    def place_model_on_device(self) -> bool:
        """Keep the model on the meta device, where it has no weights to move."""
        return False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run before its groups are fitted."""

    options: Any
    """Has the `commonit_*` options as attributes, possibly not checked yet."""
    rows: Rows
    """The rows that training groups: tokenised and truncated, not packed; raw rows without a tokenizer."""
    seed: int
    """Seed of the order of samples and of k-means."""
    micro_batch_size: int
    """Samples (rows or packs) per micro-batch."""
    accumulation_steps: int
    world_size: int = 1
    """Data-parallel ranks."""
    lengths: NDArray[np.int64] | None = None
    """(rows,) tokens that each row costs, None if unknown."""
    balanced: bool = False
    """Whether training balances each step by these lengths."""
    padding_free: bool = False
    """Whether micro-batches are computed without padding."""
    pack: Callable[[Any, Grouper, NDArray[np.int64], int], tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None
    """With packing: options, fitted grouper, (rows,) group ids, ranks -> (packs,) group ids and (packs,) tokens."""
    source_rows: NDArray[np.int64] | None = None
    """(rows,) row number of each row in the source data, None if the front end does not trace rows."""
    traced: tuple[TracedRows, ...] = ()
    """Source rows that training cannot use, counted by group once groups are fitted."""
    dropped: DroppedRows = NONE_DROPPED
    """Further rows that training cannot use, counted by the front end."""

    def count_dropped(self, grouper: Grouper) -> DroppedRows:
        """Count all rows that training cannot use by the groups of `grouper`, which is fitted."""
        return sum((part.count(grouper) for part in self.traced), start=self.dropped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the recipe; the others are those of `commonit sft`."""
    parser.add_argument("--axolotl", metavar="FILE", help="an Axolotl recipe instead of DATA and options")
    parser.add_argument("--tokenizer", metavar="NAME", help="hub name or directory; default: the model's tokenizer")
    parser.add_argument("--load", metavar="DIR", help="use saved groups instead of fitting new ones")
    quiet.add_arguments(parser)
    parser.set_defaults(compare=None)


def num_processes(launch_flags: list[str]) -> int:
    """Return the number of processes in the launch options of a run, 1 by default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(launch_flags)[0].num_processes


def data_flags(data: Sequence[str]) -> list[str]:
    """Return the flags of `commonit sft` that name the data; several names are the entries of a mixture."""
    return (["--dataset_name", *data] if len(data) == 1 else ["--datasets", *data]) if data else []


def read_foreign_recipe(front_end: str, path: str) -> Recipe:
    """Read the recipe of another front end, such as `axolotl`.

    Raises:
        ValueError: when no installed package reads such recipes, or this one is invalid.
    """
    missing = f"--{front_end} {path}: no package reads such recipes. Run pip install 'commonit-trl[{front_end}]'."
    readers = list(entry_points(group=ENTRY_POINTS, name=front_end))
    if not readers:
        raise ValueError(missing)
    try:
        read = readers[0].load()
    except (ImportError, RuntimeError) as error:  # the Axolotl plugin raises RuntimeError for a missing Axolotl
        raise ValueError(f"{missing} ({error})") from error
    return read(path)


def sft_recipe(given: Options, *, metrics: Sequence[str], tokenizer: str | None = None, world_size: int = 1) -> Recipe:
    """Return the recipe of `commonit sft` with these options.

    Args:
        given: the options; the training arguments are a `PreparationConfig`.
        metrics: the metrics to group by; with `task` among them, the entries of a mixture become the tasks.
        tokenizer: name or directory; default: the model's. Without either, rows stay raw.
        world_size: data-parallel ranks.

    Raises:
        ValueError: on data, a model or a tokenizer that cannot be read, naming the option, on settings that
            training refuses, and when no row has a token to train on.
    """
    args = given.training
    by_task = [metric for metric in metrics if "task" in parts_of(metric)]
    args.commonit_metric = (by_task or metrics)[0]
    train, _ = load_splits(given)
    if args.commonit_task_file is not None:
        train = with_task_file(train, args.commonit_task_file)
    if len(train) == 0:
        raise ValueError(f"{named_data(given)}: the training split has no rows. Give data that has rows.")
    recipe = Recipe(
        options=args,
        rows=Rows(train, text_field=args.dataset_text_field),
        seed=data_seed(args),
        micro_batch_size=args.per_device_train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        world_size=world_size,
        source_rows=np.arange(len(train)),
    )
    name = tokenizer or given.model.model_name_or_path
    if name is None:
        lengths = recipe.rows.token_counts() if recipe.rows.tokenized else None
        return replace(recipe, lengths=lengths, balanced=lengths is not None and args.commonit_balance_lengths)
    train = _trainable(train, args.dataset_text_field)
    check_rows(train, given)
    check_settings(args)
    return _prepare(recipe, train, *_meta_model(name, given.model, args))


def _trainable(rows: Dataset, text_field: str) -> Dataset:
    """Return `rows` with a prompt and a completion, if they have only an instruction and an output."""
    present = set(rows.column_names)
    trainable = {"prompt", "messages", "conversations", "input_ids", text_field}
    if present & trainable or not {"instruction", "output"} <= present:
        return rows
    logger.warning(
        "TRL does not train on the columns instruction and output. They are read as prompt and completion here; "
        "rename them before training."
    )
    texts = Rows(rows)
    prompts = [f"{prompt}\n" for prompt in texts.texts("prompt")]
    added = rows.add_column("prompt", prompts).add_column("completion", texts.texts("response"))
    return added.remove_columns([name for name in ("instruction", "input", "output") if name in present])


def _prepare(recipe: Recipe, train: Dataset, model: Any, tokenizer: Any) -> Recipe:
    """Return `recipe` with the rows that `CommonITSFTTrainer` groups, and its batching of them.

    TRL's preparation takes the tokenizer, chat template, masks and padding from the trainer's construction, so a
    trainer is constructed on the first row: without CommonIT, without packing, and with a model on the meta device.
    """
    args = recipe.options
    unpacked = copy.copy(args)
    unpacked.commonit_metric, unpacked.packing, unpacked.max_length = "none", False, None
    trainer = CommonITSFTTrainer(
        model=model, args=unpacked, train_dataset=train.select(range(1)), processing_class=tokenizer
    )

    def prepare(raw: Dataset, max_length: int | None, name: str) -> Dataset:
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            return raw
        options = copy.copy(unpacked)
        options.max_length = max_length
        return trainer._prepare_dataset(raw, trainer.processing_class, options, False, None, name)

    prepared = prepare_rows(trainer, train, args, args.packing, prepare)
    if not len(prepared.dataset):
        raise ValueError(
            f"max_length={args.max_length}: none of the {len(train)} rows has a token to train on. Raise max_length, "
            "or check the rows."
        )

    def pack(
        options: Any, grouper: Grouper, group_ids: NDArray[np.int64], world_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        packs, pack_groups = pack_by_group(prepared.dataset, group_ids, grouper.names, args)
        return pack_groups, Rows(packs).token_counts()

    return replace(
        recipe,
        rows=prepared.rows,
        lengths=row_costs(prepared.dataset, trainer.data_collator),
        # The model has no weights, so the loss cannot be measured as in training.
        balanced=args.commonit_balance_lengths and is_causal_lm_loss(trainer) and not has_auxiliary_loss(trainer),
        padding_free=trainer.padding_free or (args.packing and args.packing_strategy != "wrapped"),
        pack=pack if args.packing else None,
        source_rows=prepared.numbers,
        traced=prepared.traced,
    )


def _meta_model(tokenizer_name: str, model_args: Any, args: Any) -> tuple[Any, Any]:
    """Return a model without weights, of the run's architecture if it has one, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    is_models = tokenizer_name == model_args.model_name_or_path
    source = model_source(model_args, args) if is_models else {"trust_remote_code": args.trust_remote_code}
    with found_at("model_name_or_path" if is_models else "--tokenizer", tokenizer_name):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **source)
    if model_args.model_name_or_path is None:
        config = LlamaConfig(vocab_size=len(tokenizer))
    else:
        config = model_config(model_args, args)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code), tokenizer
