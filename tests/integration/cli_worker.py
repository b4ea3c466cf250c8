"""`commonit` as the launchers start it, with a recorder of what the model sees.

    torchrun --nproc_per_node 2 -m cli_worker sft ...          accelerate launch ... -m cli_worker sft ...
    deepspeed --num_gpus 2 --module cli_worker sft ...         (a real engine, on CPU with DS_ACCELERATOR=cpu)

Everything after the name goes to `python -m commonit_trl`. `COMMONIT_RECORD` names the file: `<file>.rank<r>` gets the row
numbers (see `toys.Recorder`), `<file>.json` the engine and its ZeRO stage.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import Recorder  # noqa: E402

from commonit_trl import CommonITSFTTrainer  # noqa: E402

if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import PartialState
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    PartialState(backend="gloo")

RECORD = os.environ["COMMONIT_RECORD"]
train = CommonITSFTTrainer.train


def recorded_train(self, *args, **kwargs):
    Recorder(RECORD).attach(self)
    output = train(self, *args, **kwargs)
    if self.is_world_process_zero():
        engine = self.model_wrapped
        stage = engine.zero_optimization_stage() if self.is_deepspeed_enabled else None
        Path(f"{RECORD}.json").write_text(json.dumps({"engine": type(engine).__name__, "stage": stage}), encoding="utf-8")
    return output


if __name__ == "__main__":
    CommonITSFTTrainer.train = recorded_train
    runpy.run_module("commonit_trl", run_name="__main__", alter_sys=True)
