"""`commonit sft` trains as its flags and YAML files configure it; user errors print one line and exit with code 2."""

import bz2
import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.trainers import SFT_FLAGS, as_argv
from safetensors.torch import load_file

from commonit_trl import CommonITSFTTrainer, __version__
from commonit_trl.cli import data, launch
from commonit_trl.cli import main as cli
from commonit_trl.config import CommonITArguments

EXAMPLES = Path(__file__).parents[2] / "example_configs"
TASKS = ("add", "sort", "spell")

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def rows_of(task, count, text="Do it"):
    return [{"prompt": f"{text} {task} {n}:", "completion": f" {task} " * (n % 7 + 1)} for n in range(count)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def train_file(tmp_path):
    """24 rows of three tasks."""
    rows = [{**row, "task": task} for task in TASKS for row in rows_of(task, 8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    return "data/train.jsonl"


@pytest.fixture
def flags(model, train_file):
    """Options that make any configuration a run of two steps on a CPU."""
    return {
        "model_name_or_path": model,
        "dataset_name": train_file,
        "output_dir": "out",
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        **SFT_FLAGS,
    }


def run(options, *argv):
    return cli.main(["sft", *argv, *as_argv(options)])


def config_file(path, **options):
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return str(path)


def groups_of(directory="out"):
    return json.loads((Path(directory) / "commonit" / "groups.json").read_text(encoding="utf-8"))


def log_of(directory):
    return json.loads((Path(directory) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def weights_of(directory):
    return load_file(Path(directory) / "model.safetensors")


# --- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["length", "task", "embedding"])
def test_the_examples_train(example, flags, minilm, tmp_path, capfd):
    if example == "embedding":
        reference = [{**row, "task": task} for task in TASKS for row in rows_of(task, 3, text="Please")]
        flags["commonit_reference_dataset"] = write_jsonl(tmp_path / "reference.jsonl", reference)
        flags["commonit_embedding_model"] = minilm
    if example == "task":
        flags |= {"commonit_task_column": "task", "commonit_min_group_size": 2}

    assert run(flags, "--config", str(EXAMPLES / "trl" / f"{example}.yaml")) == 0

    groups = groups_of()
    assert groups["metric"] == example
    assert example == "length" or groups["names"] == list(TASKS)
    assert weights_of("out")
    assert capfd.readouterr().err.count(f"commonit_metric={example}: {len(groups['names'])} groups") == 1


@pytest.mark.parametrize("example", ["length", "task", "embedding", "mixture"])
def test_the_examples_use_the_papers_hyperparameters(example, flags):
    recipe = {name: flags[name] for name in ("use_cpu", "bf16")}
    (_, training, model, mixture), _ = cli.parse_sft(
        ["--config", str(EXAMPLES / "trl" / f"{example}.yaml"), *as_argv(recipe)]
    )
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (
        5e-6,
        "linear",
        0.03,
    )
    assert (training.num_train_epochs, training.max_length) == (3, 2048)
    assert model.model_name_or_path and model.dtype == "float32"  # bf16: true computes in bfloat16 on these weights
    assert len(mixture.datasets) == (3 if example == "mixture" else 0)


def test_none_trains_exactly_like_trl(flags):
    from trl.scripts import sft as trl_sft

    assert run({**flags, "commonit_metric": "none"}) == 0
    parser = trl_sft.make_parser()
    trl_sft.main(*parser.parse_args_and_config(as_argv({**flags, "output_dir": "theirs", "dataset_name": "data"})))

    ours, theirs = weights_of("out"), weights_of("theirs")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not Path("out/commonit").exists()


def test_lora_trains_an_adapter(flags):
    assert run({**flags, "commonit_metric": "task", "use_peft": True, "lora_r": 2}) == 0
    assert Path("out/adapter_model.safetensors").exists()
    assert groups_of()["names"] == list(TASKS)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(flags):
    flags |= {"commonit_metric": "task", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    assert run(flags) == 0
    uninterrupted = weights_of("out")
    Path("out/model.safetensors").unlink()
    assert run({**flags, "resume_from_checkpoint": "out/checkpoint-2"}) == 0
    resumed = weights_of("out")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_an_error_in_training_keeps_its_traceback(flags, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(CommonITSFTTrainer, "training_step", fail)
    with pytest.raises(ValueError, match="a bug"):
        run({**flags, "commonit_metric": "task"})


# --- mixtures -----------------------------------------------------------------------------------------------


def test_the_entries_of_a_mixture_are_its_tasks(flags, tmp_path):
    """Columns named task or dataset in the entries do not matter; local files override the example's entries."""
    write_jsonl(tmp_path / "maths.jsonl", [{**row, "task": "own"} for row in rows_of("add", 12)])
    write_jsonl(tmp_path / "a" / "part.jsonl", [{**row, "dataset": 1} for row in rows_of("sort", 8)])
    Dataset.from_list(rows_of("spell", 8)).to_parquet(tmp_path / "b" / "part.parquet")
    files = ["maths.jsonl", "a/part.jsonl", "b/part.parquet"]
    flags |= {"dataset_name": None, "datasets": files, "eval_strategy": "steps", "eval_steps": 1}
    flags |= {"test_split_size": 0.25, "save_strategy": "steps", "save_steps": 2}

    assert run(flags, "--config", str(EXAMPLES / "trl" / "mixture.yaml")) == 0

    names = ["a/part.jsonl", "b/part.parquet", "maths"]
    assert groups_of()["names"] == names
    logged = {key for entry in log_of("out/checkpoint-2") for key in entry}
    assert {f"eval_{name}_loss" for name in names} <= logged


def splits_of(*argv, **options):
    parsed, _ = cli.parse_sft([*argv, *as_argv({"use_cpu": True, "bf16": False, **options})])
    return *data.load_splits(parsed), parsed.training


def test_a_mixture_takes_columns_splits_and_fractions(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "more": 1} for row in rows_of("add", 20)])
    write_jsonl(tmp_path / "b.jsonl", rows_of("sort", 20))
    keep = ["prompt", "completion"]
    entries = [
        {"path": "a.jsonl", "columns": keep, "fraction": 0.75, "split": None},
        {"path": "json", "name": "words", "data_files": "b.jsonl", "split": "train[:10]", "fraction": 0.25},
    ]
    config = config_file(tmp_path / "c.yaml", datasets=entries, commonit_metric="task")
    train, evaluation, training = splits_of("--config", config)
    assert training.commonit_task_column == ["dataset"] and evaluation is None
    assert train.column_names == [*keep, "dataset"]
    assert train["dataset"][:] == ["a"] * 20 + ["words"] * 7  # 27 is the most that 20 rows are three quarters of


def test_a_mixture_uses_the_task_column_of_the_options(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "kind": "x"} for row in rows_of("add", 4)])
    train, _, training = splits_of("--datasets", "a.jsonl", commonit_metric="task", commonit_task_column="kind")
    assert training.commonit_task_column == ["kind"]
    assert "dataset" not in train.column_names
    train, _, training = splits_of("--datasets", "a.jsonl", commonit_metric="length")
    assert training.commonit_task_column is None
    assert "dataset" not in train.column_names


def test_a_mixture_is_split_by_the_seed(tmp_path):
    """Ranks and resumed runs train on the same rows; another seed gives another split."""
    write_jsonl(tmp_path / "a.jsonl", rows_of("add", 40))
    options = {"commonit_metric": "task", "test_split_size": 0.5, "eval_strategy": "epoch"}
    (train, evaluation, _), (again, _, _), (other, _, _) = (
        splits_of("--datasets", "a.jsonl", seed=seed, **options) for seed in (1, 1, 2)
    )
    assert train["prompt"][:] == again["prompt"][:] != other["prompt"][:]
    assert not set(train["prompt"]) & set(evaluation["prompt"])


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        ([{"path": "data/maths.jsonl"}, {"path": "org/code-v1.5"}], ["maths", "code-v1.5"]),
        (
            [{"path": "org/all", "name": "maths"}, {"path": "org/all", "name": "code"}],
            ["all/maths", "all/code"],
        ),
        ([{"path": "a/x.csv"}, {"path": "b/x.csv"}, {"path": "c.csv"}], ["a/x.csv", "b/x.csv", "c"]),
        ([{"path": "x.csv"}, {"path": "x.csv", "split": "train[:5]"}], ["x.csv", "x.csv (2)"]),
        ([{"path": "json", "data_files": ["a.json", "b.json"]}, {"path": "a.csv", "name": "b"}], ["a", "b"]),
    ],
)
def test_entry_labels(entries, labels):
    from trl.scripts.utils import DatasetConfig

    assert data.entry_labels([DatasetConfig(**entry) for entry in entries]) == labels


# --- data and options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["jsonl", "json", "parquet", "csv", "jsonl.gz", "json.gz", "csv.gz", "jsonl.bz2", "jsonl.xz"]
)
def test_local_files(suffix, tmp_path):
    rows = Dataset.from_list(rows_of("add", 3))
    kind, _, compression = suffix.partition(".")
    plain = tmp_path / "plain"
    {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(kind, rows.to_json)(plain)
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(compression, bytes)
    (tmp_path / f"rows.{suffix}").write_bytes(compress(plain.read_bytes()))
    train, _, _ = splits_of(dataset_name=f"rows.{suffix}", commonit_metric="length")
    assert train.to_list() == rows.to_list()


@pytest.mark.parametrize("pattern", ["data/*.jsonl", "**/part-?.jsonl"])
def test_a_pattern_of_files_is_one_dataset(pattern, tmp_path):
    parts = [rows_of(task, 3) for task in TASKS]
    for number, rows in enumerate(parts):
        write_jsonl(tmp_path / "data" / f"part-{number}.jsonl", rows)
    (tmp_path / "data" / "part-9.json").write_text("not these", encoding="utf-8")
    train, _, _ = splits_of(dataset_name=pattern, commonit_metric="length")
    assert train.to_list() == [row for rows in parts for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk(streaming, tmp_path):
    train, test = (Dataset.from_list(rows_of("add", count)) for count in (4, 2))
    train.save_to_disk("one split")
    DatasetDict({"train": train, "test": test}).save_to_disk("two splits")
    options = {"commonit_metric": "none" if streaming else "length", "dataset_streaming": streaming}
    read, _, _ = splits_of(dataset_name="one split", **options)
    assert list(read) == train.to_list()
    read, evaluated, _ = splits_of(dataset_name="two splits", eval_strategy="epoch", **options)
    assert (list(read), list(evaluated)) == (train.to_list(), test.to_list())


def test_a_mixture_takes_compressed_files_patterns_and_saved_folders(tmp_path):
    saved = Dataset.from_list(rows_of("add", 4))
    saved.save_to_disk("saved")
    Dataset.from_list(rows_of("sort", 3)).to_json("sort.jsonl.gz", compression="gzip")
    write_jsonl(tmp_path / "data" / "a.jsonl", rows_of("spell", 1))
    write_jsonl(tmp_path / "data" / "b.jsonl", rows_of("spell", 1))
    entries = [{"path": "saved", "split": "train[:50%]"}, {"path": "sort.jsonl.gz"}, {"path": "data/*.jsonl"}]
    train, _, _ = splits_of("--config", config_file(tmp_path / "c.yaml", datasets=entries), commonit_metric="task")
    assert train["dataset"] == ["saved"] * 2 + ["sort"] * 3 + ["data/*.jsonl"] * 2
    assert train.remove_columns("dataset").to_list()[:2] == saved.to_list()[:2]


def test_a_local_directory_with_splits(tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", rows_of("add", 3))
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows_of("add", 2))
    options = {"eval_strategy": "epoch", "dataset_test_split": "validation"}
    train, evaluation, _ = splits_of(dataset_name="data", commonit_metric="length", **options)
    assert (len(train), len(evaluation)) == (3, 2)


@pytest.mark.parametrize("source", [{"dataset_name": "a.jsonl", "dataset_streaming": True}, {"streaming": True}])
def test_without_a_metric_data_may_stream(source, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of("add", 3))
    argv = [] if "dataset_name" in source else ["--datasets", "a.jsonl"]
    train, _, _ = splits_of(*argv, commonit_metric="none", **source)
    assert isinstance(train, IterableDataset)
    assert len(list(train)) == 3


def test_launch_options_come_from_flags_and_file(tmp_path):
    """As in `trl sft`: other options go to `accelerate launch`, and flags override the file."""
    config = config_file(
        tmp_path / "c.yaml",
        commonit_metric="length",
        num_processes=4,
        num_machines=2,
        same_network=True,
        multi_gpu=False,
        env={"FROM_YAML": 1},
    )
    argv = ["--config", config, "--num-processes", "2", "--accelerate_config=zero2", "--use_cpu", "--bf16", "no"]
    (_, training, _, _), flags = cli.parse_sft(argv)
    assert training.use_cpu and training.commonit_metric == "length"
    assert flags == ["--num_machines", "2", "--same_network", "--num-processes", "2", "--accelerate_config=zero2"]
    prepared = launch.prepare(flags, "sft", argv)
    assert (prepared.num_processes, prepared.num_machines, prepared.same_network) == (2, 2, True)
    assert Path(prepared.config_file).name == "zero2.yaml"
    assert (prepared.module, prepared.training_script, prepared.training_script_args) == (
        True,
        "commonit_trl",
        ["sft", *argv],
    )
    assert launch.prepare([], "sft", argv) is None


def test_flags_override_the_file_in_both_spellings(tmp_path):
    config = config_file(
        tmp_path / "c.yaml", commonit_metric="length", commonit_min_group_size=8, learning_rate=0.5, max_steps=3
    )
    argv = [f"--config={config}", "--commonit-min-group-size", "2", "--max_steps=7", "--use_cpu", "--bf16", "no"]
    (_, training, _, _), _ = cli.parse_sft(argv)
    assert (training.commonit_min_group_size, training.max_steps, training.learning_rate) == (2, 7, 0.5)


def test_help_lists_the_options_of_trl_and_commonit(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sft", "--help"])
    listed = capsys.readouterr().out
    # A comma before another spelling of the option: argparse since Python 3.13.
    options = set(re.findall(r"--(\w+)[ ,]", listed))
    assert options >= {*CommonITArguments.__dataclass_fields__, "learning_rate", "model_name_or_path"}


# --- the process --------------------------------------------------------------------------------------------


def python(*argv):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60)


def test_the_process_returns_the_exit_code():
    version = python("-m", "commonit_trl", "--version")
    assert (version.returncode, version.stdout) == (0, f"commonit-trl {__version__}\n")
    wrong = python("-m", "commonit_trl", "stf")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("commonit: error: ") and wrong.stderr.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)))\n"
        "from commonit_trl.cli.main import main\n"
        "main(['--help'])"
    )
    done = python("-c", code)
    assert done.returncode == 0
    assert "commonit sft" in done.stdout and done.stdout.endswith("set()\n")
