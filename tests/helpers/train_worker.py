"""Train `CommonITSFTTrainer` on `id_rows` and record the rows that the model sees.

    python train_worker.py runs.json            torchrun --nproc_per_node 2 train_worker.py runs.json

`runs.json` is a list of runs with `name`, `dir`, `group_sizes` and any of: `columns` (name -> value of each row, to add
or replace), `options` (of `CommonITSFTConfig`), `model`, `dropout`, `accepts_loss_kwargs` (an attribute of the model),
`eval_group_sizes`, `deepspeed` (a config), `fsdp` (an `fsdp_config`), `resume` (a path, or true: the last complete
checkpoint, if there is one), `losses` (true: record each row's loss), `logs_alone` (true: rank 0 alone logs a loss in
each step), `rank_options` and `data` (rank -> its own options, one of `DATA`), `kill` (`{"at": event, "count": n,
"ranks": [...]}`: these ranks kill themselves at the n-th such event; with `"node": true`, the launcher's agent first).
All runs of a list are on one engine.

Each run writes `<dir>/<name>.ids.rank*` (see `toys.Recorder`) and, on rank 0, `<name>.start.json` when it begins,
`<name>.safetensors` (final weights) and `<name>.json` when it ends.
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
RUNS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
USES_DEEPSPEED = any(run.get("deepspeed") for run in RUNS)
USES_FSDP = any("fsdp" in run for run in RUNS)
# A real engine on CPU: with `use_cpu=True` transformers would train plain DDP.
if USES_DEEPSPEED:
    import helpers.deepspeed_cpu  # noqa: F401

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers.modeling_utils  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback, TrainerState  # noqa: E402

import commonit_trl.grouping.fit  # noqa: E402
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer  # noqa: E402
from commonit_trl.compare.tasks import check_trainer  # noqa: E402
from commonit_trl.trainer.checkpoint import last_checkpoint, read_checkpoint  # noqa: E402
from helpers import fsdp_cpu  # noqa: E402
from helpers.toys import QUIET, Recorder, accept_cpu_ranks, id_rows, tiny_model, tiny_tokenizer  # noqa: E402

DATA = {  # changes of the run's rows, for ranks that disagree
    "tokens": lambda rows: rows.map(lambda row: {"input_ids": [*row["input_ids"][:-1], row["input_ids"][-1] ^ 1]}),
    "groups": lambda rows: rows.map(lambda row: {"task": "g000" if row["row"] < 3 else row["task"]}),
    "order": lambda rows: rows.select([1, 0, *range(2, len(rows))]),
    "fewer rows": lambda rows: rows.select(range(len(rows) - 3)),
}
SAVERS = (torch, "save"), (safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file")


class Killer(TrainerCallback):
    """Kills its process by SIGKILL at the n-th `grouping`, `micro-batch`, `optimizer step`, `write` or `saved`."""

    def __init__(self, at: str, count: int, node: bool = False) -> None:
        self.at, self.remaining, self.node = at, count, node
        self._after(commonit_trl.grouping.fit, "fit_assign_cached", lambda args: self.happens("grouping"))
        for module, name in (*SAVERS, (TrainerState, "save_to_json")):
            self._after(module, name, lambda args: self._writes(args[1] if len(args) > 1 else None))

    def happens(self, event: str, torn: Path | None = None) -> None:
        """Count an event; a kill during a write leaves half of the file `torn`."""
        self.remaining -= event == self.at
        if event == self.at and self.remaining == 0:
            if torn is not None:
                os.truncate(torn, torn.stat().st_size // 2)
            if self.node:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def sees(self, model, args):
        if model.training:
            self.happens("micro-batch")

    def on_optimizer_step(self, args, state, control, **kwargs):  # after the update, before the step is counted
        self.happens("optimizer step")

    def on_save(self, args, state, control, **kwargs):
        self.happens("saved")

    def _writes(self, path: Any) -> None:
        if isinstance(path, str | Path) and "checkpoint-" in str(path):
            self.happens("write", torn=Path(path))

    def _after(self, module: Any, name: str, happened: Callable[[Any], None]) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            happened(args)
            return result

        setattr(module, name, watched)


class Start(TrainerCallback):
    """Writes where a run begins, where its checkpoint comes from, and how many repeats its plans announce."""

    def __init__(self, path: Path, trainer: Any, checkpoint: str | None) -> None:
        self.path, self.trainer, self.checkpoint = path, trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        came_from = (0, 0)
        if self.checkpoint is not None:
            run, saved = read_checkpoint(Path(self.checkpoint))
            came_from = run["times replanned"], saved.global_step
        epochs = range(int(args.num_train_epochs))
        start = {
            "begins": state.global_step,
            "came from": came_from,
            "per epoch": state.max_steps // len(epochs),
            "replanned": self.trainer.commonit.replanned,
            "repeats": [self.trainer.commonit_plan(epoch).summary().repeated for epoch in epochs],
        }
        self.path.write_text(json.dumps(start), encoding="utf-8")


class LogsAlone(TrainerCallback):
    """Logs a loss on rank 0 alone, as user code may do."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.log({"loss": 0.5})


def make_trainer(run: dict[str, Any], rank: str) -> CommonITSFTTrainer:
    directory = Path(run["dir"])
    options = {
        "output_dir": str(directory / f"{run['name']}-out"),
        "commonit_cache_dir": str(directory / "cache"),
        "commonit_report": False,
        **QUIET,
        "use_cpu": not (USES_DEEPSPEED or USES_FSDP),
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        **run.get("options", {}),
        **run.get("rank_options", {}).get(rank, {}),
    }
    if run.get("deepspeed"):
        options |= {"deepspeed": run["deepspeed"], "accelerator_config": {"use_configured_state": True}}
    rows = id_rows(run["group_sizes"])
    if "columns" in run:
        rows = Dataset.from_dict({**rows.to_dict(), **run["columns"]})
    if "fsdp" in run:
        options |= {"fsdp": True, "fsdp_config": run["fsdp"], "accelerator_config": {"use_configured_state": True}}
    change = DATA.get(run.get("data", {}).get(rank), lambda rows: rows)
    model = tiny_model(run.get("model", "llama"), dropout=run.get("dropout", 0.0))
    if "accepts_loss_kwargs" in run:
        model.accepts_loss_kwargs = run["accepts_loss_kwargs"]
    return CommonITSFTTrainer(
        model=model,
        args=CommonITSFTConfig(**options),
        train_dataset=change(rows),
        eval_dataset=id_rows(run["eval_group_sizes"], seed=1) if "eval_group_sizes" in run else None,
        processing_class=tiny_tokenizer(),
    )


def train(run: dict[str, Any]) -> None:
    directory, rank = Path(run["dir"]), os.environ.get("RANK", "0")
    kill = run.get("kill", {"ranks": []})
    killer = Killer(kill["at"], kill["count"], kill.get("node", False)) if int(rank) in kill["ranks"] else None
    trainer = make_trainer(run, rank)
    resume = last_checkpoint(trainer.args.output_dir) if run.get("resume") is True else run.get("resume")
    Recorder(directory / f"{run['name']}.ids", run.get("losses", False)).attach(trainer)
    if killer is not None:
        trainer.add_callback(killer)
        trainer.model.register_forward_pre_hook(killer.sees)
    if run.get("logs_alone"):
        trainer.add_callback(LogsAlone(trainer))
    if trainer.is_world_process_zero() and trainer.commonit is not None:
        trainer.add_callback(Start(directory / f"{run['name']}.start.json", trainer, resume))
    # True where the trainer must find the checkpoint
    trainer.train(resume_from_checkpoint=True if resume and run["resume"] is True else resume)

    result = {"world_size": trainer.args.world_size, "global_step": trainer.state.global_step}
    if USES_DEEPSPEED:
        result["engine"] = type(trainer.model_wrapped).__name__
        result["stage"] = trainer.model_wrapped.zero_optimization_stage()
    if USES_FSDP:
        result["shards"] = fsdp_cpu.numbers_of_shards(trainer.model_wrapped)
    result["refused_by_compare"] = refusal_of_harness(trainer)
    result["log"] = trainer.state.log_history
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective with ZeRO-3
    if trainer.is_world_process_zero():
        weights = {name: value.contiguous().clone() for name, value in weights.items()}
        safetensors.torch.save_file(weights, directory / f"{run['name']}.safetensors")
        (directory / f"{run['name']}.json").write_text(json.dumps(result), encoding="utf-8")


def refusal_of_harness(trainer: Any) -> str | None:
    """Return the message by which `commonit compare` refuses the harness's tasks."""
    try:
        return check_trainer(trainer)
    except ValueError as error:
        return str(error)


def main() -> None:
    torch.set_num_threads(1)
    accept_cpu_ranks()
    for run in RUNS:
        if USES_FSDP:
            fsdp_cpu.enable()
        train(run)
        if USES_DEEPSPEED or USES_FSDP:
            AcceleratorState._reset_state(False)  # the next run makes another Accelerator
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # one in fifty or so gloo processes aborts when the interpreter exits


if __name__ == "__main__":
    main()
