"""Evaluate and train on one rank or several: `evaluation_worker.py DIRECTORY` writes `result.json` there."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer
from helpers.toys import QUIET, id_rows, row_losses, tiny_model, tiny_tokenizer

TRAIN, EVAL = id_rows([8, 4]), id_rows([9, 6, 2], seed=1)


class LogsAlone(TrainerCallback):
    """Logs a loss on rank 0 only, as user code may do."""

    trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step < 3:
            self.trainer.log({"loss": 0.5})


def make(trainer_class, config_class, directory, **options):
    args = config_class(output_dir=str(directory / "out"), **QUIET, per_device_eval_batch_size=3, **options)
    return trainer_class(
        model=tiny_model(), args=args, train_dataset=TRAIN, eval_dataset=EVAL, processing_class=tiny_tokenizer()
    )


def expected():
    model, sums = tiny_model().eval(), {}
    for row in EVAL:
        losses, trained = row_losses(model, {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")})
        name = row["task"] if row["task"] in ("g000", "g001") else "(unseen task)"
        total, count = sums.get(name, (0.0, 0))
        sums[name] = total + losses[0], count + trained[0]
    return {name: total / count for name, (total, count) in sums.items()}


def main(directory):
    torch.set_num_threads(1)
    options = {"commonit_metric": "task", "commonit_report": False, "commonit_cache_dir": str(directory / "cache")}
    ours = make(CommonITSFTTrainer, CommonITSFTConfig, directory, **options)
    parent = make(SFTTrainer, SFTConfig, directory)
    result = {"ours": ours.evaluate(), "parent": parent.evaluate(), "expected": expected()}
    logs_alone = LogsAlone()
    logs_alone.trainer = ours
    ours.add_callback(logs_alone)
    ours.args.max_steps = 3
    ours.train()
    history = ours.state.log_history
    result["logged alone"] = sum(entry.get("loss") == 0.5 for entry in history)
    result["group losses"] = sum(any(name.startswith("loss_g") for name in entry) for entry in history)
    if ours.is_world_process_zero():
        (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo may abort the interpreter at exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
