"""Trains `CommonITSFTTrainer` (or a parent trainer) on `id_rows`, recording what the model sees; one launch, many runs.

    python train_worker.py runs.json            torchrun --nproc_per_node 2 train_worker.py runs.json

`runs.json` is a list of runs, each with `name`, `dir`, `group_sizes` and any of: `options` (of `CommonITSFTConfig`),
`model`, `trainer` ("sft" or "parent"), `resume` (path), `deepspeed` (a config: then a real engine on CPU is asserted),
`kill_at` (optimizer step in whose first micro-step this process kills itself), `seed_rows`. Each run leaves
`<dir>/<name>.ids.rank*`, `<dir>/<name>.safetensors` (final weights, rank 0) and `<dir>/<name>.json`.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
USES_DEEPSPEED = any(run.get("deepspeed") for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
if USES_DEEPSPEED:  # a real engine on CPU: `use_cpu=True` would make transformers ignore the DeepSpeed config
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    from accelerate import PartialState

    PartialState(backend="gloo")

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from toys import Recorder, id_rows, tiny_model, tiny_tokenizer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer  # noqa: E402


class KillAt(TrainerCallback):
    """SIGKILL to this process, after the first micro-step of an optimizer step has been seen."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):  # with accumulation 1 there is no sub-step
        if state.global_step == self.step + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: dict) -> None:
    directory = Path(run["dir"])
    options = {
        "output_dir": str(directory / f"{run['name']}-out"),
        "use_cpu": not USES_DEEPSPEED,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": None,
        **run.get("options", {}),
    }
    if run.get("deepspeed"):
        options |= {"deepspeed": run["deepspeed"], "accelerator_config": {"use_configured_state": True}}
    if run.get("trainer") == "parent":
        config, trainer_class = SFTConfig(**options), SFTTrainer
    else:
        options.setdefault("commonit_cache_dir", str(directory / "cache"))
        config, trainer_class = CommonITSFTConfig(**options), CommonITSFTTrainer
    trainer = trainer_class(
        model=tiny_model(run.get("model", "llama")),
        args=config,
        train_dataset=id_rows(run["group_sizes"], seed=run.get("seed_rows", 0)),
        processing_class=tiny_tokenizer(),
    )
    Recorder(directory / f"{run['name']}.ids").attach(trainer)
    if "kill_at" in run:
        trainer.add_callback(KillAt(run["kill_at"]))
    trainer.train(resume_from_checkpoint=run.get("resume"))

    result = {"world_size": trainer.args.world_size, "global_step": trainer.state.global_step}
    if USES_DEEPSPEED:
        result["engine"] = type(trainer.model_wrapped).__name__
        result["stage"] = trainer.model_wrapped.zero_optimization_stage()
    result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective with ZeRO-3
    if trainer.is_world_process_zero():
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, directory / f"{run['name']}.safetensors")
        (directory / f"{run['name']}.json").write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(run)
        if USES_DEEPSPEED:
            AcceleratorState._reset_state(False)  # the next run may have another stage
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
