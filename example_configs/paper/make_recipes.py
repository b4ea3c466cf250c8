"""Writes the 90 recipes of this folder: each model, dataset and metric of the paper, for TRL and for Axolotl.

    python example_configs/paper/make_recipes.py

What differs between the runs stands in `MODELS`, `DATASETS` and `METRICS`; what they share, in the two templates. A
setting of which the authors' value is not known ends in `# ours`; README.md tells why each is what it is.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent
GPUS = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the paper and how it is trained; the defaults are those of the authors' script for 7B.

    Attributes:
        shards: the DeepSpeed config. The script for 7B has FSDP's full sharding, to which ZeRO-3 is the closest.
    """

    name: str
    hub: str
    per_device: int = 8
    learning_rate: str = "5.0e-6"
    gpus: str = str(GPUS)
    shards: str = "zero3.json  # ours"
    attention: str = "sdpa"


MODELS = {
    "llama-7b": Model(name="LLaMA 7B", hub="huggyllama/llama-7b"),
    "llama-13b": Model(
        name="LLaMA 13B",
        hub="huggyllama/llama-13b",
        per_device=4,
        learning_rate="2.5e-6",
        gpus=f"{GPUS}  # ours",
        shards="zero2.json",
    ),
    "llama2-7b": Model(name="LLaMA2-7B", hub="meta-llama/Llama-2-7b-hf"),
    "qwen2-7b": Model(name="Qwen2-7B", hub="Qwen/Qwen2-7B"),
    "bloom-7b": Model(name="BLOOM-7B", hub="bigscience/bloom-7b1", attention="eager"),  # it has no other
}
DATASETS = {"flan": "FLAN", "cot": "CoT", "alpaca": "Alpaca"}
METRICS = {
    "task": """\
commonit_metric: task
commonit_task_column: task
commonit_min_group_size: {step}  # ours""",
    "length": """\
commonit_metric: length
commonit_num_groups: 8  # ours
commonit_length_of: response""",
    "embedding": """\
commonit_metric: embedding
commonit_reference_dataset: out/paper/data/mmlu_dev.jsonl
commonit_embedding_model: sentence-transformers/all-MiniLM-L6-v2  # ours
commonit_embedding_text: prompt  # ours
commonit_min_group_size: {step}  # ours""",
}

TRL = """\
# {title}: a run of the CommonIT paper. From the repository's root:
#   commonit sft --config {path}
# Made by make_recipes.py. README.md says how the data are made, and explains each setting that is marked as ours.
{metric}

model_name_or_path: {model.hub}
dataset_name: out/paper/data/{data}.jsonl  # ours
max_length: 2048

num_train_epochs: 3
num_processes: {model.gpus}
per_device_train_batch_size: {model.per_device}
gradient_accumulation_steps: 1
learning_rate: {model.learning_rate}
lr_scheduler_type: linear
warmup_steps: 0.03
weight_decay: 0.0
bf16: true
tf32: true
deepspeed: example_configs/deepspeed/{model.shards}
seed: 42  # ours

output_dir: out/paper/trl/{run}
save_strategy: steps
save_steps: 500
save_total_limit: 1
logging_steps: 1
"""

AXOLOTL = """\
# {title}: a run of the CommonIT paper. From the repository's root:
#   axolotl preprocess {path}
#   axolotl train {path} --launcher torchrun -- --nproc_per_node {gpus}
# Made by make_recipes.py. README.md says how the data are made, and explains each setting that is marked as ours.
plugins:
  - axolotl_plugin.CommonITPlugin
{metric}

base_model: {model.hub}
attn_implementation: {model.attention}  # ours
datasets:
  - path: out/paper/data/{data}.jsonl  # ours
    type: {{field_instruction: prompt, field_output: completion, format: "{{instruction}}"}}  # ours
dataset_prepared_path: out/paper/axolotl/prepared
sequence_len: 2048
excess_length_strategy: truncate

num_epochs: 3
micro_batch_size: {model.per_device}
gradient_accumulation_steps: 1
learning_rate: {model.learning_rate}
lr_scheduler: linear
warmup_ratio: 0.03
weight_decay: 0.0
optimizer: adamw_torch  # ours
bf16: true
tf32: true
gradient_checkpointing: true
deepspeed: example_configs/deepspeed/{model.shards}
seed: 42  # ours

output_dir: out/paper/axolotl/{run}
save_strategy: steps
save_steps: 500
save_total_limit: 1
logging_steps: 1
"""

FRONT_ENDS = {"trl": (TRL, "yaml"), "axolotl": (AXOLOTL, "yml")}


def recipes() -> dict[str, str]:
    """The text of each recipe, by its path in this folder."""
    made = {}
    for front_end, run in product(FRONT_ENDS, product(MODELS, DATASETS, METRICS)):
        template, suffix = FRONT_ENDS[front_end]
        model, data, metric = run
        path = f"{front_end}/{'-'.join(run)}.{suffix}"
        made[path] = template.format(
            title=f"{MODELS[model].name} on {DATASETS[data]}, in groups by {metric}",
            path=f"example_configs/paper/{path}",
            run="-".join(run),
            model=MODELS[model],
            data=data,
            metric=METRICS[metric].format(step=GPUS * MODELS[model].per_device),
            gpus=GPUS,
        )
    return made


if __name__ == "__main__":
    for path, text in recipes().items():
        place = FOLDER / path
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")
    print(f"{len(recipes())} recipes are in {FOLDER}.")
