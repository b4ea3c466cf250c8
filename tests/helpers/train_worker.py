"""Train `CommonITSFTTrainer` on `id_rows` and record the rows that the model sees; one launch, many runs.

    python train_worker.py runs.json            torchrun --nproc_per_node 2 train_worker.py runs.json

`runs.json` is a list of runs, each with `name`, `dir`, `group_sizes` and any of: `options` (of `CommonITSFTConfig`),
`model`, `dropout`, `eval_sizes` (groups of an evaluation set), `resume` (path), `deepspeed` (a config), `kill_at`
(optimizer step in which this process kills itself), `losses` (true: record each row's loss), `accepts_loss_kwargs` (an
attribute of the model). Each run writes `<dir>/<name>.ids.rank*` (see `toys.Recorder`) and, on rank 0,
`<name>.safetensors` (final weights) and `<name>.json`.
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
    import deepspeed
    from accelerate import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first, for a minute
    PartialState(backend="gloo")

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer  # noqa: E402
from helpers.toys import QUIET, Recorder, id_rows, tiny_model, tiny_tokenizer  # noqa: E402


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
        **QUIET,
        "use_cpu": not USES_DEEPSPEED,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        **run.get("options", {}),
    }
    if run.get("deepspeed"):
        options |= {"deepspeed": run["deepspeed"], "accelerator_config": {"use_configured_state": True}}
    options = {"commonit_cache_dir": str(directory / "cache"), "commonit_report": False, **options}
    rows = id_rows(run["group_sizes"])
    model = tiny_model(run.get("model", "llama"), dropout=run.get("dropout", 0.0))
    if "accepts_loss_kwargs" in run:
        model.accepts_loss_kwargs = run["accepts_loss_kwargs"]
    trainer = CommonITSFTTrainer(
        model=model,
        args=CommonITSFTConfig(**options),
        train_dataset=rows,
        eval_dataset=id_rows(run["eval_sizes"], seed=1) if "eval_sizes" in run else None,
        processing_class=tiny_tokenizer(),
    )
    Recorder(directory / f"{run['name']}.ids", run.get("losses", False)).attach(trainer)
    if "kill_at" in run:
        trainer.add_callback(KillAt(run["kill_at"]))
    trainer.train(resume_from_checkpoint=run.get("resume"))

    result = {"world_size": trainer.args.world_size, "global_step": trainer.state.global_step}
    if USES_DEEPSPEED:
        result["engine"] = type(trainer.model_wrapped).__name__
        result["stage"] = trainer.model_wrapped.zero_optimization_stage()
    result["log"] = trainer.state.log_history
    result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective with ZeRO-3
    if trainer.is_world_process_zero():
        weights = {name: value.contiguous().clone() for name, value in weights.items()}
        save_file(weights, directory / f"{run['name']}.safetensors")
        (directory / f"{run['name']}.json").write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    # On several CPU ranks transformers 5.16 loads the optimizer's state to "cpu:0", a place that torch does not know.
    torch.serialization.register_package(
        50, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(run)
        if USES_DEEPSPEED:
            AcceleratorState._reset_state(False)  # else the next run's Accelerator is refused as a second one
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # one in fifty or so gloo processes aborts in the interpreter's own end, and torchrun kills the others


if __name__ == "__main__":
    main()
