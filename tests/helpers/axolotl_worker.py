"""Trains Axolotl recipes one after the other, as `axolotl train` does, recording what the model sees.

    python axolotl_worker.py runs.json          torchrun --nproc_per_node 2 axolotl_worker.py runs.json

`runs.json` is a list of runs, each with `recipe` (path of a YAML file), `name` (of what it leaves beside that file),
and any of: `rank_recipes` (rank -> recipe that only it has), `kill_at` (optimizer step in which this process kills
itself), `arrange_by` ("nothing" or "noise": other lengths for the arrangement inside steps than the rows' own),
`deepspeed` (true: a real engine on CPU). A run that a rank refuses ends when all ranks refuse it. Each run leaves
`<name>.ids.rank*` (a JSON line a micro-step: optimizer step, texts' row numbers, tokens), and of rank 0
`<name>.gradient.safetensors` (of the first step) and `<name>.json`.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":  # not in the processes that datasets starts to save rows, which read this file again
    RUNS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    USES_DEEPSPEED = any(run.get("deepspeed") for run in RUNS)
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    if USES_DEEPSPEED:  # a real engine on CPU: `ACCELERATE_USE_CPU` would make transformers ignore the DeepSpeed config
        os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
        import deepspeed
        from accelerate import PartialState

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, for a minute
        PartialState(backend="gloo")
    else:
        os.environ["ACCELERATE_USE_CPU"] = "1"

    import axolotl.train
    import axolotl.utils.distributed
    import torch
    from accelerate.state import AcceleratorState
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager

    from helpers import axolotl_recorder as recorder


def train(run: dict) -> None:
    PluginManager.get_instance().plugins.clear()  # it keeps those of the last recipe
    cfg = load_cfg(run.get("rank_recipes", {}).get(os.environ.get("RANK"), run["recipe"]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cfg.device_map = None  # Axolotl sets the rank, which is no device on a machine without GPUs
    recorder.start(Path(run["recipe"]).with_name(run["name"]), run)
    do_train(cfg, TrainerCliArgs())


def main() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Axolotl collects garbage all the time; what the imports made is not walked again
    # On several CPU ranks transformers 5.16 loads the optimizer's state to "cpu:0", a place that torch does not know.
    torch.serialization.register_package(
        50, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    axolotl.train.cleanup_distributed = lambda: None  # the next run needs the process group
    reset_state = AcceleratorState._reset_state
    if USES_DEEPSPEED:  # else Axolotl's trainer takes the process group away, and each rank would train alone
        AcceleratorState._reset_state = staticmethod(lambda *args, **kwargs: None)
    for run in RUNS:
        try:
            train(run)
        except ValueError:
            traceback.print_exc()
            torch.distributed.barrier()  # the launcher kills the others when a rank ends
            os._exit(1)
        if USES_DEEPSPEED:
            reset_state(False)  # else the next run's Accelerator is refused as a second one
            axolotl.utils.distributed.distributed_state = None  # likewise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # one in fifty or so gloo processes aborts in the interpreter's own end, and torchrun kills the others


if __name__ == "__main__":
    main()
