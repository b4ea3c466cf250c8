"""The callbacks of a CommonIT run: epochs, metrics, reports, and a mark in the checkpoints' trainer state."""

import secrets
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from commonit_trl.trainer import checkpoint, reports, validate
from commonit_trl.trainer.metrics import sum_over_ranks


class CommonITCallback(TrainerCallback, ExportableState):
    """Marks each checkpoint's `trainer_state.json`, which a run without CommonIT would write without the mark."""

    def __init__(self) -> None:
        self.run_id = secrets.token_hex(8)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The state of a checkpoint that has no mark lacks the entry that saving looks up.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"run_id": self.run_id}}


class RunCallback(TrainerCallback):
    """Follows the epochs of `trainer` and reports on them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.inspection: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        run = self.trainer.commonit
        run.metrics.clear()
        if run.first_step is not None:
            checkpoint.move_schedule(lr_scheduler, state.global_step)
        if args.commonit_report and args.should_save:
            self.inspection = reports.inspect_run(self.trainer)
            reports.write_report(self.trainer, self.inspection)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        # In transformers 5.16 the Trainer's own `set_epoch` does not reach the sampler of a resumed epoch, through the
        # wrapper that skips its first batches (`accelerate.skip_first_batches`).
        run = self.trainer.commonit
        epoch, done = run.start_epoch(state.global_step)
        train_dataloader.set_epoch(epoch)
        train_dataloader.commonit_sampler.skip_first(done * run.spec.accumulation_steps)
        if args.world_size > 1:
            validate.compare_ranks(checkpoint.describe(self.trainer))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.commonit.micro_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:  # on every rank; `log` itself may be called on one rank alone
            self.trainer.commonit.metrics.reduce(self._sum_over_ranks)

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.inspection is not None:
            reports.write_report(self.trainer, self.inspection)

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        world_size = self.trainer.args.world_size
        if world_size == 1:
            return values
        shared_by = world_size / self.trainer.commonit.spec.world_size  # ranks that share a batch count once
        return [value / shared_by for value in sum_over_ranks(self.trainer, values)]
