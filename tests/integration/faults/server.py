"""Train runs that kill themselves: import torch and TRL once, then fork the ranks of each run.

    python server.py < runs    # one JSON object per line, and one line per answer

A run has `name`, `dir`, `world_size`, `group_sizes`, `options` (of `CommonITSFTConfig`), and any of: `attempt`,
`rank_options` (rank -> its own options), `data` (rank -> one of `DATA`), `dropout`, `zero2`, `resume` (true: from the
last complete checkpoint, if there is one), `kill` (`{"at": event, "count": n, "ranks": [...]}`: these ranks kill
themselves by SIGKILL at the n-th such event), `limit_s` (seconds after which a rank counts as hung and is killed).

Each rank writes its first step, then a line per micro-batch before training it, to `<name>.<attempt>.rank<r>.jsonl`;
its output goes to `<name>.<attempt>.rank<r>.log`. Rank 0 writes `<name>.json` and `<name>.safetensors` when a run ends.
The answer: `codes` of the ranks (-9: killed), `hung` ranks, `outlived_s` (from the end of the first rank to that of the
last).
"""

import functools
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]
os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import deepspeed  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers.modeling_utils  # noqa: E402
from accelerate import PartialState  # noqa: E402
from helpers.toys import QUIET, id_rows, read_ids, tiny_model, tiny_tokenizer  # noqa: E402
from transformers import TrainerCallback, TrainerState  # noqa: E402

import commonit_trl.grouping.fit  # noqa: E402
from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer  # noqa: E402
from commonit_trl.grouping import Grouper  # noqa: E402
from commonit_trl.trainer.checkpoint import last_checkpoint, read_checkpoint  # noqa: E402

EVENTS = ("grouping", "train begin", "epoch begin", "micro-batch", "optimizer step", "write", "saved")
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
DATA = {  # changes of the run's rows, for ranks that disagree
    "tokens": lambda rows: rows.map(lambda row: {"input_ids": [*row["input_ids"][:-1], row["input_ids"][-1] ^ 1]}),
    "groups": lambda rows: rows.map(lambda row: {"task": "g000" if row["row"] < 3 else row["task"]}),
    "order": lambda rows: rows.select([1, 0, *range(2, len(rows))]),
    "fewer rows": lambda rows: rows.select(range(len(rows) - 3)),
}


class Killer(TrainerCallback):
    """Kills its process at the event in `kill`."""

    def __init__(self, kill: dict[str, Any] | None, rank: int) -> None:
        self.event = kill["at"] if kill and rank in kill["ranks"] else None
        self.left = kill["count"] if kill else 0

    def happens(self, event: str, torn: Path | None = None) -> None:
        """Count an event; a kill during a write leaves half of the file `torn`."""
        assert event in EVENTS
        self.left -= event == self.event
        if event == self.event and self.left == 0:
            if torn is not None:
                os.truncate(torn, torn.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_begin(self, args, state, control, **kwargs):
        self.happens("train begin")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.happens("epoch begin")

    def on_optimizer_step(self, args, state, control, **kwargs):  # after the update, before the step is counted
        self.happens("optimizer step")

    def on_save(self, args, state, control, **kwargs):
        self.happens("saved")

    def watch(self) -> None:
        """Count writes of checkpoint files and fits of groups as events."""
        self._watch_writes(torch, "save", 1)
        self._watch_writes(transformers.modeling_utils, "safe_save_file", 1)
        self._watch_writes(safetensors.torch, "save_file", 1)
        self._watch_writes(TrainerState, "save_to_json", 1)
        # Before and after a rank fits groups, or receives them from rank 0.
        for module, name in ((commonit_trl.grouping.fit, "fit_assign_cached"), (Grouper, "fit_assign")):
            setattr(module, name, self._watch_grouping(getattr(module, name)))

    def _watch_grouping(self, group: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(group)
        def watched(*args, **kwargs):
            self.happens("grouping")
            result = group(*args, **kwargs)
            self.happens("grouping")
            return result

        return watched

    def _watch_writes(self, module: Any, name: str, path_argument: int) -> None:
        write = getattr(module, name)

        @functools.wraps(write)
        def watched(*args, **kwargs):
            result = write(*args, **kwargs)
            path = args[path_argument] if len(args) > path_argument else None
            if isinstance(path, str | Path) and "checkpoint-" in str(path):
                self.happens("write", torn=Path(path))
            return result

        setattr(module, name, watched)


class Log(TrainerCallback):
    """Writes a line per micro-batch to disk before the model trains it."""

    def __init__(self, path: Path, trainer: Any, killer: Killer, checkpoint: str | None) -> None:
        self.descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self.trainer, self.killer, self.checkpoint, self.step = trainer, killer, checkpoint, 0

    def write(self, line: dict[str, Any]) -> None:
        os.write(self.descriptor, json.dumps(line).encode() + b"\n")
        os.fsync(self.descriptor)

    def on_train_begin(self, args, state, control, **kwargs):
        per_epoch = state.max_steps // args.num_train_epochs
        came_from = (0, 0)
        if self.checkpoint is not None:
            run, saved = read_checkpoint(Path(self.checkpoint))
            came_from = run["times replanned"], saved.global_step
        begins = {"begins": state.global_step, "came from": came_from, "per epoch": per_epoch}
        repeats = [self.trainer.commonit_plan(epoch).summary().repeated for epoch in range(args.num_train_epochs)]
        self.write({**begins, "replanned": self.trainer.commonit.replanned, "repeats": repeats})

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def sees(self, model, args, kwargs):
        if model.training:
            self.write({"step": self.step, "ids": read_ids(kwargs)})
            self.killer.happens("micro-batch")


def train(run: dict[str, Any], rank: int) -> None:
    name, directory = run["name"], Path(run["dir"])
    killer = Killer(run.get("kill"), rank)
    killer.watch()
    if run.get("zero2"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    options = {
        "output_dir": str(directory / f"{name}-out"),
        "commonit_cache_dir": str(directory / f"{name}-cache"),
        "commonit_report": False,
        **QUIET,
        "use_cpu": not run.get("zero2"),
        "num_train_epochs": 2,
        **run["options"],
        **run.get("rank_options", {}).get(str(rank), {}),
    }
    if run.get("zero2"):
        options |= {"deepspeed": ZERO2, "accelerator_config": {"use_configured_state": True}}
    rows = id_rows(run["group_sizes"])
    if str(rank) in run.get("data", {}):
        rows = DATA[run["data"][str(rank)]](rows)
    trainer = CommonITSFTTrainer(
        model=tiny_model(dropout=run.get("dropout", 0.0)),
        args=CommonITSFTConfig(**options),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[killer],
    )
    checkpoint = last_checkpoint(trainer.args.output_dir) if run.get("resume") else None
    log = Log(directory / f"{name}.{run.get('attempt', 0)}.rank{rank}.jsonl", trainer, killer, checkpoint)
    trainer.add_callback(log)
    trainer.model.register_forward_pre_hook(log.sees, with_kwargs=True)
    trainer.train(resume_from_checkpoint=True if checkpoint else None)  # True: the trainer must find it

    result = {"world_size": trainer.args.world_size, "global_step": trainer.state.global_step}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    result["rates"] = {entry["step"]: entry["learning_rate"] for entry in logged}
    if run.get("zero2"):
        engine = trainer.model_wrapped
        result |= {"engine": type(engine).__name__, "stage": engine.zero_optimization_stage()}
    if rank == 0:
        weights = {key: value.contiguous().clone() for key, value in trainer.model.state_dict().items()}
        safetensors.torch.save_file(weights, directory / f"{name}.safetensors")
        (directory / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def fork_rank(run: dict[str, Any], rank: int, port: int) -> int:
    """Start a rank and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if run["world_size"] > 1 or run.get("zero2"):
            ranks = str(run["world_size"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        log = Path(run["dir"]) / f"{run['name']}.{run.get('attempt', 0)}.rank{rank}.log"
        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        train(run, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # about one in fifty gloo processes aborts when the interpreter exits


def do(run: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of `run` and wait for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork_rank(run, rank, port) for rank in range(run["world_size"])]
    ranks = {os.pidfd_open(child): (rank, child) for rank, child in enumerate(children)}
    poll, codes, ends, hung = select.poll(), {}, [], []
    for descriptor in ranks:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + run.get("limit_s", 120)
    while ranks:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            hung = [rank for rank, _ in ranks.values()]
            for _, child in ranks.values():
                os.kill(child, signal.SIGKILL)
        for descriptor in [place for place, _ in ready] or list(ranks):
            rank, child = ranks.pop(descriptor)
            poll.unregister(descriptor)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.close(descriptor)
            ends.append(time.monotonic())
    return {"codes": [codes[rank] for rank in sorted(codes)], "hung": hung, "outlived_s": round(ends[-1] - ends[0], 2)}


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # otherwise DeepSpeed compiles it first, for a minute
    )
    torch.set_num_threads(1)
    # On several CPU ranks, transformers 5.16 loads the optimizer's state to "cpu:0", which torch does not accept.
    torch.serialization.register_package(
        50, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep output of libraries out of the answers
    for line in sys.stdin:
        answers.write(json.dumps(do(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
