"""Train on two CPU workers of Ray and record the rows that each worker's model sees.

    python ray_worker.py trl RECORD [options of examples/ray_train.py]
    python ray_worker.py axolotl RECORD RECIPE

`RECORD.rank<r>` (TRL, `RECORD` followed by the number of the attempt) and `RECORD.ids.rank<r>` (Axolotl) have the rows.
Rank 1 of the first attempt of TRL kills itself before step `KILL_AT`.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
EXAMPLE = TESTS.parent / "examples" / "ray_train.py"
KILL_AT = 7


def kill(step: int) -> None:
    if step == KILL_AT and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def recorded(train: Any, record: str) -> Any:
    """Return `train` of the example with a recorder, and a killer in the first attempt."""

    def train_recorded(options: list[str]) -> None:
        from transformers import TrainerCallback

        from commonit_trl import CommonITSFTTrainer
        from helpers.toys import Recorder

        original = CommonITSFTTrainer.train

        class Killer(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                kill(state.global_step)

        def train_trainer(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            resumed = kwargs["resume_from_checkpoint"] is not None
            Recorder(f"{record}{int(resumed)}").attach(trainer)
            if not resumed:
                trainer.add_callback(Killer())
            return original(trainer, *args, **kwargs)

        CommonITSFTTrainer.train = train_trainer
        try:
            train(options)
        finally:
            CommonITSFTTrainer.train = original

    return train_recorded


def run_trl(record: str, options: list[str]) -> None:
    from ray.train import torch as ray_torch

    make = ray_torch.TorchTrainer
    ray_torch.TorchTrainer = lambda train, **keys: make(recorded(train, record), **keys)
    sys.argv = [str(EXAMPLE), *options]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def run_axolotl(record: str, recipe: str) -> None:
    import ray
    import ray.train
    from axolotl.cli.train import do_cli

    scaling = ray.train.ScalingConfig

    def on_cpu(num_workers: int, **keys: Any) -> Any:  # Axolotl always reserves GPUs
        return scaling(num_workers=num_workers, use_gpu=False, resources_per_worker={"CPU": 1})

    ray.train.ScalingConfig = on_cpu
    os.environ["COMMONIT_TEST_RECORD"] = record
    sys.argv = sys.argv[:1]
    ray.init(num_cpus=3)
    do_cli(recipe)


if __name__ == "__main__":
    front_end, record, *rest = sys.argv[1:]
    if front_end == "trl":
        run_trl(record, rest)
    else:
        run_axolotl(record, *rest)
