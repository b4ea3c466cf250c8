"""An Axolotl plugin that records the model's inputs in training; texts contain the row number as `#12#`."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file
from transformers import TrainerCallback

from helpers.fsdp_cpu import numbers_of_shards

MARK = re.compile(r"#(\d+)#")
_run: dict[str, Any] = {}


def start(path: str | Path, run: dict[str, Any] | None = None) -> None:
    """Record the next training to files that start with `path`; `run` is as in `axolotl_worker.py`."""
    _run.clear()
    _run.update(run or {}, path=str(path))


class RecorderPlugin(BasePlugin):
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        path = _run.get("path", os.environ.get("COMMONIT_TEST_RECORD"))
        trainer.add_callback(_Recorder(path, trainer))
        if _run.get("arrange_by") == "nothing":
            trainer.commonit.spec = replace(trainer.commonit.spec, lengths=None)
        elif _run.get("arrange_by") == "noise":
            lengths = np.random.default_rng(0).integers(1, 40, len(trainer.train_dataset))
            trainer.commonit.spec = replace(trainer.commonit.spec, lengths=lengths)


class OnCpuPlugin(BasePlugin):
    """Loads the model on the CPU: with several ranks Axolotl sets a device that does not exist without GPUs."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:  # the last hook before it is read
        cfg.device_map = None


class _Recorder(TrainerCallback):
    def __init__(self, path: str, trainer: Any) -> None:
        self.path = path
        self.trainer = trainer
        self.step = 0
        trainer.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def _record(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        tokenizer = self.trainer.processing_class
        texts = [tokenizer.decode(row) for row in kwargs["input_ids"]]
        line = {
            "step": self.step,
            "ids": [int(number) for text in texts for number in MARK.findall(text)],
            "shape": list(kwargs["input_ids"].shape),
            "trained": int((kwargs["labels"] != -100).sum()) if "labels" in kwargs else None,
        }
        with open(f"{self.path}.ids.rank{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _kill(self, step: int) -> None:
        if _run.get("kill_at") == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._kill(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps == 1:  # there is no sub-step
            self._kill(state.global_step - 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero and not _run.get("engine"):
            gradient = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
            save_file(gradient, f"{self.path}.gradient.safetensors")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        engine = self.trainer.model_wrapped
        result = {
            "trainer": type(self.trainer).__name__,
            "world_size": args.world_size,
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "warmup_steps": args.warmup_steps,
            "scheduler_steps": getattr(self.trainer.lr_scheduler, "last_epoch", None),
            "wrapped": type(engine).__name__,
            "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
            "shards": numbers_of_shards(engine),
            "log": state.log_history,
            "ours": [name for name in sys.modules if name.partition(".")[0] in ("commonit_trl", "axolotl_plugin")],
        }
        Path(f"{self.path}.json").write_text(json.dumps(result), encoding="utf-8")
