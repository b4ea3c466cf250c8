"""`commonit demo`: fine-tune a tiny model with each metric, on data and models that the demo makes itself.

Steps: (1) generate an instruction dataset of six task families by rule, train a byte-level BPE tokenizer on it, and
make a tiny Llama and a toy sentence-transformers encoder (random token vectors); (2) train with the metrics `task`,
`length` and `embedding`, from the same weights and rows; (3) print the purity and padding of the batches beside the
baseline's, and each group's held-out loss before and after training; (4) load a saved model and print its answers.

Cost: about 40 s of one CPU core, 22 MB on disk; no GPU, no download.
"""

import argparse
import json
import random
import shlex
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from commonit_trl.cli import quiet
from commonit_trl.cli.quiet import Screen
from commonit_trl.plan import EpochPlan, PlanSummary, plan_epoch

METRICS = ("task", "length", "embedding")
NUM_GROUPS = 6  # with the metrics length and embedding
HELD_OUT_ROWS = 32  # per family
MICRO_BATCH_SIZE = 16
ACCUMULATION_STEPS = 2
ANSWERED_METRIC = "task"
ANSWERS_PER_FAMILY = 2
INITIAL_DIR = "initial"

Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    parser.add_argument("--output_dir", default="out/demo", help="directory for data and models (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=300, help="training steps per metric (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and batches (default: %(default)s)")
    quiet.add_arguments(parser)


def check(arguments: argparse.Namespace) -> None:
    """Refuse options out of range, and make the output directory.

    Raises:
        ValueError: naming the option.
    """
    if arguments.max_steps < 1:
        raise ValueError(f"--max_steps {arguments.max_steps}: nothing to train. Give 1 or more.")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed {arguments.seed}: out of range. Give 0 to {2**32 - 1}.")
    try:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output_dir).close()
    except OSError as error:
        raise ValueError(
            f"--output_dir {arguments.output_dir}: cannot be written ({error.strerror}). Name a directory that this "
            "user may write."
        ) from error


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the demo and return the exit code.

    Args:
        arguments: the options of `add_arguments`, checked.
        screen: where to print.
    """
    from rich.console import Console

    started = time.perf_counter()
    screen.log_dir = output_dir = Path(arguments.output_dir)
    console = Console(file=screen.stdout, highlight=False)
    console.print("[bold]CommonIT demo[/]: a tiny model, trained with each metric.")
    _use_one_thread()
    train_rows, held_out_rows = generate_rows(arguments.seed)
    write_rows(output_dir / "data", train_rows, held_out_rows)
    parameters = make_models(output_dir, train_rows, arguments.seed)
    console.print(
        f"Generated {len(train_rows):,} training and {len(held_out_rows)} held-out rows of {len(FAMILIES)} task "
        f"families, a Llama of {parameters / 1e6:.1f} million random weights, and a toy encoder of random token "
        "vectors, which measures shared words, not meaning.\n"
    )
    results = _train_all(output_dir, arguments, train_rows, held_out_rows, console)
    questions = _sample(held_out_rows, ANSWERS_PER_FAMILY)
    answers = _answer(output_dir / ANSWERED_METRIC, [row["prompt"] for row in questions])
    console.print("", _batch_table(results), _loss_table(results), sep="\n")
    console.print(_answer_table(questions, answers))
    _print_end(console, output_dir, arguments.max_steps, time.perf_counter() - started)
    return 0


def _use_one_thread() -> None:
    """Use one thread: more do not speed up so small a model, and wait for each other on a busy machine."""
    import torch

    torch.set_num_threads(1)


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
    directory.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", held_out)):
        lines = (json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _sample(rows: list[Row], per_family: int) -> list[Row]:
    by_family = {family: [row for row in rows if row["task"] == family] for family in FAMILIES}
    return [row for family in by_family.values() for row in family[:per_family]]


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


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchQuality:
    """Purity and padding of an epoch."""

    pure_steps: float
    """Share of optimizer steps that hold one group."""
    padding: float
    """Share of the computed tokens that are padding."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One group: its training rows, their most frequent family, and its held-out loss."""

    name: str
    rows: int
    mostly: str
    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """The result of training with one metric."""

    metric: str
    summary: PlanSummary
    planned: BatchQuality
    baseline: BatchQuality
    """Of the same rows and groups in baseline batches of the same sizes."""
    groups: list[GroupResult]


def batch_quality(plan: EpochPlan, group_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> BatchQuality:
    """Measure the purity and padding of `plan`.

    Args:
        plan: an epoch.
        group_ids: (rows,) group of each row.
        lengths: (rows,) tokens of each row.
    """
    groups, tokens = group_ids[plan.indices], lengths[plan.indices]
    micro_batches = plan.offsets[:-1]
    steps = micro_batches[:: plan.world_size * plan.accumulation_steps]
    pure = np.minimum.reduceat(groups, steps) == np.maximum.reduceat(groups, steps)
    padded = np.maximum.reduceat(tokens, micro_batches) @ np.diff(plan.offsets)
    return BatchQuality(pure_steps=float(pure.mean()), padding=float(1 - tokens.sum() / padded))


def _train_all(
    output_dir: Path,
    arguments: argparse.Namespace,
    train_rows: list[Row],
    held_out_rows: list[Row],
    console: Any,
) -> list[MetricResult]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    # By default rich prints what libraries write to stdout and stderr, which goes to the log here.
    progress = Progress(*columns, console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)
    with progress:
        bars = {
            metric: progress.add_task(metric, total=arguments.max_steps, loss="-", start=False) for metric in METRICS
        }
        results = []
        for metric, bar in bars.items():
            progress.start_task(bar)
            trainer = _make_trainer(metric, output_dir, arguments, train_rows, held_out_rows)
            trainer.add_callback(_progress_callback(progress, bar))
            results.append(_train(trainer))
    return results


def _make_trainer(
    metric: str,
    output_dir: Path,
    arguments: argparse.Namespace,
    train_rows: list[Row],
    held_out_rows: list[Row],
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from commonit_trl.trainer.sft import CommonITSFTConfig, CommonITSFTTrainer

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
        max_steps=arguments.max_steps,
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION_STEPS,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        adam_beta2=0.98,
        warmup_steps=20,
        seed=arguments.seed,
        use_cpu=True,  # the same result everywhere; a tiny model needs no GPU
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,  # the demo has its own bars
    )
    trainer = CommonITSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(output_dir / INITIAL_DIR),
        processing_class=AutoTokenizer.from_pretrained(output_dir / INITIAL_DIR),
        args=config,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _progress_callback(progress: Any, bar: Any) -> Any:
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.advance(bar)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                progress.update(bar, loss=f"{float(logs['loss']):.2f}")

    return ProgressBar()


def _train(trainer: Any) -> MetricResult:
    from commonit_trl.rows import Rows

    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()

    group_ids, names = trainer.commonit_group_ids, trainer.commonit_grouper.names
    lengths = Rows(trainer.train_dataset).token_counts("total")
    plan = trainer.commonit_plan()
    baseline = plan_epoch(  # all rows in one group
        np.zeros_like(group_ids),
        micro_batch_size=plan.micro_batch_size,
        world_size=plan.world_size,
        accumulation_steps=plan.accumulation_steps,
        seed=trainer.args.seed,
    )
    families = np.asarray(trainer.train_dataset["task"])
    groups = []
    for group, name in enumerate(names):
        found, counts = np.unique(families[group_ids == group], return_counts=True)
        groups.append(
            GroupResult(
                name=name,
                rows=int(counts.sum()),
                mostly=f"{found[counts.argmax()]} {counts.max() / counts.sum():.0%}",
                loss_before=before.get(f"eval_{name}_loss", np.nan),
                loss_after=after.get(f"eval_{name}_loss", np.nan),
            )
        )
    return MetricResult(
        metric=trainer.args.commonit_metric,
        summary=plan.summary(),
        planned=batch_quality(plan, group_ids, lengths),
        baseline=batch_quality(baseline, group_ids, lengths),
        groups=groups,
    )


# --- the output ----------------------------------------------------------------------------------------


def _table(title: str, *, texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _batch_table(results: list[MetricResult]) -> Any:
    table = _table(
        f"An epoch in steps of {ACCUMULATION_STEPS} x {MICRO_BATCH_SIZE} rows (in brackets: random batches)",
        texts=("Metric",),
        numbers=("Groups", "Steps", "Pure\nsteps", "Padding", "Dropped", "Repeated"),
    )
    for result in results:
        table.add_row(
            result.metric,
            str(result.summary.num_groups),
            f"{result.summary.num_steps} ({result.summary.baseline_steps})",
            f"{result.planned.pure_steps:.0%} ({result.baseline.pure_steps:.0%})",
            f"{result.planned.padding:.0%} ({result.baseline.padding:.0%})",
            str(result.summary.left_out),
            str(result.summary.repeated),
        )
    return table


def _loss_table(results: list[MetricResult]) -> Any:
    table = _table(
        "Held-out loss of each group",
        texts=("Metric", "Group", "Mostly"),
        numbers=("Rows", "Before", "After"),
    )
    for result in results:
        for number, group in enumerate(result.groups):
            table.add_row(
                "" if number else result.metric,
                group.name,
                group.mostly,
                str(group.rows),
                f"{group.loss_before:.2f}",
                f"{group.loss_after:.2f}",
                end_section=number == len(result.groups) - 1,
            )
    return table


def _answer(directory: Path, questions: list[str]) -> list[str]:
    """Return the greedy answer of the saved model to each question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer.strip() for answer in answers]
    return [answer if answer.isprintable() else repr(answer) for answer in answers]


def _answer_table(questions: list[Row], answers: list[str]) -> Any:
    from rich.text import Text

    expected = [row["completion"].strip() for row in questions]
    correct = [answer == target for answer, target in zip(answers, expected, strict=True)]
    table = _table(
        f"Held-out questions to the saved {ANSWERED_METRIC} model: {sum(correct)} of {len(correct)} correct",
        texts=("Question", "Answer", "Expected"),
    )
    for row, answer, target, is_correct in zip(questions, answers, expected, correct, strict=True):
        table.add_row(row["prompt"], Text(answer, style="green" if is_correct else "red"), target)
    return table


def _print_end(console: Any, output_dir: Path, max_steps: int, seconds: float) -> None:
    console.print(
        f"{max_steps} steps from random weights show the mechanism; they do not rank the metrics.\n"
        f"The demo took {seconds:.0f} s. Models: {output_dir}/{{{','.join(METRICS)}}}, each with a report of its "
        "groups and their losses, commonit/report.html.\n\n"
        "Next, train on your own model and data, or on these (from the repository's root):",
        soft_wrap=True,
        markup=False,
    )
    model, data = (shlex.quote(str(output_dir / name)) for name in (INITIAL_DIR, "data"))
    console.print(
        "  commonit sft --config example_configs/trl/length.yaml --output_dir out/sft \\\n"
        f"    --model_name_or_path {model} --dataset_name {data} \\\n"
        "    --dtype float32 --bf16 false --learning_rate 2e-3 --num_train_epochs 1",
        soft_wrap=True,
        markup=False,
    )
