"""The hooks that Axolotl calls; with `commonit_metric: none` they change nothing.

Axolotl also calls the plugins of earlier recipes of the same process; the hooks ignore recipes that do not name the
plugin.
"""

import importlib
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from axolotl_plugin.args import read_options
from commonit_trl.config import OPTIONS, CommonITArguments

LOG = get_logger(__name__)

_LOGGED = ("commonit_purity", "commonit_remainder", "commonit_weights", "commonit_balance_lengths")
_LOGGED_IF_SET = ("commonit_pure_fraction", "commonit_order", "commonit_heaviest_first", "commonit_small_groups")
# Recipe keys that change the rows, their order or the trainer, and the fix for each.
_CONFLICTS = {
    "rl": "Axolotl gives a plugin's trainer no model; train with TRL, by CommonITMixin and DPOTrainer, KTOTrainer or "
    "ORPOTrainer",
    "process_reward_model": "Axolotl builds its own trainer; remove one of the two",
    "trainer_cls": "CommonIT brings the trainer; remove trainer_cls",
    "group_by_length": "it sets the order of samples itself; remove it (commonit_balance_lengths keeps padding low)",
    "curriculum_sampling": "it sets the order of samples itself; remove it",
    "streaming": "grouping needs all rows before training; set it to false",
    "pretraining_dataset": "grouping needs all rows before training; list the data in datasets:",
    "skip_prepare_dataset": "grouping reads tokenised rows; set it to false",
    "dataloader_drop_last": "CommonIT handles incomplete steps; use commonit_remainder: drop",
    "context_parallel_size": "ranks that share a sequence are not supported; set it to 1",
    "sequence_parallel_degree": "ranks that share a sequence are not supported; set it to 1",  # the old name
}


class CommonITPlugin(BasePlugin):
    """Group-pure batches in an Axolotl recipe: `commonit_metric: length`, and the other `commonit_*` keys."""

    def register(self, cfg: Any) -> None:
        """Check the recipe as written, and replace functions of Axolotl's data preparation.

        `axolotl evaluate` calls no other hook before it loads the data.

        Raises:
            ValueError: if a `commonit_*` key is missing, misspelt or wrong, or conflicts with another key.
        """
        _check_command_line()
        options = self._options(cfg)
        if options is None:
            return
        _check_recipe(cfg, options)
        _renew_training_arguments()
        from axolotl_plugin.labels import replace_in_axolotl

        replace_in_axolotl()

    def get_input_args(self) -> str:
        return "axolotl_plugin.args.CommonITArgs"

    def get_training_args_mixin(self) -> str:
        return "axolotl_plugin.args.CommonITTrainingArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Check the other plugins, all of which are registered by now, and the test sets; load nothing."""
        options = self._options(cfg)
        if options is not None:
            from axolotl_plugin.labels import CarriedColumns

            _check_other_plugins(self, cfg)
            CarriedColumns(options, cfg).warn_of_unseen_entries()
        elif cfg.get("commonit_metric") == "none":
            LOG.info("CommonIT is off (commonit_metric: none): Axolotl makes the batches.")

    def get_trainer_cls(self, cfg: Any) -> Any:
        """Return CommonIT's trainer; with `commonit_metric: none` None, for Axolotl's own.

        Raises:
            ValueError: on every rank, if `commonit_metric` differs between ranks.
        """
        if self._options(cfg) is None:
            if cfg.get("commonit_metric") == "none":
                from commonit_trl.trainer.validate import compare_ranks

                compare_ranks({"commonit_metric": "none"})
            return None
        from axolotl_plugin.trainer import CommonITAxolotlRewardTrainer, CommonITAxolotlTrainer

        return CommonITAxolotlRewardTrainer if cfg.reward_model else CommonITAxolotlTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Return the options, and the settings of Axolotl's that they replace."""
        options = self._options(cfg)
        if options is None:
            return None
        from axolotl_plugin.labels import CarriedColumns

        return {
            **asdict(options),
            **CarriedColumns(options, cfg).task_options(),
            "max_steps": cfg.max_steps or -1,  # Axolotl's estimate does not follow the plan
            "average_tokens_across_devices": True,
        }

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Derive warm-up and logging from the plan's steps, choose the checkpoint to resume, and log the settings."""
        options = self._options(cfg)
        if options is None:
            if cfg.get("commonit_metric") == "none":
                trainer.add_callback(_RefuseCommonITCheckpoint(cfg))
            return
        from axolotl_plugin.trainer import CommonITAxolotlMixin

        if not isinstance(trainer, CommonITAxolotlMixin):
            raise ValueError(
                f"commonit_metric: {options.commonit_metric}: the recipe selects {type(trainer).__name__}, which does "
                "not group batches. Remove the key or plugin that selects it."
            )
        if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
            from commonit_trl.trainer.checkpoint import last_checkpoint

            # Axolotl would choose the highest step, even if that checkpoint is incomplete.
            cfg.resume_from_checkpoint = last_checkpoint(cfg.output_dir)
        total_steps = math.ceil(trainer.commonit_plan().num_steps * cfg.num_epochs)
        if cfg.max_steps:
            total_steps = min(total_steps, cfg.max_steps)
        for name, value in _steps_of_axolotl(cfg, total_steps).items():
            setattr(trainer.args, name, value)
        _log_settings(trainer, cfg, total_steps)

    def _options(self, cfg: Any) -> CommonITArguments | None:
        """Return the checked options of a recipe, None where CommonIT is off."""
        plugins = PluginManager.get_instance().plugins
        if not any(plugins.get(name) is self for name in cfg.get("plugins") or ()):
            return None
        options = read_options(cfg)
        return options if options.commonit_on else None


class _RefuseCommonITCheckpoint(TrainerCallback):
    """Refuses to continue a CommonIT run with Axolotl's own batches, whose order differs.

    `post_trainer_create` cannot check this, because `axolotl evaluate` calls it too.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from commonit_trl.trainer.checkpoint import check_baseline

        checkpoint = self.cfg.resume_from_checkpoint  # Axolotl has already set it for auto_resume_from_checkpoints
        if checkpoint:
            check_baseline(Path(checkpoint))


def _check_command_line() -> None:
    """Refuse `commonit_*` flags: Axolotl passes the keys of plugins to the launcher, which ignores them."""
    context = click.get_current_context(silent=True)
    for flag in context.args if context else ():
        if flag.startswith("--commonit"):
            name = flag.lstrip("-").partition("=")[0].replace("-", "_")
            raise ValueError(f"{flag}: Axolotl ignores this flag. Set {name}: in the recipe.")


def _renew_training_arguments() -> None:
    """Rebuild Axolotl's training arguments if an earlier recipe of this process built them without CommonIT's."""
    made = sys.modules.get("axolotl.core.training_args")
    if made is not None and not issubclass(made.AxolotlTrainingArguments, CommonITArguments):
        importlib.reload(made)


def _check_recipe(cfg: Any, options: CommonITArguments) -> None:
    for key, fix in _CONFLICTS.items():
        value = cfg.get(key)
        if value and (value is True or value != 1):  # one rank shares nothing
            raise ValueError(f"{key}: {value!r} does not go with commonit_metric: {options.commonit_metric}: {fix}.")
    if cfg.get("sample_packing") and options.commonit_resume == "replan":
        raise ValueError(
            "commonit_resume: 'replan' does not go with sample_packing: true: packed bins depend on the ranks, batch "
            "sizes and groups that would change; set it to exact."
        )


def _check_other_plugins(plugin: CommonITPlugin, cfg: Any) -> None:
    for name, other in PluginManager.get_instance().plugins.items():
        if other is not plugin and other.get_trainer_cls(cfg) is not None:
            raise ValueError(
                f"plugins: {name} also selects the trainer, and only one plugin can: remove it, or set "
                "commonit_metric: none."
            )
    if cfg.model_config_type == "mamba":
        raise ValueError(
            f"commonit_metric: {cfg.commonit_metric}: Axolotl trains models of type mamba with a trainer of its own. "
            "Set commonit_metric to none."
        )


def _steps_of_axolotl(cfg: Any, total_steps: int) -> dict[str, Any]:
    """Return the arguments that Axolotl derives from the total number of steps: `warmup_steps`, `logging_steps`."""
    from axolotl.core.builders import HFCausalTrainerBuilder

    arguments: dict[str, Any] = {}
    HFCausalTrainerBuilder._configure_warmup_and_logging(SimpleNamespace(cfg=cfg), total_steps, arguments)
    return arguments


def _log_settings(trainer: Any, cfg: Any, total_steps: int) -> None:
    grouper, args = trainer.commonit_grouper, trainer.args
    logged = [*_LOGGED, *(name for name in _LOGGED_IF_SET if getattr(args, name) != OPTIONS[name].default)]
    LOG.info(
        "CommonIT is on: commonit_metric=%s (%s), %s; %d steps in all.",
        args.commonit_metric,
        ", ".join(f"{name}={value}" for name, value in grouper.options.items()),
        ", ".join(f"{name}={getattr(args, name)}" for name in logged),
        total_steps,
    )
    if args.sample_packing:
        bins = trainer.commonit.bins
        LOG.info(
            "CommonIT packs each group alone: %d bins, %.1f %% full (Axolotl's estimate of its own packing: %.0f %%).",
            len(bins.rows),
            100 * bins.efficiency,
            100 * (cfg.sample_packing_eff_est or math.nan),
        )
