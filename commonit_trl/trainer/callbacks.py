"""The callback of a CommonIT run: epochs, metrics, reports, and the run's mark in the checkpoints' trainer state."""

from typing import Any

from transformers import TrainerCallback

from commonit_trl.trainer import checkpoint, reports, resume, validate


class RunCallback(TrainerCallback):
    """Follows the epochs of `trainer` and reports on them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.inspection: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        run = self.trainer.commonit
        checkpoint.mark(run, state)
        run.metrics.clear()
        if run.first_step is not None:
            resume.move_schedule(lr_scheduler, state.global_step)
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
            # Nodes without a shared disk may resume from different checkpoints.
            validate.compare_ranks({**checkpoint.describe(self.trainer), "optimizer step": state.global_step})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.commonit.micro_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:  # on every rank; `log` itself may be called on one rank alone
            self.trainer.commonit.metrics.reduce(self.trainer)

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.inspection is not None:
            reports.write_report(self.trainer, self.inspection)
