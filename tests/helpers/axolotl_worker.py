"""Train Axolotl recipes one after the other, as `axolotl train` does, and record the model's inputs.

    python axolotl_worker.py runs.json          torchrun --nproc_per_node 2 axolotl_worker.py runs.json

`runs.json` is a list of runs, each with `recipe` (path of a YAML file), `name` (of the output files beside it), and any
of: `rank_recipes` (rank -> its own recipe), `kill_at` (optimizer step in which this process kills itself), `arrange_by`
("nothing" or "noise": lengths by which steps are balanced, instead of the rows' own), `engine` ("deepspeed" or "fsdp2",
the same in all runs: a real one on CPU). If a rank refuses a run, the worker waits until all ranks do. Each run writes
`<name>.ids.rank*` (a JSON line per micro-step: optimizer step, row numbers, tokens), and on rank 0
`<name>.gradient.safetensors` (of the first step) and `<name>.json`.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":  # datasets starts processes that import this file to save rows
    RUNS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (ENGINE,) = {run.get("engine") for run in RUNS}
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    if ENGINE == "deepspeed":  # on CPU: `ACCELERATE_USE_CPU` would make transformers ignore the DeepSpeed config
        os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
        import deepspeed
        from accelerate import PartialState

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # otherwise DeepSpeed compiles it first, for a minute
        )
        PartialState(backend="gloo")
    elif ENGINE is None:
        os.environ["ACCELERATE_USE_CPU"] = "1"

    import axolotl.train
    import axolotl.utils.distributed
    import torch
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager

    from helpers import axolotl_recorder as recorder
    from helpers import fsdp_cpu
    from helpers.toys import accept_cpu_ranks


def train(run: dict) -> None:
    PluginManager.get_instance().plugins.clear()  # it keeps the plugins of the last recipe
    cfg = load_cfg(run.get("rank_recipes", {}).get(os.environ.get("RANK"), run["recipe"]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cfg.device_map = None  # Axolotl sets the rank, which is no valid device without GPUs
    recorder.start(Path(run["recipe"]).with_name(run["name"]), run)
    do_train(cfg, TrainerCliArgs())


def main() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Axolotl collects garbage often; skip the objects of the imports
    accept_cpu_ranks()
    axolotl.train.cleanup_distributed = lambda: None  # the next run needs the process group
    reset_state = AcceleratorState._reset_state
    if ENGINE:  # otherwise Axolotl's trainer resets the process group, and each rank trains alone
        AcceleratorState._reset_state = staticmethod(lambda *args, **kwargs: None)
    build_mesh = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda config, device: build_mesh(config, "cpu")  # Axolotl asks for "cuda"
    for run in RUNS:
        if ENGINE == "fsdp2":
            fsdp_cpu.enable()
        try:
            train(run)
        except ValueError:
            traceback.print_exc()
            torch.distributed.barrier()  # the launcher kills the other ranks when one ends
            os._exit(1)
        if ENGINE:
            reset_state(False)  # otherwise accelerate refuses a second Accelerator
            axolotl.utils.distributed.distributed_state = None  # likewise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # about one in fifty gloo processes aborts at exit, and torchrun kills the others


if __name__ == "__main__":
    main()
