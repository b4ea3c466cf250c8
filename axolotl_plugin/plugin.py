"""The hooks that Axolotl calls; all of them return at once with `commonit_metric: none`."""

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from axolotl_plugin.args import read_options
from commonit_trl.config import CommonITArguments

LOG = get_logger(__name__)

_LOGGED = ("commonit_purity", "commonit_remainder", "commonit_weights", "commonit_balance_lengths")
# Recipe keys that ask for other rows, another order of them or another trainer, and what to do instead.
_CONFLICTS = {
    "rl": "preference and reinforcement learning have other trainers; use CommonIT for supervised fine-tuning",
    "reward_model": "reward models have another trainer; remove one of the two",
    "process_reward_model": "reward models have another trainer; remove one of the two",
    "trainer_cls": "CommonIT brings the trainer; remove trainer_cls",
    "group_by_length": "it is another order of samples; remove it (commonit_balance_lengths keeps padding low)",
    "curriculum_sampling": "it is another order of samples; remove it",
    "streaming": "grouping needs every row beforehand; set it to false",
    "pretraining_dataset": "grouping needs every row beforehand; list the data in datasets:",
    "skip_prepare_dataset": "grouping reads tokenised rows; set it to false",
    "dataloader_drop_last": "the plan decides what becomes of remainders; use commonit_remainder: drop",
}


class CommonITPlugin(BasePlugin):
    """Group-pure batches in an Axolotl recipe: `commonit_metric: length`, and the other `commonit_*` keys."""

    def register(self, cfg: Any) -> None:
        """Check the recipe as it was written.

        Raises:
            ValueError: on a missing, misspelt or wrong `commonit_*` key, and on keys that conflict with them.
        """
        options = read_options(cfg)
        if options.commonit_on:
            _check_recipe(cfg, options)

    def get_input_args(self) -> str:
        return "axolotl_plugin.args.CommonITArgs"

    def get_training_args_mixin(self) -> str:
        return "axolotl_plugin.args.CommonITTrainingArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Prepare Axolotl's own loading for the task labels; loads nothing itself."""
        from axolotl_plugin.labels import TaskLabels, restore_axolotl

        options = read_options(cfg)
        restore_axolotl()
        if not options.commonit_on:
            LOG.info("CommonIT is off (commonit_metric: none): these are Axolotl's own batches.")
            return
        _check_other_plugins(self, cfg)
        if options.commonit_metric == "task":
            TaskLabels(options, cfg).carry()

    def get_trainer_cls(self, cfg: Any) -> Any:
        from axolotl_plugin.trainer import CommonITAxolotlTrainer

        return CommonITAxolotlTrainer if read_options(cfg).commonit_on else None

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The options, and the settings of Axolotl's that they replace."""
        from axolotl_plugin.labels import TaskLabels

        options = read_options(cfg)
        arguments = asdict(options)
        if not options.commonit_on:
            return arguments
        if options.commonit_metric == "task":
            arguments["commonit_task_column"] = [TaskLabels(options, cfg).column]
        return arguments | {
            "max_steps": cfg.max_steps or -1,  # else Axolotl's estimate, which knows nothing of the plan
            "average_tokens_across_devices": True,
        }

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Take warm-up and logging from the plan's steps, and say what training will do."""
        from axolotl_plugin.trainer import CommonITAxolotlTrainer

        options = read_options(cfg)
        if not options.commonit_on:
            return
        if not isinstance(trainer, CommonITAxolotlTrainer):
            raise ValueError(
                f"commonit_metric: {options.commonit_metric}: the trainer is {type(trainer).__name__}, not CommonIT's, "
                "and would train with plain batches: remove what brings it from the recipe."
            )
        total_steps = math.ceil(trainer.commonit_plan().num_steps * cfg.num_epochs)
        if cfg.max_steps:
            total_steps = min(total_steps, cfg.max_steps)
        for name, value in _steps_of_axolotl(cfg, total_steps).items():
            setattr(trainer.args, name, value)
        _log_settings(trainer, cfg, total_steps)


def _check_recipe(cfg: Any, options: CommonITArguments) -> None:
    for key, way_out in _CONFLICTS.items():
        if cfg.get(key):
            raise ValueError(
                f"{key}: {cfg[key]!r} does not go with commonit_metric: {options.commonit_metric}: {way_out}."
            )
    if (cfg.get("context_parallel_size") or 1) > 1:
        raise ValueError(
            f"context_parallel_size: {cfg['context_parallel_size']} does not go with commonit_metric: "
            f"{options.commonit_metric}: ranks that share a sequence are not supported; set it to 1."
        )


def _check_other_plugins(plugin: CommonITPlugin, cfg: Any) -> None:
    for name, other in PluginManager.get_instance().plugins.items():
        if other is not plugin and other.get_trainer_cls(cfg) is not None:
            raise ValueError(
                f"plugins: {name} brings a trainer of its own, and there can be one: remove it, or set "
                "commonit_metric: none."
            )
    if cfg.model_config_type == "mamba":
        raise ValueError(
            "commonit_metric: Axolotl trains models of type mamba with a trainer of their own: set it to none."
        )


def _steps_of_axolotl(cfg: Any, total_steps: int) -> dict[str, Any]:
    """The training arguments that Axolotl derives from the total number of steps: `warmup_steps`, `logging_steps`."""
    from axolotl.core.builders import HFCausalTrainerBuilder

    arguments: dict[str, Any] = {}
    HFCausalTrainerBuilder._configure_warmup_and_logging(SimpleNamespace(cfg=cfg), total_steps, arguments)
    return arguments


def _log_settings(trainer: Any, cfg: Any, total_steps: int) -> None:
    grouper, args = trainer.commonit_grouper, trainer.args
    LOG.info(
        "CommonIT is on: commonit_metric=%s (%s), %s; %d steps in all.",
        args.commonit_metric,
        ", ".join(f"{name}={value}" for name, value in grouper.options.items()),
        ", ".join(f"{name}={getattr(args, name)}" for name in _LOGGED),
        total_steps,
    )
    if args.sample_packing:
        bins = trainer._commonit_bins()
        LOG.info(
            "CommonIT packs each group alone: %d bins, %.1f %% full (Axolotl's estimate of its own packing: %.0f %%).",
            len(bins.rows),
            100 * bins.efficiency,
            100 * (cfg.sample_packing_eff_est or math.nan),
        )
