"""Read an Axolotl recipe for `commonit inspect` and `commonit group`: `--axolotl recipe.yml`.

Steps: (1) Axolotl loads and checks the recipe, without keys that need the hardware of the training run; (2) it prepares
the rows, or loads prepared ones, with the carried columns of training; (3) rows without trained tokens are dropped, as
in training; (4) the settings that determine the batches are read from the recipe. No model is loaded. Axolotl logs to
stderr.

Cost: that of `axolotl preprocess`; training then loads the prepared rows.
"""

import contextlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets.exceptions import DatasetsError
from pydantic import ValidationError

from commonit_trl.cli.options import read_yaml
from commonit_trl.cli.recipes import Recipe
from commonit_trl.config import parts_of
from commonit_trl.grouping.dropped import NO_TRAINED_TOKEN, UNKNOWN_GROUP, DroppedRows
from commonit_trl.grouping.task import NO_LABEL
from commonit_trl.rows import Rows

# Hardware settings, which affect neither rows nor batches.
_OFF = {"bf16": False, "fp16": False, "tf32": False, "load_in_8bit": False, "load_in_4bit": False} | {
    key: None for key in ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fp8", "torch_compile")
}
_PLUGINS = {"axolotl_plugin.CommonITPlugin", "axolotl_plugin.plugin.CommonITPlugin"}
_PACKING = ("sample_packing_group_size", "sample_packing_bin_size", "sample_packing_sequentially")


def read_recipe(path: str) -> Recipe:
    """Read the recipe in a YAML file.

    Args:
        path: of the file.

    Raises:
        ValueError: if the recipe is invalid, does not name the plugin, or its data cannot be read.
    """
    _check_file(path)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Axolotl's log handlers keep their first stream
            return _read(path)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"])) or "the recipe"
        raise ValueError(f"--axolotl {path}: {key}: {wrong['msg']}: change it in the recipe.") from error
    except (DatasetsError, StopIteration) as error:
        reason = ": ".join(filter(None, (type(error).__name__, str(error.__cause__ or error))))
        raise ValueError(
            f"--axolotl {path}: datasets: a file cannot be read ({reason}): name one that has rows."
        ) from error


def _check_file(path: str) -> None:
    keys = read_yaml("--axolotl", path)
    plugins = keys.get("plugins")
    if not isinstance(plugins, list) or not _PLUGINS & {*map(str, plugins)}:
        raise ValueError(
            f"--axolotl {path}: the recipe does not name the plugin. Add axolotl_plugin.CommonITPlugin to plugins:."
        )


def _read(path: str) -> Recipe:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.core.training_args_base import AxolotlTrainingMixins
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import load_tokenizer
    from transformers import TrainingArguments

    from axolotl_plugin.args import read_options
    from axolotl_plugin.dropped import dropped_rows
    from axolotl_plugin.labels import CarriedColumns, with_source_names
    from axolotl_plugin.packing import bin_shape, pack_for_training

    cfg = load_cfg(path, **_OFF)
    PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    dataset = load_datasets(cfg=cfg).train_dataset
    options = read_options(cfg)
    vars(options).update(CarriedColumns(options, cfg).task_options())
    dropped = dropped_rows(dataset) or DroppedRows()
    trained = Rows(dataset).is_trained()
    if not trained.all():
        dropped += _untrained(Rows(dataset.select(np.flatnonzero(~trained))), options)
        dataset = dataset.select(np.flatnonzero(trained))
    if len(dataset) == 0:
        raise ValueError(
            f"--axolotl {path}: sequence_len={cfg.sequence_len}: no row has a token to train on. Raise sequence_len."
        )
    seed = TrainingArguments.seed if cfg.seed is None else cfg.seed
    rows = Rows(with_source_names(dataset), load_tokenizer(cfg))
    multiple = _padding_multiple(cfg)
    counts = rows.token_counts("total")
    recipe: dict[str, Any] = {
        "options": options,
        "rows": rows,
        "seed": seed,
        "accumulation_steps": cfg.gradient_accumulation_steps,
        "world_size": cfg.world_size,
        "balanced": options.commonit_balance_lengths and not cfg.reward_model,
        "dropped": dropped,
    }
    if not cfg.sample_packing:
        lengths = -(-counts // multiple) * multiple
        return Recipe(**recipe, micro_batch_size=cfg.micro_batch_size, lengths=lengths)
    real_batches = cfg.multipack_real_batches
    settings = SimpleNamespace(
        seed=seed,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        max_seq_length=cfg.sequence_len,
        multipack_real_batches=not cfg.attn_supports_packing if real_batches is None else real_batches,
        dataset_num_proc=cfg.dataset_num_proc,
        sample_packing_mp_start_method=cfg.sample_packing_mp_start_method,
        **{key: getattr(AxolotlTrainingMixins, key) if cfg[key] is None else cfg[key] for key in _PACKING},
    )

    def pack(options: Any, _: Any, group_ids: Any, world_size: int) -> tuple[Any, Any]:
        args = SimpleNamespace(**vars(settings), **vars(options))
        bins = pack_for_training(args, group_ids, counts, cfg.micro_batch_size, world_size)
        return bins.group_ids, bins.lengths

    return Recipe(**recipe, micro_batch_size=bin_shape(settings, cfg.micro_batch_size)[1], lengths=counts, pack=pack)


def _untrained(rows: Rows, options: Any) -> DroppedRows:
    """Count rows without a token to train on, by task label where they have one."""
    if "task" not in parts_of(options.commonit_metric):
        return DroppedRows(counts={(NO_TRAINED_TOKEN, UNKNOWN_GROUP): len(rows)})
    return DroppedRows.of((NO_TRAINED_TOKEN, label or NO_LABEL) for label in rows.labels(options.commonit_task_column))


def _padding_multiple(cfg: Any) -> int:
    """Return the multiple of tokens to which Axolotl pads micro-batches (`HFCausalTrainerBuilder.build`)."""
    multiple = cfg.pad_to_multiple_of or 64
    if cfg.pad_to_sequence_len:
        return multiple * math.ceil(cfg.sequence_len / multiple)
    return multiple if cfg.pad_to_sequence_len is None else 1
