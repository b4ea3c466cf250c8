"""`python -m commonit_trl` with a recorder of the model's inputs, for launchers.

    torchrun --nproc_per_node 2 -m helpers.cli_worker sft ...
    accelerate launch ... -m helpers.cli_worker sft ...
    deepspeed --num_gpus 2 --module helpers.cli_worker sft ...

`COMMONIT_RECORD` names the output: `<file>.rank<r>` has the rows (see `toys.Recorder`), `<file>.json` the class that
wraps the model, with its ZeRO stage. `DS_ACCELERATOR=cpu` is for a real DeepSpeed engine on CPU ranks,
`ACCELERATE_USE_FSDP=true`, which accelerate sets, for real FSDP2; the options must then have
`accelerator_config: {use_configured_state: true}` and no `use_cpu`.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if os.environ.get("DS_ACCELERATOR") == "cpu":
    import helpers.deepspeed_cpu  # noqa: F401
elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from helpers import fsdp_cpu

    fsdp_cpu.enable()

from commonit_trl import CommonITSFTTrainer
from helpers.toys import Recorder

RECORD = os.environ["COMMONIT_RECORD"]


def recorded(train):
    def recorded_train(self, *args, **kwargs):
        Recorder(RECORD).attach(self)
        output = train(self, *args, **kwargs)
        if self.is_world_process_zero():
            wrapper = self.model_wrapped
            stage = wrapper.zero_optimization_stage() if self.is_deepspeed_enabled else None
            record = {"name": type(wrapper).__name__, "stage": stage}
            Path(f"{RECORD}.json").write_text(json.dumps(record), encoding="utf-8")
        return output

    return recorded_train


if __name__ == "__main__":
    CommonITSFTTrainer.train = recorded(CommonITSFTTrainer.train)
    try:
        runpy.run_module("commonit_trl", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)  # gloo threads outlive DDP and may abort the interpreter at exit
