"""`commonit demo`: fine-tune a tiny model with each metric, on data and models that the demo makes itself.

Steps: (1) generate an instruction dataset of six task families by rule, train a byte-level BPE tokenizer on it, and
make a tiny Llama and a toy sentence-transformers encoder (random token vectors); (2) train with the metrics `task`,
`length` and `embedding`, from the same weights and rows; (3) print the groups, the batches beside random ones, and the
held-out loss before and after training.

Cost: about 40 s of one CPU core, 22 MB on disk; no GPU, no download.
"""

import argparse
import json
import random
import shlex
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from commonit_trl.cli import quiet
from commonit_trl.cli.quiet import Screen

METRICS = ("task", "length", "embedding")
NUM_GROUPS = 6  # with the metrics length and embedding
HELD_OUT_ROWS = 32  # per family
INITIAL_DIR = "initial"

Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    parser.add_argument("--output_dir", default="out/demo", help="directory for data and models (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=300, help="training steps per metric (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and batches (default: %(default)s)")
    quiet.add_arguments(parser)


def run(asked: argparse.Namespace, screen: Screen) -> int:
    """Make data and models, train with each metric, print a table, and return the exit code."""
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from commonit_trl.trainer.reports import inspect_run

    torch.set_num_threads(1)  # more do not speed up so small a model, and wait for each other on a busy machine
    screen.log_dir = output_dir = Path(asked.output_dir)
    console = Console(file=screen.stdout, highlight=False, markup=False, soft_wrap=True)
    train_rows, held_out_rows = generate_rows(asked.seed)
    write_rows(output_dir / "data", train_rows, held_out_rows)
    parameters = make_models(output_dir, train_rows, asked.seed)
    console.print(
        f"Made {len(train_rows):,} training rows of {len(FAMILIES)} task families, {len(held_out_rows)} held-out rows "
        f"and a Llama of {parameters / 1e6:.1f} million random weights in {output_dir}.\n"
        f"Training it {asked.max_steps} steps with each metric; every step holds one group:\n"
    )
    table = Table("Metric", box=box.SIMPLE_HEAD, title="In brackets: random batches")
    for column in ("Groups", "Steps per epoch", "Pure steps", "Padding ratio", "Held-out loss"):
        table.add_column(column, justify="right")
    for metric in METRICS:
        trainer = _make_trainer(metric, asked, train_rows, held_out_rows)
        console.print(f"{metric}: {', '.join(trainer.commonit_grouper.names)}")
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model()
        numbers = inspect_run(trainer)
        assert numbers is not None
        planned, random_order = numbers.planned, numbers.random
        table.add_row(
            metric,
            f"{len(numbers.groups)}",
            f"{planned.steps} ({random_order.steps})",
            f"{planned.pure_steps:.0%} ({random_order.pure_steps:.0%})",
            f"{planned.padding_ratio:.2f} ({random_order.padding_ratio:.2f})",
            f"{before:.2f} → {after:.2f}",
        )
    console.print("", table, sep="\n")
    model, data = (shlex.quote(str(output_dir / name)) for name in (INITIAL_DIR, "data"))
    console.print(
        f"{asked.max_steps} steps from random weights show the mechanism; they do not rank the metrics.\n"
        f"Models: {output_dir}/{{{','.join(METRICS)}}}, each with a report in commonit/report.html.\n\n"
        "Next, train on your own model and data, or on these:\n"
        "  commonit sft --commonit_metric length --output_dir out/sft \\\n"
        f"    --model_name_or_path {model} --dataset_name {data} \\\n"
        "    --dtype float32 --bf16 false --learning_rate 2e-3 --num_train_epochs 1"
    )
    return 0


def _make_trainer(metric: str, asked: argparse.Namespace, train_rows: list[Row], held_out_rows: list[Row]) -> Any:
    from datasets import Dataset

    from commonit_trl.trainer.sft import CommonITSFTConfig, CommonITSFTTrainer

    output_dir = Path(asked.output_dir)
    metric_options: dict[str, dict[str, Any]] = {
        "task": {},
        "length": {"commonit_num_groups": NUM_GROUPS},
        "embedding": {
            "commonit_num_groups": NUM_GROUPS,
            "commonit_embedding_model": str(output_dir / "encoder"),
        },
    }
    config = CommonITSFTConfig(
        commonit_metric=metric,
        commonit_cache_dir=str(output_dir / "cache"),
        **metric_options[metric],
        output_dir=str(output_dir / metric),
        max_steps=asked.max_steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        adam_beta2=0.98,
        warmup_steps=20,
        seed=asked.seed,
        use_cpu=True,  # the same result everywhere; a tiny model needs no GPU
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,
    )
    return CommonITSFTTrainer(
        model=str(output_dir / INITIAL_DIR),
        args=config,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows),
    )


# --- the data -----------------------------------------------------------------------------------------------


def _word(rng: random.Random, low: int, high: int, letters: str = string.ascii_uppercase) -> str:
    return "".join(rng.choices(letters, k=rng.randint(low, high)))


def _compare(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(range(10, 100), 2)
    return f"Which is larger, {first} or {second}?", str(max(first, second))


def _countdown(rng: random.Random) -> tuple[str, str]:
    seconds = rng.randint(2, 20)
    question = f"Rocket {_word(rng, 3, 3)} starts in {seconds} seconds. Count down."
    return question, " ".join(map(str, range(seconds, 0, -1)))


def _letters(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 2, 9)
    return f"How many letters are in {word}?", str(len(word))


def _parity(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(100, 9999)
    return f"Is {number} even or odd?", "odd" if number % 2 else "even"


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 3, 4, "ABCDEFGHIJ")
    return f"Reverse the word {word}.", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.sample(string.digits, rng.randint(3, 8))
    return f"Sort the digits {' '.join(digits)}.", " ".join(sorted(digits))


# Makes a question and its answer, and the number of training rows: as uneven as in real mixtures.
FAMILIES: dict[str, tuple[Callable[[random.Random], tuple[str, str]], int]] = {
    "compare": (_compare, 600),
    "countdown": (_countdown, 480),
    "letters": (_letters, 480),
    "parity": (_parity, 360),
    "reverse": (_reverse, 720),
    "sort": (_sort, 720),
}


def generate_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows with `task`, `prompt` and `completion`; every question is unique."""
    train, held_out = [], []
    for family, (make, count) in FAMILIES.items():
        rng = random.Random(f"{seed} {family}")
        answers: dict[str, str] = {}
        while len(answers) < count + HELD_OUT_ROWS:  # each family has several times as many questions
            question, answer = make(rng)
            answers[question] = answer
        rows = [{"task": family, "prompt": question, "completion": f" {answers[question]}"} for question in answers]
        train += rows[:count]
        held_out += rows[count:]
    return train, held_out


def write_rows(directory: Path, train: list[Row], held_out: list[Row]) -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", held_out)):
        lines = (json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# --- the models ---------------------------------------------------------------------------------------------


def make_models(output_dir: Path, rows: list[Row], seed: int) -> int:
    """Save a tokenizer, an untrained Llama and a sentence encoder; return the Llama's number of weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = _make_tokenizer([row["prompt"] + row["completion"] for row in rows])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,  # the default is for large models
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    set_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(output_dir / INITIAL_DIR)
    tokenizer.save_pretrained(output_dir / INITIAL_DIR)
    vectors = np.random.default_rng(seed).standard_normal((len(tokenizer), 64), dtype=np.float32)
    encoder = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)])
    encoder.save(str(output_dir / "encoder"), create_model_card=False)
    return model.num_parameters()


def _make_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Capital letters are single tokens, so that a model can spell; numbers do not merge with other text.
    pieces = pre_tokenizers.Split(Regex(" ?[A-Z](?![a-z])| ?[0-9]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=50,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )
