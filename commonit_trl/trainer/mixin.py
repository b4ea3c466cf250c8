"""CommonIT in any `transformers.Trainer`: `CommonITMixin`.

At construction the options are checked, then the groups are fitted to the training rows. `get_train_dataloader` takes
the parent's dataloader apart and puts it together again around a `CommonITBatchSampler`. Before each epoch the ranks
compare what its batches follow from; while it trains, each group's losses go into the Trainer's logs. With
`commonit_metric="none"` every method is the parent's, once all ranks have said that they have it.

Why the loader is not given to `accelerator.prepare`: the sampler knows its rank, and accelerate would shard it once
more (`BatchSamplerShard` in `accelerate/data_loader.py`, which drops rounds that end in a short batch). `Trainer` moves
the batches to the device itself.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from commonit_trl.config import CommonITArguments, nearest
from commonit_trl.files import write_text
from commonit_trl.grouping import Grouper, build_grouper, fit_assign_cached, load_grouper
from commonit_trl.plan import EpochPlan, plan_epoch
from commonit_trl.plan.sampler import CommonITBatchSampler, CommonITDataLoader
from commonit_trl.report import (
    Inspection,
    LossRecord,
    inspect_groups,
    ledger,
    ledger_table,
    model_card_section,
    write_html,
)
from commonit_trl.rows import Rows
from commonit_trl.sanitize import shown
from commonit_trl.trainer.checkpoint import (
    COMMONIT_DIR,
    RUN_FILE,
    Rest,
    first_step,
    last_checkpoint,
    load_rest,
    move_schedule,
    read_checkpoint,
)
from commonit_trl.trainer.metrics import GroupMetrics, count_tokens

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_HASHED_ROWS = 64

if TYPE_CHECKING:
    from transformers import Trainer as _Mixed  # what the mixin is mixed into
else:
    _Mixed = object


class CommonITMixin(_Mixed):
    """Group-pure batches for a `transformers.Trainer` subclass: `class MyTrainer(CommonITMixin, Trainer)`.

    Its `args` must be a `TrainingArguments` that also derives from `CommonITArguments`, its `train_dataset` a
    `datasets.Dataset`.

    Attributes:
        commonit_grouper: the fitted grouper; None with `commonit_metric="none"`.
        commonit_group_ids: (rows of `self.train_dataset`,) group ids; None likewise.

    Raises:
        ValueError: at construction, on options or trainer settings that do not go together, before the model is loaded
            where they can be told from the arguments; in `train`, on a checkpoint of a different run.
    """

    args: Any
    train_dataset: Any
    eval_dataset: Any
    commonit_grouper: Grouper | None = None
    commonit_group_ids: NDArray[np.int64] | None = None
    _commonit_grouped: tuple[Rows, NDArray[np.int64]] | None = None  # the rows that were grouped, and (rows,) group ids
    _commonit_rest: Rest | None = None  # of an epoch that was begun with other settings
    _commonit_first_step: int | None = None  # where the Trainer goes on, if not at the checkpoint's own step
    _commonit_replanned = 0  # how many times that happened in the life of the run
    _commonit_micro_steps = 0  # of the current optimizer step that are done
    _commonit_logger = logger  # a framework that hides other packages' messages puts its own here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments, **kwargs}
        options: Any = given.get("args")
        dataset: Any = given.get("train_dataset")
        if not isinstance(options, CommonITArguments):
            raise ValueError(
                f"args is {type(options).__name__}, which has no commonit_* options: give a CommonITSFTConfig, or a "
                "dataclass that derives from CommonITArguments and your TrainingArguments."
            )
        self._commonit_on = options.commonit_on and dataset is not None
        if dataset is not None:
            # Before the first collective that only some metrics have: a rank without CommonIT takes part in none.
            compare_ranks({"commonit_metric": options.commonit_metric})
        if self._commonit_on:
            self._commonit_check_settings(options)
            _check_dataset(dataset)
            build_grouper(options, dataset.column_names)  # a missing task column is seen here, before the model
        self._commonit_raw_train_dataset = dataset  # for parents that prepare it as they are constructed
        self._commonit_evaluated: tuple[Any, Any] = (None, None)  # an evaluation dataloader and its rows
        self._commonit_eval_groups: weakref.WeakKeyDictionary[Dataset, NDArray[np.int64] | None] = (
            weakref.WeakKeyDictionary()
        )
        super().__init__(*args, **kwargs)
        if self._commonit_on:
            self._commonit_set_up()

    def _commonit_check_settings(self, args: Any) -> None:
        """Refuse the trainer settings that would undo group-pure batches."""
        accelerator_config = args.accelerator_config
        refused = {
            "train_sampling_strategy": (
                args.train_sampling_strategy,
                args.train_sampling_strategy != "random",
                "it is another order of samples; leave it at 'random' (commonit_balance_lengths keeps padding low)",
            ),
            "accelerator_config.split_batches": (
                accelerator_config.split_batches,
                accelerator_config.split_batches,
                "it would cut micro-batches apart; set it to False",
            ),
            "accelerator_config.dispatch_batches": (
                accelerator_config.dispatch_batches,
                accelerator_config.dispatch_batches,
                "it would hand one rank's micro-batches to all; set it to False",
            ),
            "dataloader_drop_last": (
                args.dataloader_drop_last,
                args.dataloader_drop_last,
                "the plan decides what becomes of remainders; use commonit_remainder='drop'",
            ),
            "ignore_data_skip": (
                args.ignore_data_skip,
                args.ignore_data_skip,
                "a resumed epoch would start over and repeat samples; set it to False",
            ),
            "auto_find_batch_size": (
                args.auto_find_batch_size,
                args.auto_find_batch_size and args.commonit_resume == "replan",
                "commonit_resume='replan' plans for one batch size; set it to False, or commonit_resume to 'exact'",
            ),
            "average_tokens_across_devices": (
                args.average_tokens_across_devices,
                not args.average_tokens_across_devices and args.world_size > 1 and args.commonit_balance_lengths,
                "each rank's tokens would weigh differently and the arrangement by length would change the gradient; "
                "set it to True, or commonit_balance_lengths to False",
            ),
        }
        for name, (value, conflicts, way_out) in refused.items():
            if conflicts:
                raise ValueError(f"{name}={value!r} does not go with commonit_metric: {way_out}.")

    # --- groups and plans -------------------------------------------------------------------------------------------

    def _commonit_rows(self, dataset: Dataset) -> Rows:
        """How the groupers read `dataset`."""
        return Rows(dataset, self.processing_class)

    def _commonit_set_up(self) -> None:
        if len(self.train_dataset) == 0:
            raise ValueError(
                f"max_length={getattr(self.args, 'max_length', None)}: preparing train_dataset left no row with a "
                "token to train on: raise max_length, or look at the rows."
            )
        if self._commonit_grouped is None:  # packing groups the rows earlier, before they are packed
            rows = self._commonit_rows(self.train_dataset)
            self.commonit_grouper, self.commonit_group_ids = fit_assign(self.args, rows)
            self._commonit_grouped = rows, self.commonit_group_ids
        self._commonit_world_size, self._commonit_rank = data_parallel_place(self)
        self._commonit_lengths = self._commonit_arrangement_lengths()
        assert self.commonit_grouper is not None
        self._commonit_metrics = GroupMetrics(self.commonit_grouper.names)
        self.add_callback(_EpochStart(self))
        if self.is_world_process_zero():
            self._commonit_log_ledger()

    def _commonit_arrangement_lengths(self) -> NDArray[np.int64] | None:
        """(rows,) tokens by which to arrange steps, or None where arranging is off or would change the gradient."""
        if not self.args.commonit_balance_lengths:
            return None
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            logger.warning(
                "commonit_balance_lengths: %s does not take the step's token count, so its loss is a mean over "
                "micro-batches and would depend on their sizes; they keep equal sizes.",
                type(self.model).__name__,
            )
            return None
        costs = self._commonit_row_costs()
        if costs is None:
            logger.info("commonit_balance_lengths: the rows are not tokenised, so micro-batches keep equal sizes.")
        return costs

    def _commonit_row_costs(self) -> NDArray[np.int64] | None:
        """(rows,) tokens that each row costs, None of rows that are not tokenised."""
        rows = Rows(self.train_dataset)
        if not rows.tokenized:
            return None
        counts = rows.token_counts("total")
        # A collator that pads to a multiple makes a row longer.
        multiple = getattr(self.data_collator, "pad_to_multiple_of", None) or 1
        return -(-counts // multiple) * multiple

    def _commonit_samples(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, int]:
        """What plans are made of: (samples,) group ids, (samples,) tokens or None, and samples a micro-batch."""
        assert self.commonit_group_ids is not None
        return self.commonit_group_ids, self._commonit_lengths, self._train_batch_size

    def _commonit_plan_of(self) -> Callable[..., EpochPlan]:
        assert self.commonit_grouper is not None and self.commonit_group_ids is not None
        if len(self.train_dataset) != len(self.commonit_group_ids):
            raise ValueError(
                f"train_dataset now has {len(self.train_dataset)} rows and had {len(self.commonit_group_ids)} when it "
                "was grouped: give the dataset at construction and do not replace it."
            )
        group_ids, lengths, micro_batch_size = self._commonit_samples()
        return functools.partial(
            plan_epoch,
            group_ids=group_ids,
            lengths=lengths,
            micro_batch_size=micro_batch_size,
            world_size=self._commonit_world_size,
            accumulation_steps=self.args.gradient_accumulation_steps,
            purity=self.args.commonit_purity,
            remainder=self.args.commonit_remainder,
            weights=weights_by_id(self.args.commonit_weights, self.commonit_grouper.names, group_ids),
            seed=data_seed(self.args),
        )

    def commonit_plan(self, epoch: int = 0) -> EpochPlan:
        """The plan of `epoch`, as training will follow it; of an epoch that was begun with other settings, the rest.

        Raises:
            ValueError: with `commonit_metric="none"`, which plans nothing.
        """
        if not self._commonit_on:
            raise ValueError("commonit_metric='none' (or a trainer without train_dataset) has no plan.")
        return self._commonit_rest_or_plan()(epoch=epoch)

    def _commonit_rest_or_plan(self) -> Callable[..., EpochPlan]:
        plan = self._commonit_plan_of()
        if self._commonit_rest is None:
            return plan
        return functools.partial(self._commonit_rest.plan, plan, data_seed(self.args))

    def _commonit_batch_sampler(self) -> CommonITBatchSampler:
        """This rank's micro-batches."""
        return CommonITBatchSampler(self._commonit_rest_or_plan(), self._commonit_rank)

    def get_train_dataloader(self) -> Any:
        """The parent's dataloader, over this rank's micro-batches of the plan."""
        loader = super().get_train_dataloader()
        if not self._commonit_on:
            return loader
        self._commonit_sampler = self._commonit_batch_sampler()
        return CommonITDataLoader(
            loader.dataset,
            self._commonit_sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=loader.in_order,
        )

    # --- while it trains --------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The parent's; collects the micro-batch's loss for its group."""
        if not self._commonit_on:
            return super().training_step(model, inputs, num_items_in_batch)
        counts = count_tokens(inputs)  # the parent may take inputs out
        loss = super().training_step(model, inputs, num_items_in_batch)
        plan, step = self._commonit_sampler.current, self.state.global_step
        micro_step = step % plan.num_steps * plan.accumulation_steps + self._commonit_micro_steps
        self._commonit_micro_steps += 1
        if counts is not None:
            # Back from the parent's normalised loss to the sum over the micro-batch's tokens.
            if num_items_in_batch is None:
                tokens = self.current_gradient_accumulation_steps * counts.trained.to(loss.device)
            else:
                ranks = self._commonit_world_size if self.args.average_tokens_across_devices else 1
                tokens = torch.as_tensor(num_items_in_batch).flatten()[0] / ranks  # nn.DataParallel has one a device
            group = int(plan.micro_batch_groups[micro_step, self._commonit_rank])
            self._commonit_metrics.add_micro_batch(group, loss.detach() * tokens, counts)
        return loss

    # transformers' own name: the only place that has the gradient norm of every step. tests/unit/test_platform.py fails
    # when it changes.
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._commonit_on:
            plan = self._commonit_sampler.current
            first = self.state.global_step % plan.num_steps * plan.accumulation_steps
            groups = np.unique(plan.micro_batch_groups[first : first + plan.accumulation_steps])
            self._commonit_metrics.add_step(int(groups[0]) if len(groups) == 1 else -1, norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's; training logs get the metrics of `commonit_trl.trainer.metrics`."""
        if self._commonit_on and "loss" in logs:
            logs = {**logs, **self._commonit_metrics.take(self._commonit_sum_over_ranks)}
        super().log(logs, *args, **kwargs)

    def _commonit_sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.args.world_size == 1:
            return values
        vector = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        shared_by = self.args.world_size / self._commonit_world_size  # ranks that share a batch count once
        return (self.accelerator.reduce(vector, reduction="sum") / shared_by).tolist()

    # --- what it says of the run ------------------------------------------------------------------------------------

    def _commonit_ledger(self) -> dict[str, Any]:
        assert self.commonit_grouper is not None
        return ledger(self._commonit_plan_of()(), self.commonit_grouper.names)

    def _commonit_log_ledger(self) -> None:
        """Say what an epoch holds, and as a warning what it leaves out or repeats."""
        entry = self._commonit_ledger()
        self._commonit_logger.info(
            "commonit_metric=%s: %d groups, %d steps an epoch (plain batches: %d), %d samples, %d lost, %d repeated."
            "\n%s",
            self.args.commonit_metric,
            len(entry["groups"]),
            entry["steps"],
            entry["vanilla_steps"],
            entry["samples"],
            entry["lost"],
            entry["repeated"],
            ledger_table(entry),
        )
        for count, what in (("lost", "leaves out"), ("repeated", "repeats")):
            affected = [group for group in entry["groups"] if group[count]]
            if affected:
                most = sorted(affected, key=lambda group: -group[count])[:5]
                self._commonit_logger.warning(
                    "commonit_remainder=%s, commonit_weights=%s: an epoch %s %d of %d samples, in %d "
                    "groups (most: %s).",
                    self.args.commonit_remainder,
                    self.args.commonit_weights,
                    what,
                    entry[count],
                    entry["samples"],
                    len(affected),
                    ", ".join(f"{group[count]} of {group['name']!r}" for group in most),
                )

    def _commonit_inspect(self) -> Inspection:
        """The numbers of the first epoch, for the report."""
        assert self.commonit_grouper is not None and self._commonit_grouped is not None
        rows, group_ids = self._commonit_grouped
        lengths, plan = self._commonit_samples()[1], self._commonit_plan_of()()
        if lengths is None and len(self.train_dataset) == len(plan.group_ids):
            trained = Rows(self.train_dataset)
            lengths = trained.token_counts("total") if trained.tokenized else None
        return inspect_groups(
            self.commonit_grouper,
            group_ids,
            rows,
            plan,
            options=self.args,
            lengths=lengths,
            padding_free=getattr(self, "padding_free", False),  # SFTTrainer's
            seed=data_seed(self.args),
            embed=True,
        )

    def _commonit_write_report(self, inspection: Inspection) -> None:
        assert self.commonit_grouper is not None
        names = [f"loss_{name}" for name in self.commonit_grouper.names]
        losses: list[LossRecord] = [
            {"step": int(entry["step"]), "group": name.removeprefix("loss_"), "loss": entry[name]}
            for entry in self.state.log_history
            for name in names
            if name in entry
        ]
        path = Path(self.args.output_dir) / COMMONIT_DIR / REPORT_FILE
        try:
            write_html(path, [inspection], losses)
        except OSError as error:
            self._commonit_logger.warning("commonit_report: %s cannot be written (%s); training goes on.", path, error)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, and a section on the groups."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self._commonit_on and self.is_world_process_zero() and path.exists():
            named = ("metric", "purity", "remainder", "weights")
            settings = {f"commonit_{name}": getattr(self.args, f"commonit_{name}") for name in named}
            section = model_card_section(self._commonit_ledger(), settings)
            card = path.read_text(encoding="utf-8").partition("\n## CommonIT\n")[0].rstrip()
            write_text(path, f"{card}\n\n{section}")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _commonit_run(self, plan: EpochPlan) -> dict[str, Any]:
        """What the batches of `plan` follow from: all ranks, and a resumed run, must share it."""
        assert self.commonit_grouper is not None and self.commonit_group_ids is not None
        return {
            "commonit_metric": self.args.commonit_metric,
            "commonit_purity": self.args.commonit_purity,
            "commonit_remainder": self.args.commonit_remainder,
            "commonit_weights": self.args.commonit_weights,
            "commonit_balance_lengths": self._commonit_lengths is not None,
            "data seed": data_seed(self.args),
            "per-device batch size": plan.micro_batch_size,
            "world size": plan.world_size,
            "gradient accumulation steps": plan.accumulation_steps,
            "rows": len(self.commonit_group_ids),
            "number of groups": len(self.commonit_grouper.names),
            "names of groups": _digest(json.dumps(self.commonit_grouper.names).encode()),
            "assignment of rows to groups": _digest(self.commonit_group_ids),
            "tokens of rows": _digest_rows(self.train_dataset),
            "token lengths": None if self._commonit_lengths is None else _digest(self._commonit_lengths),
            "order of samples": plan.digest(),
            "rest of an epoch": self._commonit_rest and [self._commonit_rest.epoch, _digest(self._commonit_rest.rows)],
            "times replanned": self._commonit_replanned,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, and the groups beside it in `commonit/`."""
        if self._commonit_on and _internal_call and output_dir is not None and self.args.should_save:
            # A checkpoint of the same step that an earlier run left is none while this one is written over it.
            (Path(output_dir) / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        self._commonit_save(output_dir or self.args.output_dir)

    def _commonit_save(self, output_dir: str) -> None:
        if self._commonit_on and self.args.should_save:
            assert self.commonit_grouper is not None
            directory = Path(output_dir) / COMMONIT_DIR
            plan = self._commonit_plan_of()()
            self.commonit_grouper.save(directory, ledger=ledger(plan, self.commonit_grouper.names))
            if self._commonit_rest is not None:
                self._commonit_rest.save(directory)
            write_text(directory / RUN_FILE, json.dumps(self._commonit_run(plan), indent=2))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; a checkpoint to resume from must come from the same groups and plan."""
        if resume_from_checkpoint is True and self._commonit_on:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        checkpoint = (
            get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        self._commonit_rest, self._commonit_first_step, self._commonit_replanned = None, None, 0
        if checkpoint:
            self._commonit_check_checkpoint(Path(checkpoint))
        self._commonit_save(self.args.output_dir)  # from the start, whatever becomes of the run
        if not (self._commonit_on and self.args.commonit_report and self.args.should_save):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        inspection = self._commonit_inspect()
        self._commonit_write_report(inspection)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._commonit_write_report(inspection)
        return result

    def _commonit_check_checkpoint(self, checkpoint: Path) -> None:
        if not checkpoint.exists():
            return  # the parent says so
        directory, ended = checkpoint / COMMONIT_DIR, (checkpoint / TRAINER_STATE_NAME).exists()
        if self._commonit_on != directory.exists() and ended:
            was, now = ("without", "with") if self._commonit_on else ("with", "without")
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r} was written {was} CommonIT and this run trains {now} it, "
                "in another order: resume with the checkpoint's commonit_metric, or start a new run."
            )
        if not self._commonit_on:
            return
        saved, state = read_checkpoint(checkpoint)
        try:
            self._commonit_rest = load_rest(directory, saved)
            self._commonit_replanned = saved["times replanned"]
            current = self._commonit_run(self._commonit_plan_of()())
            # B may be what an earlier run found out; the Trainer takes it from the checkpoint.
            skipped = {"per-device batch size", "order of samples"} if self.args.auto_find_batch_size else set()
            differences = {
                name: f"{name} ({saved[name]!r} in the checkpoint, {current[name]!r} now)"
                for name in current
                if name not in skipped and saved[name] != current[name]
            }
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{directory / RUN_FILE} is damaged ({type(error).__name__}: {error}): use another checkpoint."
            ) from error
        if differences and self.args.commonit_resume == "exact":
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r} is of another run; these differ: "
                f"{'; '.join(differences.values())}. Resume with the same settings and data, or start a new run; "
                "commonit_resume='replan' goes on with other settings and the same rows."
            )
        if differences:
            self._commonit_replan(checkpoint, saved, state, differences)

    def _commonit_replan(
        self, checkpoint: Path, saved: dict[str, Any], state: TrainerState, differences: dict[str, str]
    ) -> None:
        """Take what the checkpoint's epoch has left as the rest of that epoch, and find the step to go on at."""
        if self.is_deepspeed_enabled and "world size" in differences:
            raise ValueError(
                f"commonit_resume='replan': {differences['world size']}: DeepSpeed's checkpoints are read by as many "
                "ranks as wrote them; resume with those, or start a new run from the checkpoint's model."
            )
        other_data = [differences[name] for name in ("rows", "tokens of rows") if name in differences]
        try:
            begun = self._commonit_begun_plan(saved, load_grouper(checkpoint / COMMONIT_DIR), differences)
            if not other_data and begun(epoch=0).digest() != saved["order of samples"]:
                other_data = ["their groups or numbers of tokens differ"]
        except ValueError as error:
            other_data.append(str(error))
        if other_data:
            raise ValueError(
                f"commonit_resume='replan' needs the rows that resume_from_checkpoint={str(checkpoint)!r} was trained "
                f"on (with packing, the same packs, which follow from the groups): {'; '.join(other_data)}. Give the "
                "same data, or start a new run from the checkpoint's model."
            )
        epoch, done = divmod(state.global_step, begun(epoch=0).num_steps)
        if self._commonit_rest is not None:
            begun = functools.partial(self._commonit_rest.plan, begun, saved["data seed"])
        left = begun(epoch=epoch).left(done)
        self._commonit_rest = Rest(epoch=epoch, rows=left) if done and len(left) else None
        self._commonit_replanned += 1
        epoch += done > 0 and not len(left)
        plan = self.commonit_plan(epoch)
        self._commonit_first_step = epoch * plan.num_steps + first_step(plan)
        self._commonit_logger.info(
            "commonit_resume='replan': epoch %d has %d samples left, planned anew in %d steps that repeat %d; goes on "
            "at step %d, with %d an epoch. What differs from the checkpoint: %s.",
            epoch,
            len(left),
            plan.num_steps - first_step(plan),
            plan.summary().repeated,
            self._commonit_first_step,
            plan.num_steps,
            "; ".join(differences.values()),
        )

    def _commonit_begun_plan(
        self, saved: dict[str, Any], grouper: Grouper, differences: dict[str, str]
    ) -> Callable[..., EpochPlan]:
        """The plans, by epoch, of the run that `saved` (its `run.json`) and its `grouper` describe."""
        assert self._commonit_grouped is not None and self.commonit_group_ids is not None
        group_ids = self.commonit_group_ids
        if "assignment of rows to groups" in differences:
            group_ids = grouper.assign(self._commonit_grouped[0])
        return functools.partial(
            plan_epoch,
            group_ids=group_ids,
            lengths=self._commonit_row_costs() if saved["commonit_balance_lengths"] else None,
            micro_batch_size=saved["per-device batch size"],
            world_size=saved["world size"],
            accumulation_steps=saved["gradient accumulation steps"],
            purity=saved["commonit_purity"],
            remainder=saved["commonit_remainder"],
            weights=weights_by_id(saved["commonit_weights"], grouper.names, group_ids),
            seed=saved["data seed"],
        )

    # transformers' own name: the only place that says at which step of which epoch the Trainer goes on. test_rest.py
    # fails when it changes.
    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        if self._commonit_first_step is None:
            return place
        self.state.global_step = self._commonit_first_step
        self.state.epoch = self._commonit_first_step / num_update_steps_per_epoch
        self.state.best_global_step = None  # a step of the checkpoint's own count
        epoch, step = divmod(self._commonit_first_step, num_update_steps_per_epoch)
        return epoch, step * self.args.gradient_accumulation_steps

    # --- evaluation -------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> Any:
        """The parent's; remembers which rows are evaluated, for the loss of each group."""
        loader = super().get_eval_dataloader(eval_dataset)
        if self._commonit_on:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            self._commonit_evaluated = loader, self.eval_dataset[rows] if isinstance(rows, str) else rows
        return loader

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The parent's loop, then one more pass, group by group, for `<prefix>_loss_<group>`; the rest is unchanged."""
        (loader, dataset), self._commonit_evaluated = self._commonit_evaluated, (None, None)
        loop: Any = super().evaluation_loop
        output = loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        group_ids = self._commonit_assign_eval(dataset) if dataset is not None and loader is dataloader else None
        if group_ids is not None:
            assert self.commonit_grouper is not None
            with self._commonit_keep_eval_metrics(), _no_persistent_workers(self.args):
                for group in np.unique(group_ids):
                    name = self.commonit_grouper.names[group] if group >= 0 else "(unseen task)"
                    # Not get_eval_dataloader, which with persistent workers returns the loader of the whole set.
                    part = self.get_test_dataloader(dataset.select(np.flatnonzero(group_ids == group)))
                    if len(part) == 0:  # a parent that drops incomplete batches
                        continue
                    result = loop(part, f"{description} of {shown(name)}", True, None, metric_key_prefix)
                    output.metrics[f"{metric_key_prefix}_loss_{name}"] = result.metrics[f"{metric_key_prefix}_loss"]
        return output

    def _commonit_keep_eval_metrics(self) -> Any:
        """A context in which evaluating leaves the parent's running metrics as they were."""
        return contextlib.nullcontext()

    def _commonit_is_packed(self, dataset: Dataset) -> bool:
        """Whether the rows of an evaluation set are packs."""
        return False

    def _commonit_assign_eval(self, dataset: Any) -> NDArray[np.int64] | None:
        """(rows,) groups of an evaluation set, None (and a word why) where they cannot be told."""
        if not isinstance(dataset, Dataset):
            logger.info("No loss per group: the evaluation set is a %s.", type(dataset).__name__)
            return None
        if self._commonit_is_packed(dataset):
            logger.info("No loss per group: the evaluation set is packed; set eval_packing=False to get it.")
            return None
        if dataset not in self._commonit_eval_groups:
            assert self.commonit_grouper is not None
            try:
                self._commonit_eval_groups[dataset] = self.commonit_grouper.assign(self._commonit_rows(dataset))
            except ValueError as error:
                logger.warning("No loss per group on the evaluation set: %s", error)
                self._commonit_eval_groups[dataset] = None  # so that this is said once
        return self._commonit_eval_groups[dataset]


class _EpochStart(TrainerCallback):
    """Before each epoch: gives the sampler the epoch and how much of it is done, and compares the ranks' plans.

    In transformers 5.16 the Trainer's own `set_epoch` does not get through the wrapper that skips the first batches of
    a resumed epoch (`accelerate.skip_first_batches`).
    """

    def __init__(self, trainer: CommonITMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        if self.trainer._commonit_first_step is not None:
            move_schedule(lr_scheduler, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        sampler = train_dataloader.commonit_sampler
        epoch, done = divmod(state.global_step, sampler.current.num_steps)
        rest = self.trainer._commonit_rest
        if rest is not None and rest.epoch < epoch:
            self.trainer._commonit_rest = None  # trained: later checkpoints need not hold it
        train_dataloader.set_epoch(epoch)
        sampler.skip_first(done * sampler.current.accumulation_steps)
        if args.world_size > 1:  # it hashes the rows
            compare_ranks(self.trainer._commonit_run(sampler.current))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._commonit_micro_steps = 0


@contextlib.contextmanager
def _no_persistent_workers(args: Any) -> Any:
    """Dataloaders made inside end their workers with each iteration; accelerate keeps such loaders alive."""
    persistent, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
    try:
        yield
    finally:
        args.dataloader_persistent_workers = persistent


def fit_assign(options: Any, rows: Rows) -> tuple[Grouper, NDArray[np.int64]]:
    grouper = build_grouper(options, rows.columns, seed=data_seed(options))
    grouper, group_ids = fit_assign_cached(grouper, rows, options.commonit_cache_dir)
    if PartialState().is_main_process:
        grouper.log_notices()
    return grouper, group_ids


def data_seed(args: Any) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def compare_ranks(values: dict[str, Any]) -> None:
    """Compare on all ranks what the batches follow from; the ranks wait for each other.

    Raises:
        ValueError: on every rank, naming the ranks and what differs.
    """
    digests = [int(_digest(json.dumps(value).encode()), 16) >> 1 for value in values.values()]
    by_rank = gather(torch.tensor([digests], device=PartialState().device)).cpu()
    differs = by_rank != by_rank[0]
    if differs.any():
        ranks = ", ".join(map(str, differs.any(dim=1).nonzero()[:, 0].tolist()))
        names = ", ".join(name for name, here in zip(values, differs.any(dim=0)) if here)
        raise ValueError(
            f"The ranks would train different batches: rank {ranks} differs from rank 0 in {names}. Give every "
            "rank the same data, options, seed and commonit_cache_dir."
        )


def _digest_rows(dataset: Dataset) -> str | None:
    """A hash of the tokens of some rows, None of rows that are not tokenised."""
    if "input_ids" not in dataset.column_names:
        return None
    rows = np.unique(np.linspace(0, len(dataset) - 1, _HASHED_ROWS).astype(int))
    tokens = dataset.select_columns(["input_ids"]).with_format(None)[rows.tolist()]["input_ids"]
    return _digest(json.dumps(tokens).encode())


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}; grouping needs the length and every row beforehand: give a "
            "datasets.Dataset (not streaming), for example with load_dataset(...) or Dataset.from_list(...)."
        )
    if len(dataset) == 0:
        raise ValueError("train_dataset has no rows.")


def data_parallel_place(trainer: Any) -> tuple[int, int]:
    """(data-parallel world size, data-parallel rank); tensor- and context-parallel ranks share their batches, laid out
    as in `accelerate.data_loader.prepare_data_loader`."""
    if trainer.get_sp_size() > 1:
        raise ValueError(
            f"Sequence parallelism (sp_size={trainer.get_sp_size()}) does not go with commonit_metric: its dataloader "
            "adapter splits batches again; set sp_size to 1."
        )
    shared_by = trainer.get_tp_size() * trainer.get_cp_size()
    return trainer.args.world_size // shared_by, trainer.args.process_index // shared_by


def weights_by_id(weights: Any, names: list[str], group_ids: NDArray[np.int64]) -> Any:
    """`commonit_weights` with group names replaced by ids."""
    if isinstance(weights, str):
        return weights
    present = [names[group] for group in np.unique(group_ids)]
    unknown = [name for name in weights if name not in present]
    missing = [name for name in present if name not in weights]
    if unknown:
        raise ValueError(
            f"commonit_weights names {unknown[0]!r}, which is no group; did you mean {nearest(unknown[0], present)!r}?"
        )
    if missing:
        raise ValueError(f"commonit_weights names no weight for {', '.join(map(repr, missing))}: give each group one.")
    return {group: float(weights[names[group]]) for group in np.unique(group_ids).tolist()}
