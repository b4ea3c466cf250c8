"""Write a recipe for one of the paper's runs: a model, a dataset and a metric, for TRL or Axolotl.

    python example_configs/paper/make_recipes.py --model qwen2-7b --data flan --metric length

Differences between runs are in `MODELS`, `DATASETS` and `METRICS`; the two templates hold everything else. `# ours`
marks a setting whose value in the paper is unknown; README.md gives the reason for each.
"""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NoReturn

FOLDER = Path("example_configs/paper")
GPUS = 4
SHIPPED = ("llama-7b", "flan")
"""Model and dataset of the recipes in this folder, one for each front end and metric."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the paper and its training settings; the defaults come from the authors' script for 7B.

    Attributes:
        name: the paper's spelling.
        hub: repository on the Hugging Face hub.
        per_device: samples per GPU and micro-step.
        learning_rate: peak learning rate, as YAML.
        gpus: number of GPUs, as YAML with a comment.
        deepspeed: DeepSpeed config, as YAML with a comment. The script for 7B uses FSDP with full sharding; ZeRO-3 is
            the closest to it.
        attention: attention implementation for Axolotl.
    """

    name: str
    hub: str
    per_device: int = 8
    learning_rate: str = "5.0e-6"
    gpus: str = str(GPUS)
    deepspeed: str = "zero3.json  # ours"
    attention: str = "sdpa"


MODELS = {
    "llama-7b": Model(name="LLaMA 7B", hub="huggyllama/llama-7b"),
    "llama-13b": Model(
        name="LLaMA 13B",
        hub="huggyllama/llama-13b",
        per_device=4,
        learning_rate="2.5e-6",
        gpus=f"{GPUS}  # ours",
        deepspeed="zero2.json",
    ),
    "llama2-7b": Model(name="LLaMA2-7B", hub="meta-llama/Llama-2-7b-hf"),
    "qwen2-7b": Model(name="Qwen2-7B", hub="Qwen/Qwen2-7B"),
    "bloom-7b": Model(name="BLOOM-7B", hub="bigscience/bloom-7b1", attention="eager"),  # BLOOM supports no other
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
    "none": "commonit_metric: none",
}

TRL = """\
# The CommonIT paper: {title}. From the repository's root:
#   commonit sft --config {path}
# Written by example_configs/paper/make_recipes.py. README.md there describes the data and each setting marked `ours`.
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
deepspeed: example_configs/deepspeed/{model.deepspeed}
seed: 42  # ours

output_dir: out/paper/trl/{run}
save_strategy: steps
save_steps: 500
save_total_limit: 1
logging_steps: 1
"""

AXOLOTL = """\
# The CommonIT paper: {title}. From the repository's root:
#   axolotl preprocess {path}
#   axolotl train {path} --launcher torchrun -- --nproc_per_node {gpus}
# Written by example_configs/paper/make_recipes.py. README.md there describes the data and each setting marked `ours`.
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
deepspeed: example_configs/deepspeed/{model.deepspeed}
seed: 42  # ours

output_dir: out/paper/axolotl/{run}
save_strategy: steps
save_steps: 500
save_total_limit: 1
logging_steps: 1
"""

FRONT_ENDS = {"trl": (TRL, "yaml"), "axolotl": (AXOLOTL, "yml")}


def recipe_name(front_end: str, model: str, data: str, metric: str) -> str:
    """Return the path of a recipe below its folder."""
    return f"{front_end}/{model}-{data}-{metric}.{FRONT_ENDS[front_end][1]}"


def make_recipe(front_end: str, model: str, data: str, metric: str, path: Path) -> str:
    """Write out one recipe as YAML text.

    Args:
        front_end: a key of `FRONT_ENDS`.
        model: a key of `MODELS`.
        data: a key of `DATASETS`.
        metric: a key of `METRICS`.
        path: file for the recipe, relative to the repository's root; its commands name it.
    """
    return FRONT_ENDS[front_end][0].format(
        title=f"{MODELS[model].name} on {DATASETS[data]}, {'baseline' if metric == 'none' else f'grouped by {metric}'}",
        path=shlex.quote(path.as_posix()),
        run=f"{model}-{data}-{metric}",
        model=MODELS[model],
        data=data,
        metric=METRICS[metric].format(step=GPUS * MODELS[model].per_device),
        gpus=GPUS,
    )


def shipped_recipes() -> dict[Path, str]:
    """Map the path of each recipe in this folder to its text."""
    runs = [(front_end, *SHIPPED, metric) for front_end, metric in product(FRONT_ENDS, METRICS)]
    return {path: make_recipe(*run, path) for run in runs for path in [FOLDER / recipe_name(*run)]}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """Write the recipe that `argv` (default: the arguments of the process) describes."""
    values: dict[str, Iterable[str]] = {
        "--model": MODELS,
        "--data": DATASETS,
        "--metric": METRICS,
        "--front-end": FRONT_ENDS,
    }
    parser = _Parser(prog="make_recipes.py", description="Write a recipe for one of the paper's runs.")
    for option, valid in values.items():
        parser.add_argument(option, default="trl" if option == "--front-end" else None, help=", ".join(valid))
    parser.add_argument(
        "--output", type=Path, help="file to write; default: out/paper/recipes/FRONT_END/MODEL-DATA-METRIC.yaml or .yml"
    )
    parser.add_argument("--list", action="store_true", help="print the valid values and exit")
    parser.add_argument("--shipped", action="store_true", help=f"rewrite the recipes in {FOLDER} and exit")
    options = parser.parse_args(argv)
    if options.list:
        for option, valid in values.items():
            print(f"{option}: {', '.join(valid)}")
        return
    if options.shipped:
        recipes = shipped_recipes()
    else:
        run = {}
        for option, valid in values.items():
            name = option[2:].replace("-", "_")
            run[name] = getattr(options, name)
            if run[name] not in valid:
                problem = f"{option}: missing" if run[name] is None else f"{option}={run[name]}: unknown value"
                parser.error(f"{problem}. Use one of {', '.join(valid)}.")
        path = options.output or Path("out/paper/recipes", recipe_name(**run))
        recipes = {path: make_recipe(**run, path=path)}
    for path, text in recipes.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            parser.error(f"--output={path}: {error.strerror}. Name a file that can be written.")
        print(path)


if __name__ == "__main__":
    main()
