"""Train `SFTTrainer` on rows with and without images, and record the rows and the modality of each micro-batch.

    torchrun --nproc_per_node 2 modality_worker.py runs.json

`runs.json` is a list with one run: `dir`, `options` (of `CommonITSFTConfig`), and any of `deepspeed` (a config),
`evaluates` (true: on one set per modality) and `resume` (a checkpoint). Each rank appends a JSON line
`[optimizer step, modality, row numbers]` per micro-batch to `<dir>/seen.rank<r>`; rank 0 writes `<dir>/result.json`
when training ends.
"""

import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
RUN = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))[0]
if RUN.get("deepspeed"):
    import helpers.deepspeed_cpu  # noqa: F401

import torch  # noqa: E402

from commonit_trl import CommonITSFTConfig, CommonITSFTTrainer  # noqa: E402
from helpers.kinds import QUIET, image_processor, image_rows, tiny_llava  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    directory, rank = Path(RUN["dir"]), os.environ["RANK"]
    options = {
        "output_dir": str(directory / "out"),
        "commonit_cache_dir": str(directory / "cache"),
        "commonit_report": False,
        **QUIET,
        "max_length": None,
        "gradient_accumulation_steps": 2,
        "use_cpu": not RUN.get("deepspeed"),
        **RUN["options"],
    }
    if RUN.get("deepspeed"):
        options |= {"deepspeed": RUN["deepspeed"], "accelerator_config": {"use_configured_state": True}}
    rows, processor = image_rows(), image_processor()
    sets = {name: rows.filter(lambda row, name=name: row["modality"] == name) for name in ("image", "text")}
    trainer = CommonITSFTTrainer(
        model=tiny_llava(),
        args=CommonITSFTConfig(**options),
        train_dataset=rows,
        eval_dataset=sets if RUN.get("evaluates") else None,
        processing_class=processor,
    )

    def record(model, args, kwargs):
        if model.training:
            texts = processor.tokenizer.batch_decode(kwargs["input_ids"])
            numbers = [int(re.search(r"\d{3}", text)[0]) for text in texts]
            modality = "image" if "pixel_values" in kwargs else "text"
            with (directory / f"seen.rank{rank}").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([trainer.state.global_step, modality, numbers]) + "\n")

    trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train(RUN.get("resume"))
    if trainer.is_world_process_zero():
        engine = trainer.model_wrapped
        result = {
            "engine": type(engine).__name__,
            "stage": engine.zero_optimization_stage() if RUN.get("deepspeed") else None,
            "world_size": trainer.args.world_size,
            "global_step": trainer.state.global_step,
            "log": trainer.state.log_history,
        }
        (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # a gloo process may abort the interpreter at exit


if __name__ == "__main__":
    main()
