"""Train an epoch of real instruction data with Axolotl by task, packed or not, and compare with its own batches.

Steps: (1) write a random slice of the mixture (GSM8K, CodeAlpaca, APIBench), in which every task keeps its share, as
three entries of `datasets:`; (2) train a byte-level BPE on the mixture and make a tiny random Llama; (3) train one
epoch of each recipe below through Axolotl's entry points, with the plugin and without; (4) identify rows by the tokens
of the model's forward pass, their tasks by the responses, and count; (5) let Axolotl prepare the whole mixture, and
pack it as the plugin does and as Axolotl does, in several geometries; (6) write a report.

    python -m benchmarks axolotl_real_data --data FOLDER --set rows=1000

Cost: some minutes of one CPU core for 1,000 rows; nothing is downloaded.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

os.environ |= {"ACCELERATE_USE_CPU": "1", "AXOLOTL_DO_NOT_TRACK": "1"}

from benchmarks.common import Report, Settings, Skipped, Table, installed
from benchmarks.mixture import (
    FILES,
    VOCABULARY,
    read_mixture,
    reuse_freed_memory,
    stratified_slice,
    tiny_llama,
    train_tokenizer,
)
from benchmarks.real_data import pure_share

TITLE = "One epoch on real data with Axolotl"
SIZES = {"quick": {"rows": 300}, "full": {"rows": 1_000}}
SEQUENCE_LEN = 2048
PLUGIN_LINES = {"plugins": ["axolotl_plugin.CommonITPlugin"], "commonit_metric": "task"}
PACKED = {"sample_packing": True, "micro_batch_size": 2}
RECIPES = {
    "unpacked": {"micro_batch_size": 8},
    "packed": {**PACKED, "multipack_real_batches": False},
    "packed, multipack_real_batches": {**PACKED, "multipack_real_batches": True},
}
ACCUMULATION_STEPS = 2
MICRO_BATCH_SIZES = (1, 2, 8)
MICRO_BATCHES_PER_STEP = (1, 8, 32)  # ranks x gradient accumulation
PACKER = {"group_size": 100_000, "bin_size": 200, "num_processes": 1, "mp_start_method": "fork"}  # Axolotl's defaults


# --- data and recipes -------------------------------------------------------------------------------------------------


def write_entries(data: Path, folder: Path, count: int | None, seed: int = 0) -> list[dict[str, Any]]:
    """Write a slice of `count` rows (None: all), split like the data files, and return its rows."""
    rows = []
    for file in FILES:
        with (data / file).open(encoding="utf-8") as stream:
            rows += [{"file": file, **json.loads(line)} for line in stream]
    if count is not None:
        rows = stratified_slice(rows, count, seed)
    folder.mkdir(parents=True)
    for file in FILES:
        lines = (json.dumps(row) + "\n" for row in rows if row["file"] == file)
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return rows


def write_recipe(folder: Path, name: str, keys: dict[str, Any]) -> Path:
    """Write a recipe of one epoch over the files in `folder`, with the model in its parent directory."""
    recipe = {
        "base_model": str(folder.parent / "model"),
        "special_tokens": {"pad_token": "<pad>"},
        "datasets": [{"path": str(folder / file), "type": "alpaca"} for file in FILES],
        "dataset_prepared_path": str(folder / "prepared" / name),
        "dataset_num_proc": 1,
        "sequence_len": SEQUENCE_LEN,
        "gradient_accumulation_steps": ACCUMULATION_STEPS,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "logging_steps": 1_000,
        "save_strategy": "no",
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 0,
        "output_dir": str(folder / "out" / name),
        **keys,
    }
    if "commonit_metric" in keys:
        recipe["commonit_cache_dir"] = str(folder / "groups")
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


# --- training and what it saw -----------------------------------------------------------------------------------------


def train_epoch(recipe: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Train a recipe as `axolotl train` does, and return figures of the rows in the model's forward passes."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import BasePlugin, PluginManager
    from transformers import TrainerCallback

    class Recorder(BasePlugin, TrainerCallback):
        """Identify rows by the tokens of the forward pass, independent of sampler, collator and columns."""

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            self.trainer = trainer
            self.padding = trainer.processing_class.pad_token_id
            self.tokens = [tuple(ids) for ids in trainer.train_dataset["input_ids"]]
            self.row_of_tokens = {tokens: row for row, tokens in enumerate(self.tokens)}
            if len(self.row_of_tokens) < len(self.tokens):
                raise ValueError("Two rows have the same tokens: remove one of them.")
            self.steps: list[list[int]] = []
            self.padded_tokens = 0
            trainer.add_callback(self)
            trainer.model.register_forward_pre_hook(self.record, with_kwargs=True)

        def record(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
            if self.trainer.state.global_step == len(self.steps):
                self.steps.append([])
            for number, ids in enumerate(inputs["input_ids"]):
                starts = [0]
                if "position_ids" in inputs:
                    starts = (inputs["position_ids"][number] == 0).nonzero().flatten().tolist()
                for start, end in zip(starts, [*starts[1:], len(ids)]):
                    tokens = tuple(token for token in ids[start:end].tolist() if token != self.padding)
                    if tokens:
                        self.steps[-1].append(self.row_of_tokens[tokens])
            self.padded_tokens += inputs["input_ids"].numel()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.process_time() - self.start

    manager = PluginManager.get_instance()
    manager.plugins.clear()  # a singleton with the plugins of the previous recipe
    cfg = load_cfg(str(recipe))
    recorder = manager.plugins["recorder"] = Recorder()
    do_train(cfg, TrainerCliArgs())

    # Find tasks by the responses: Axolotl shuffles rows and drops their columns.
    task_of_output = {row["output"].strip(): row["task"] for row in rows}
    dataset, tokenizer = recorder.trainer.train_dataset, recorder.trainer.processing_class
    responses = ([token for token in labels if token != -100] for labels in dataset["labels"])
    tasks = [task_of_output[tokenizer.decode(ids, skip_special_tokens=True).strip()] for ids in responses]
    times_seen = np.bincount(np.concatenate(recorder.steps), minlength=len(tasks))
    tokens_of_row = np.array([len(tokens) for tokens in recorder.tokens])
    return {
        "steps": len(recorder.steps),
        "pure_steps": pure_share(recorder.steps, np.unique(tasks, return_inverse=True)[1]),
        "rows": len(tasks),
        "lost": int((times_seen == 0).sum()),
        "repeated": int(np.maximum(times_seen - 1, 0).sum()),
        "cost": recorder.padded_tokens / int(times_seen @ tokens_of_row),
        "train_seconds": round(recorder.seconds, 1),
    }


def train_all(rows: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of all RECIPES, with the plugin (`ours`) and without (`axolotl`)."""
    results: dict[str, dict[str, Any]] = {}
    for number, (name, keys) in enumerate(RECIPES.items()):
        results[name] = {}
        for whose, lines in (("axolotl", {}), ("ours", PLUGIN_LINES)):
            results[name][whose] = train_epoch(write_recipe(folder, f"{number}-{whose}", keys | lines), rows)
    return results


# --- packing ----------------------------------------------------------------------------------------------------------


def prepare(recipe: Path) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Let Axolotl prepare a recipe's data; return (rows,) tokens and (rows,) group ids by task and by length."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager

    from commonit_trl.config import CommonITArguments
    from commonit_trl.grouping import build_grouper
    from commonit_trl.rows import Rows

    PluginManager.get_instance().plugins.clear()
    cfg = load_cfg(str(recipe))
    PluginManager.get_instance().load_datasets(cfg)  # the plugin's hook, as in `axolotl train`
    dataset = load_datasets(cfg=cfg).train_dataset
    [label] = [name for name in dataset.column_names if name.startswith("commonit_task[")]
    rows = Rows(dataset)
    by_length = build_grouper(CommonITArguments(commonit_metric="length"), dataset.column_names)
    groups = {
        "task": np.unique(dataset[label], return_inverse=True)[1],
        "length": by_length.fit_assign(by_length.read(rows)),
    }
    return rows.token_counts("total"), groups


def axolotls_efficiency(lengths: NDArray[np.int64], capacity: int, bins_per_micro_batch: int) -> float:
    """Return the filled share of the bins' capacity if Axolotl packs all rows together."""
    import torch
    from axolotl.utils.samplers import MultipackBatchSampler
    from torch.utils.data import RandomSampler

    order = RandomSampler(range(len(lengths)), generator=torch.Generator().manual_seed(0))
    return MultipackBatchSampler(
        order, bins_per_micro_batch, capacity, lengths, drop_last=True, sequential=False, **PACKER
    ).efficiency()


def our_efficiency(
    group_ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    capacity: int,
    bins_per_micro_batch: int,
    micro_batches_per_step: int,
) -> float:
    """Return the filled share of the bins in an epoch: each bin holds one group, and repeated bins count again."""
    from axolotl_plugin.packing import pack_groups
    from commonit_trl import plan_epoch

    bins = pack_groups(
        group_ids,
        lengths,
        capacity=capacity,
        bins_per_micro_batch=bins_per_micro_batch,
        micro_batches_per_partition=micro_batches_per_step,
        remainder="keep",
        seed=0,
        sequential=False,
        **PACKER,
    )
    plan = plan_epoch(
        bins.group_ids,
        bins.lengths,
        micro_batch_size=bins_per_micro_batch,
        accumulation_steps=micro_batches_per_step,
    )
    if not np.array_equal(np.unique(plan.indices), np.arange(len(bins.rows))):
        raise ValueError("The plan leaves out bins.")
    return float(lengths.sum() / (len(plan.indices) * capacity))


def pack_all(lengths: NDArray[np.int64], groups: dict[str, NDArray[np.int64]]) -> list[dict[str, Any]]:
    """Return the packing efficiency in each geometry: Axolotl's, and ours by metric and micro-batches per step."""
    results = []
    for micro_batch_size in MICRO_BATCH_SIZES:
        for real_batches in (False, True) if micro_batch_size > 1 else (False,):
            bins = micro_batch_size if real_batches else 1
            capacity = micro_batch_size // bins * SEQUENCE_LEN
            results.append(
                {
                    "micro_batch_size": micro_batch_size,
                    "multipack_real_batches": real_batches,
                    "axolotl": axolotls_efficiency(lengths, capacity, bins),
                    "ours": {
                        metric: {
                            str(count): our_efficiency(group_ids, lengths, capacity, bins, count)
                            for count in MICRO_BATCHES_PER_STEP
                        }
                        for metric, group_ids in groups.items()
                    },
                }
            )
    return results


# --- the report -------------------------------------------------------------------------------------------------------


def parts(trained: dict[str, dict[str, Any]], packed: list[dict[str, Any]]) -> Iterator[Table | str]:
    """Yield tables and explanations of their columns."""
    yield Table(
        heading="Seen by the model, one rank",
        header=[
            "recipe",
            "steps (Axolotl's)",
            "pure steps (Axolotl's)",
            "rows lost / repeated (Axolotl's)",
            "tokens computed per token (Axolotl's)",
            "CPU seconds (Axolotl's)",
        ],
        rows=[
            [
                name,
                f"{ours['steps']} ({plain['steps']})",
                f"{ours['pure_steps']:.1%} ({plain['pure_steps']:.1%})",
                f"{ours['lost']} / {ours['repeated']} ({plain['lost']} / {plain['repeated']})",
                f"{ours['cost']:.2f} ({plain['cost']:.2f})",
                f"{ours['train_seconds']:.1f} ({plain['train_seconds']:.1f})",
            ]
            for name, ours, plain in ((name, row["ours"], row["axolotl"]) for name, row in trained.items())
        ],
    )
    yield (
        "*Axolotl's*: the same recipe without `plugins:` and `commonit_metric:`, counted in the same way. "
        "*pure steps*: optimizer steps in which all rows have one task. *tokens computed*: with padding, for each "
        "token of the rows that are trained. *CPU seconds*: of training, without preparation."
    )
    yield Table(
        heading="Packing efficiency",
        header=["micro_batch_size", "Axolotl's"]
        + [f"by {metric}, {count}" for metric in packed[0]["ours"] for count in MICRO_BATCHES_PER_STEP],
        rows=[
            [
                f"{row['micro_batch_size']}{', multipack_real_batches' if row['multipack_real_batches'] else ''}",
                f"{row['axolotl']:.1%}",
                *(f"{share:.1%}" for metric in row["ours"].values() for share in metric.values()),
            ]
            for row in packed
        ],
    )
    yield (
        f"Filled share of the bins in an epoch, at `sequence_len: {SEQUENCE_LEN}`. "
        "*Axolotl's*: all rows packed together, by `MultipackBatchSampler.efficiency()`. *by task, 8*: each task "
        "packed alone, for steps of 8 micro-batches (ranks × `gradient_accumulation_steps`); likewise by response "
        "length, 8 groups. A step takes up to 8 × `micro_batch_size` × `sequence_len` tokens of one group, and the "
        "last step of a group holds its remaining bins."
    )


def run(settings: Settings) -> Report:
    if installed("axolotl") is None:
        raise Skipped("axolotl is not installed; CONTRIBUTING.md describes its environment")
    data = settings.data
    import torch

    torch.set_num_threads(1)
    reuse_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(read_mixture(data), VOCABULARY)
        tiny_llama(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = write_entries(data, folder / "slice", settings["rows"])
        trained = train_all(rows, folder / "slice")
        everything = write_entries(data, folder / "all", None)
        lengths, groups = prepare(write_recipe(folder / "all", "prepare", PLUGIN_LINES | {"micro_batch_size": 1}))
        packed = pack_all(lengths, groups)

    sizes = {name: np.bincount(group_ids).tolist() for name, group_ids in groups.items()}
    return Report(
        head={
            "data": f"{len(rows)} rows of GSM8K, CodeAlpaca and APIBench, each with its share, as Alpaca prompts in "
            f"three entries of datasets:; byte-level BPE of {len(tokenizer)} tokens",
            "training": f"one epoch of a random Llama of two layers, sequence_len {SEQUENCE_LEN}, "
            f"gradient_accumulation_steps {ACCUMULATION_STEPS}; unpacked: micro_batch_size "
            f"{RECIPES['unpacked']['micro_batch_size']}; packed: {PACKED['micro_batch_size']}",
            "packing": f"all {len(lengths)} of {len(everything)} rows with at most {SEQUENCE_LEN} tokens, "
            f"{lengths.sum()} tokens in all; rows of each group: {sizes}",
        },
        parts=list(parts(trained, packed)),
        results={"trained": trained, "packed": packed},
        packages=("axolotl",),
    )
