"""Bad input, one case a line: of the command line, its YAML files, the Python API, data, saved groups and checkpoints.

Each mistake ends as one line that names the option, the value and the way out (from the command line with exit code 2
and no traceback), acts on no terminal, leaves no file behind, and is seen as early as it can be. When, is shown by what
is not there: `NOTHING` has a model that does not exist, `MODEL` one without weights; loading it would be another error.
What is odd but right trains, and every row of it is seen.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.bad_input import acting, check_refusal, files_in, record, timed
from helpers.toys import id_rows
from helpers.trainers import Seen, as_argv, make_trainer, rows_of_task, write_jsonl
from safetensors.numpy import save_file

from commonit_trl.cli import main as cli
from commonit_trl.config import OPTIONS
from commonit_trl.report import ledger_table

pytestmark = pytest.mark.usefixtures("in_tmp_path")

NOTHING, MODEL, NONE = "anything is loaded", "a model is loaded", ""  # before what a mistake is seen
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b5m\r\x08\u202e\u2066\x00"
LONG = "a" * 300


@dataclass(frozen=True)
class Case:
    says: tuple[str, ...]
    """Option, value and way out, as they must stand in the line."""
    flags: dict[str, Any] = field(default_factory=dict)
    before: str = NOTHING
    files: dict[str, Any] = field(default_factory=dict)
    """To be there: bytes, text, a list of rows as JSON Lines, None for a directory."""
    argv: tuple[str, ...] = ()


def case(*says: str, before: str = NOTHING, files: Any = None, argv: tuple[str, ...] = (), **flags: Any) -> Case:
    return Case(says, flags, before, files or {}, argv)


def row(prompt: Any = "a", completion: Any = "b", task: Any = "x") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "task": task}


ROWS = [row for task in ("add", "sort", "spell") for row in rows_of_task(task, 8)]
LENGTH = {"commonit_metric": "length"}
EMBEDDING = {"commonit_metric": "embedding"}


def yaml_case(text: str | bytes, *says: str, **more: Any) -> Case:
    return case(*says, files={"c.yaml": text}, argv=("--config", "c.yaml"), **more)


def mixture_case(text: str, *says: str, **more: Any) -> Case:
    return yaml_case(f"datasets: {text}", *says, **{"dataset_name": None, "before": MODEL, **more})


def rows_case(content: Any, *says: str, suffix: str = "jsonl", named: bool = True, **more: Any) -> Case:
    name = f"bad.{suffix}"
    says = (f"dataset_name='{name}'", *says) if named else says
    return case(*says, files={name: content}, **{"before": MODEL, "dataset_name": name, **more})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, list):
        write_jsonl(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")


@pytest.fixture(scope="session")
def weightless(model, tmp_path_factory):
    """The directory of a model without its weights."""
    directory = tmp_path_factory.mktemp("weightless")
    shutil.copytree(model, directory, dirs_exist_ok=True)
    (directory / "model.safetensors").unlink()
    return str(directory)


def refuse(tmp_path, capfd, front_end, name, argv, says, before):
    """Run the command line, which must end as one line."""
    capfd.readouterr()
    code, seconds = timed(tmp_path, lambda: cli.main(list(argv)))
    out, err = capfd.readouterr()
    lines = [line for line in err.split("\n") if line.startswith("commonit: error: ")]
    assert (code, len(lines)) == (2, 1), err
    assert out == "" and "Traceback" not in err
    check_refusal(lines[0], says)
    record(front_end, name, "exit code 2", lines[0], before, seconds)


# --- commonit sft -------------------------------------------------------------------------------------------------

OPTION_CASES = {
    "commonit_metric missing": case("commonit_metric", "not set", "'none'", commonit_metric=None),
    "commonit_metric empty": case("commonit_metric=''", "did you mean 'task'", commonit_metric=""),
    "commonit_metric misspelt": case("commonit_metric='lenght'", "did you mean 'length'", commonit_metric="lenght"),
    "commonit_metric in capitals": case("commonit_metric='TASK'", "task, length", commonit_metric="TASK"),
    "commonit_metric that clears the screen": case(
        "commonit_metric='\\x1b[2Jtask'", "did you mean 'task'", commonit_metric="\x1b[2Jtask"
    ),
    "commonit_metric with markup": case("commonit_metric='[red]task[/]'", "'task'", commonit_metric="[red]task[/]"),
    "commonit_task_column unknown": case(
        "commonit_task_column='kind'", "prompt, completion", "did you mean", before=MODEL, commonit_task_column="kind"
    ),
    "commonit_task_column, one of two unknown": case(
        "commonit_task_column='kind'", "did you mean", before=MODEL, commonit_task_column=["task", "kind"]
    ),
    "commonit_task_column unread": case(
        "commonit_task_column=['task']", "'length'", "remove it", **LENGTH, commonit_task_column="task"
    ),
    "commonit_num_groups 0": case("commonit_num_groups=0", "at least 1", **LENGTH, commonit_num_groups=0),
    "commonit_num_groups negative": case("commonit_num_groups=-3", "at least 1", **LENGTH, commonit_num_groups=-3),
    "commonit_num_groups a fraction": case(
        "--commonit_num_groups", "'2.5'", "invalid int", **LENGTH, commonit_num_groups=2.5
    ),
    "commonit_num_groups unread": case("commonit_num_groups=4", "by 'task'", "remove it", commonit_num_groups=4),
    "commonit_length_of": case(
        "commonit_length_of='answer'", "response, prompt, total", **LENGTH, commonit_length_of="answer"
    ),
    "commonit_length_edges descending": case(
        "commonit_length_edges=[9, 3]", "ascending", "[64, 256]", **LENGTH, commonit_length_edges=[9, 3]
    ),
    "commonit_length_edges 0": case(
        "commonit_length_edges=[0, 3]", "above 0", "[64, 256]", **LENGTH, commonit_length_edges=[0, 3]
    ),
    "commonit_length_edges no number": case(
        "--commonit_length_edges", "'64,256'", "invalid int", **LENGTH, commonit_length_edges="64,256"
    ),
    "commonit_length_edges and commonit_num_groups": case(
        "commonit_num_groups=2",
        "commonit_length_edges=[8]",
        "remove one",
        **LENGTH,
        commonit_num_groups=2,
        commonit_length_edges=[8],
    ),
    "commonit_embedding_model missing": case(
        "commonit_embedding_model='no/where'",
        "name or local path",
        before=NONE,
        **EMBEDDING,
        commonit_embedding_model="no/where",
    ),
    "commonit_embedding_model a file": case(
        "commonit_embedding_model='data.jsonl'",
        "name or local path",
        before=NONE,
        **EMBEDDING,
        commonit_embedding_model="data.jsonl",
    ),
    "commonit_embedding_text": case(
        "commonit_embedding_text='answer'", "prompt, response, both", **EMBEDDING, commonit_embedding_text="answer"
    ),
    "commonit_embedding_dtype": case(
        "commonit_embedding_dtype='float8'", "auto, float32", **EMBEDDING, commonit_embedding_dtype="float8"
    ),
    "commonit_reference_dataset missing": case(
        "commonit_reference_dataset='gone.csv'",
        "no such file",
        "give a hub name",
        before=NONE,
        **EMBEDDING,
        commonit_reference_dataset="gone.csv",
    ),
    "commonit_reference_dataset and commonit_num_groups": case(
        "commonit_num_groups=4",
        "commonit_reference_dataset='r.csv'",
        "remove one",
        **EMBEDDING,
        commonit_reference_dataset="r.csv",
        commonit_num_groups=4,
    ),
    "commonit_reference_task_column alone": case(
        "commonit_reference_task_column='kind'",
        "commonit_reference_dataset",
        "remove it",
        **EMBEDDING,
        commonit_reference_task_column="kind",
    ),
    "commonit_reference_task_column unknown": case(
        "commonit_reference_task_column='kind'",
        "commonit_reference_dataset='data.jsonl'",
        "prompt, completion",
        before=NONE,
        **EMBEDDING,
        commonit_reference_dataset="data.jsonl",
        commonit_reference_task_column="kind",
    ),
    "commonit_purity": case("commonit_purity='epoch'", "step, micro", commonit_purity="epoch"),
    "commonit_remainder": case("commonit_remainder='wrap'", "keep, drop", commonit_remainder="wrap"),
    "commonit_remainder drops all": case(
        "remainder='drop'",
        "largest group has 8",
        "remainder='keep'",
        before=NONE,
        commonit_remainder="drop",
        per_device_train_batch_size=9,
    ),
    "commonit_resume": case("commonit_resume='yes'", "exact, replan", commonit_resume="yes"),
    "commonit_min_group_size 0": case("commonit_min_group_size=0", "at least 1", commonit_min_group_size=0),
    "commonit_weights misspelt": case("commonit_weights='even'", "did you mean 'uniform'", commonit_weights="even"),
    "commonit_weights not JSON": case(
        "commonit_weights='{\"add\": 1'", "not JSON", '{"group": 0.5}', commonit_weights='{"add": 1'
    ),
    "commonit_weights negative": case(
        "commonit_weights", "-1", "'add'", "number >= 0", commonit_weights='{"add": -1, "sort": 1}'
    ),
    "commonit_weights all 0": case("commonit_weights={'add': 0}", "above 0", commonit_weights='{"add": 0}'),
    "commonit_weights of no group": case(
        "commonit_weights",
        "'ad'",
        "did you mean 'add'",
        before=NONE,
        commonit_weights='{"ad": 1, "sort": 1, "spell": 1}',
    ),
    "commonit_weights of some groups": case(
        "commonit_weights", "'sort', 'spell'", "give each group one", before=NONE, commonit_weights='{"add": 1}'
    ),
    "commonit_balance_lengths": case("--commonit_balance_lengths", "maybe", "yes/no", commonit_balance_lengths="maybe"),
    "commonit_cache_dir a file": case(
        "commonit_cache_dir='data.jsonl'",
        "that this user may write",
        before=NONE,
        commonit_cache_dir="data.jsonl",
    ),
    "commonit_cache_dir too long": case(
        f"commonit_cache_dir='{LONG}'", "that this user may write", before=NONE, commonit_cache_dir=LONG
    ),
    "commonit_report": case("--commonit_report", "maybe", "yes/no", commonit_report="maybe"),
    "an unknown option of ours": case("commonit_num_group", "did you mean commonit_num_groups?", commonit_num_group=3),
    "an unknown option of TRL's": case("learning_rte", "did you mean learning_rate?", learning_rte=1),
    "a value without an option": case("'stray'", "option", argv=("stray",)),
}
SETTING_CASES = {
    "model_name_or_path empty": case("model_name_or_path=''", "Give a hub name", model_name_or_path=""),
    "model_name_or_path a file": case(
        "model_name_or_path='data.jsonl'", "Give a hub name", model_name_or_path="data.jsonl"
    ),
    "model_name_or_path no model": case(
        "model_name_or_path='empty'", "Give a hub name", files={"empty": None}, model_name_or_path="empty"
    ),
    "model_name_or_path of an unknown kind": case(
        "model_name_or_path='strange'",
        "Give a hub name",
        files={"strange/config.json": '{"model_type": "strange"}'},
        model_name_or_path="strange",
    ),
    "model_name_or_path that clears the screen": case(
        "model_name_or_path='\\x1b[2Jx'", "Give a hub name", model_name_or_path="\x1b[2Jx"
    ),
    "output_dir a file": case("output_dir='data.jsonl'", "that this user may write", output_dir="data.jsonl"),
    "output_dir below a file": case(
        "output_dir='data.jsonl/out'", "that this user may write", output_dir="data.jsonl/out"
    ),
    "output_dir too long": case(f"output_dir='{LONG}'", "that this user may write", output_dir=LONG),
    "resume_from_checkpoint missing": case(
        "resume_from_checkpoint='gone'", "Name a checkpoint", resume_from_checkpoint="gone"
    ),
    "resume_from_checkpoint a file": case(
        "resume_from_checkpoint='data.jsonl'", "Name a checkpoint", resume_from_checkpoint="data.jsonl"
    ),
    "per_device_train_batch_size 0": case("per_device_train_batch_size=0", "at least 1", per_device_train_batch_size=0),
    "gradient_accumulation_steps negative": case(
        "gradient_accumulation_steps=-1", "at least 1", gradient_accumulation_steps=-1
    ),
    "gradient_accumulation_steps above the rows": case(
        "24 samples", "25", "less gradient accumulation", before=NONE, gradient_accumulation_steps=25
    ),
    "max_length 0": case("max_length=0", "at least 1", max_length=0),
    "max_length negative": case("max_length=-5", "at least 1", max_length=-5),
    "seed negative": case("seed=-1", "at least 0", seed=-1),
    "data_seed too large": case("data_seed=4294967296", "at most 4294967295", data_seed=2**32),
    "train_sampling_strategy": case(
        "train_sampling_strategy='group_by_length'",
        "leave it at 'random'",
        before=MODEL,
        train_sampling_strategy="group_by_length",
    ),
    "dataset_streaming": case("dataset_streaming=True", "set it to False", before=MODEL, dataset_streaming=True),
    "eval_strategy without a split": case(
        "eval_strategy='epoch'", "'test'", "eval_strategy='no'", before=MODEL, eval_strategy="epoch"
    ),
    "dataset_train_split": case(
        "'all'", "has: train", "Set dataset_train_split", before=MODEL, dataset_train_split="all"
    ),
    "num_processes": case("--num_processes", "'many'", "invalid int", argv=("--num_processes", "many")),
}
YAML_CASES = {
    "a file that is not there": case("--config gone.yaml", "name a YAML file", argv=("--config", "gone.yaml")),
    "a directory": case("--config dir", "name a YAML file", files={"dir": None}, argv=("--config", "dir")),
    "a name that clears the screen": case("name a YAML file", "u001b[2J", argv=("--config", "\x1b[2J.yaml")),
    "a name of two lines": case("--config a b.yaml", "name a YAML file", argv=("--config", "a\nb.yaml")),
    "a name too long": case(f"--config {LONG}", "name a YAML file", argv=("--config", LONG)),
    "no text": yaml_case(b"\xff\xfe\x00\x80", "--config c.yaml", "not YAML"),
    "an object of Python": yaml_case(
        "commonit_metric: !!python/object/apply:pathlib.Path.touch [ran]", "--config c.yaml", "not YAML"
    ),
    "a list": yaml_case("- commonit_metric: task", "--config c.yaml", "write lines such as"),
    "nested without end": yaml_case("commonit_weights: " + "[" * 5000, "--config c.yaml", "not YAML"),
    "a name that is a number": yaml_case("1: 2", "Unknown option 1", "options are names"),
    "an unknown option": yaml_case("commonit_metrics: task", "commonit_metrics", "did you mean commonit_metric?"),
    "a metric that is off": yaml_case(
        "commonit_metric: off", "commonit_metric=False", "'none' (baseline batches)", commonit_metric=None
    ),
    "a number for a name": yaml_case("output_dir: 3", "output_dir=3", "Change", output_dir=None),
    "a list for a number": yaml_case("max_steps: [1]", "max_steps=[1]", "Change", max_steps=None),
    "a fraction for a whole number": yaml_case("seed: 1.5", "seed=1.5", "Change"),
    "nothing for a number": yaml_case("max_steps:", "max_steps=None", "Change", max_steps=None),
    "weights that are a list": yaml_case("commonit_weights: [1, 2]", "commonit_weights=[1, 2]", "mapping"),
    "a weight that is no number": yaml_case("commonit_weights: {add: .nan}", "commonit_weights", "nan", "number >= 0"),
    "datasets a name": mixture_case("data.jsonl", "datasets='data.jsonl'", "- path:", before=NOTHING),
    "datasets a number": mixture_case("3", "datasets=3", "- path:", before=NOTHING),
    "an entry without path": mixture_case("[{split: train}]", "datasets", "no path", "- path:", before=NOTHING),
    "an entry with a misspelt key": mixture_case(
        "[{path: data.jsonl, splt: train}]", "splt", "did you mean split?", before=NOTHING
    ),
    "an entry whose path is a number": mixture_case("[{path: 3}]", "datasets: path=3", "Change", before=NOTHING),
    "a fraction in words": mixture_case(
        "[{path: data.jsonl, fraction: half}]", "datasets: fraction='half'", "Change", before=NOTHING
    ),
    "fractions of 0": mixture_case("[{path: data.jsonl, fraction: 0}]", "datasets", "[0]", "not all 0"),
    "columns that are not there": mixture_case(
        "[{path: data.jsonl, columns: [nope]}]", "datasets: columns=['nope']", "some of task, prompt, completion"
    ),
    "columns named twice": mixture_case(
        "[{path: data.jsonl, columns: [prompt, prompt, completion]}]", "datasets: columns=", "each once"
    ),
    "entries of other types": mixture_case(
        "[{path: data.jsonl}, {path: other.jsonl}]", "datasets", "do not go together", "columns:"
    ),
}


def test_every_option_has_a_case():
    assert {name.split()[0] for name in OPTION_CASES} >= {*OPTIONS}


OTHER_ROWS = [{"prompt": 1, "completion": 2, "task": [3]}] * 3


@pytest.mark.parametrize("name", OPTION_CASES | SETTING_CASES | YAML_CASES)
def test_commonit_sft_refuses(name, model, weightless, tmp_path, capfd):
    one = (OPTION_CASES | SETTING_CASES | YAML_CASES)[name]
    write(tmp_path / "data.jsonl", ROWS)
    write(tmp_path / "other.jsonl", OTHER_ROWS)
    for path, content in one.files.items():
        write(tmp_path / path, content)
    flags = {**sft_flags({NOTHING: "no/model", MODEL: weightless, NONE: model}[one.before]), **one.flags}
    front_end = "commonit sft, YAML" if name in YAML_CASES else "commonit sft"
    refuse(tmp_path, capfd, front_end, name, ["sft", *as_argv(flags), *one.argv], one.says, one.before)
    assert not (tmp_path / "ran").exists()


def sft_flags(model):
    off = ("use_cpu", "disable_tqdm")
    return {
        "model_name_or_path": model,
        "dataset_name": "data.jsonl",
        "output_dir": "out",
        "commonit_metric": "task",
        **dict.fromkeys(off, True),
        "bf16": False,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
    }


# --- data ---------------------------------------------------------------------------------------------------------

DATA_CASES = {
    "no such file": case(
        "dataset_name='gone.jsonl'", "no such file", "give a hub name", before=MODEL, dataset_name="gone.jsonl"
    ),
    "a name with a newline": case(
        "dataset_name='a\\nb.jsonl'", "no such file", "give a hub name", before=MODEL, dataset_name="a\nb.jsonl"
    ),
    "a name that clears the screen": case(
        "dataset_name='\\x1b[2J.jsonl'", "give a hub name", before=MODEL, dataset_name="\x1b[2J.jsonl"
    ),
    "a directory for a file": case(
        "dataset_name='d.jsonl'", "give a hub name", before=MODEL, dataset_name="d.jsonl", files={"d.jsonl": None}
    ),
    "an empty directory": case(
        "dataset_name='dir'", "give a hub name", before=MODEL, dataset_name="dir", files={"dir": None}
    ),
    "a script": case(
        "dataset_name='dir'",
        "give a hub name",
        before=MODEL,
        dataset_name="dir",
        files={"dir/dir.py": "open('ran', 'w')"},
    ),
    "a pickle": case(
        "dataset_name='rows.pkl'",
        "give a hub name",
        before=MODEL,
        dataset_name="rows.pkl",
        files={"rows.pkl": b"\x80\x04."},
    ),
    "an empty file": rows_case("", "it is empty", "has rows"),
    "blank lines": rows_case("\n\n\n", "has rows"),
    "rows without columns": rows_case([{}] * 4, "has rows"),
    "numbers, no rows": rows_case("3\n4\n", "has rows"),
    "a row that breaks off": rows_case('{"prompt": "a", "completion": "b"}\n{"prompt": "a', "JSON parse error", "rows"),
    "a key given twice": rows_case('{"prompt": "a", "prompt": "b", "task": "x"}\n', "twice", "has rows"),
    "half a surrogate pair": rows_case('{"prompt": "\\ud800", "completion": "b"}\n', "surrogate", "has rows"),
    "Latin-1": rows_case(b'{"prompt": "caf\xe9", "completion": "b", "task": "x"}\n', "'prompt'", "UTF-8"),
    "no Parquet": rows_case(b"PAR1 no", "Parquet", "has rows", suffix="parquet"),
    "a table of headings": rows_case("prompt,completion,task\n", "has rows", suffix="csv"),
    "prompts that are missing": rows_case([*ROWS, row(prompt=None)], "'prompt'", "1 of 25", "row 24", "remove them"),
    "responses that are missing": rows_case([row(completion=None)] * 4, "'completion'", "4 of 4", "remove them"),
    "prompts that are numbers": rows_case([row(prompt=1)] * 4, "'prompt'", "int64", "make that text"),
    "prompts that are lists": rows_case([row(prompt=["a"])] * 4, "'prompt'", "list", "make that text or messages"),
    "prompts alone": rows_case([{"prompt": "a", "task": "x"}] * 4, "'completion'", "'prompt', 'task'", "give prompt"),
    "no text": rows_case([{"kind": "a", "task": "x"}] * 4, "'text'", "'kind', 'task'", "dataset_text_field"),
    "texts that are missing": rows_case([{"text": None, "task": "x"}] * 4, "'text'", "4 of 4", "remove them"),
    "messages that are text": rows_case([{"messages": "hello", "task": "x"}] * 4, "'messages'", "text", "make that"),
    "a conversation of no message": rows_case(
        [{"messages": turns, "task": "x"} for turns in ([], [{"role": "user", "content": "a"}])],
        "'messages'",
        "row 0",
        "remove it",
    ),
    "tokens that are text": rows_case([{"input_ids": ["a"], "task": "x"}] * 4, "'input_ids'", "string", "token ids"),
    "tokens below 0": rows_case([{"input_ids": [1, -5], "task": "x"}] * 4, "'input_ids'", "below 0", "token ids"),
    "labels that are too few": rows_case(
        [{"input_ids": [1, 2], "labels": [1], "task": "x"}] * 4, "row 0", "labels", "give each token a label"
    ),
    "task labels that are lists": rows_case(
        [row(task=["x"])] * 4, "commonit_task_column='task'", "list", "name a column", named=False, before=NONE
    ),
    "task labels that are mappings": rows_case(
        [row(task={"x": 1})] * 4, "commonit_task_column='task'", "struct", "name a column", named=False, before=NONE
    ),
    "a column name that clears the screen": rows_case(
        [{"prompt": "a", "completion": "b", "\x1b[2J": "x"}] * 4, "\\u001b[2J", "commonit_task_column", named=False
    ),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_data_are_refused(name, model, weightless, tmp_path, capfd):
    one = DATA_CASES[name]
    for path, content in one.files.items():
        write(tmp_path / path, content)
    flags = {**sft_flags({MODEL: weightless, NONE: model}[one.before]), **one.flags}
    refuse(tmp_path, capfd, "data", name, ["sft", *as_argv(flags)], one.says, one.before)
    assert not (tmp_path / "ran").exists()


# --- commonit inspect, group, demo --------------------------------------------------------------------------------

TASK = ("--commonit_metric", "task")
COMMAND_CASES = {
    "no command": ((), ("COMMAND", "required")),
    "an unknown command": (("stf",), ("COMMAND", "'stf'", "'sft'")),
    "a command that clears the screen": (("\x1b[2J",), ("COMMAND", "'\\x1b[2J'", "'sft'")),
    "inspect: no metric": (("inspect", "data.jsonl"), ("commonit_metric", "not set", "--compare")),
    "inspect: metric none": (("inspect", "data.jsonl", "--commonit_metric", "none"), ("'none'", "task, length")),
    "inspect: --compare nothing": (("inspect", "data.jsonl", "--compare", ""), ("--compare=''", "task, length")),
    "inspect: --compare none": (("inspect", "data.jsonl", "--compare", "none"), ("--compare='none'", "task, length")),
    "inspect: --world_size 0": (("inspect", "data.jsonl", *TASK, "--world_size", "0"), ("world_size=0", ">= 1")),
    "inspect: --world_size above the rows": (
        ("inspect", "data.jsonl", *TASK, "--world_size", "1000000000"),
        ("world_size=1000000000", "24 samples", "fewer ranks"),
    ),
    "inspect: --html a directory": (
        ("inspect", "data.jsonl", *TASK, "--html", "dir"),
        ("--html dir", "Name a file"),
    ),
    "inspect: --html below a file": (
        ("inspect", "data.jsonl", *TASK, "--html", "data.jsonl/x.html"),
        ("--html data.jsonl/x.html", "Name a file"),
    ),
    "inspect: --html too long": (("inspect", "data.jsonl", *TASK, "--html", LONG), (f"--html {LONG}", "Name a file")),
    "inspect: --tokenizer a file": (
        ("inspect", "data.jsonl", *TASK, "--tokenizer", "data.jsonl"),
        ("--tokenizer='data.jsonl'", "Give a hub name"),
    ),
    "inspect: --tokenizer an empty directory": (
        ("inspect", "data.jsonl", *TASK, "--tokenizer", "dir"),
        ("--tokenizer='dir'", "Give a hub name"),
    ),
    "inspect: length without a tokenizer": (
        ("inspect", "data.jsonl", "--commonit_metric", "length"),
        ("commonit_metric='length'", "add --tokenizer"),
    ),
    "inspect: --load nothing": (
        ("inspect", "data.jsonl", "--load", "dir"),
        ("dir/groups.json", "groups again"),
    ),
    "inspect: --load a file": (
        ("inspect", "data.jsonl", "--load", "data.jsonl"),
        ("data.jsonl/groups.json", "groups again"),
    ),
    "inspect: --load that clears the screen": (
        ("inspect", "data.jsonl", "--load", "\x1b[2J"),
        ("\\u001b[2J", "groups again"),
    ),
    "inspect: --axolotl and data": (
        ("inspect", "data.jsonl", "--axolotl", "r.yml"),
        ("--axolotl r.yml", "data.jsonl", "stand in the recipe"),
    ),
    "inspect: one of two files missing": (
        ("inspect", "data.jsonl", "gone.jsonl", *TASK),
        ("datasets: path='gone.jsonl'", "give a hub name"),
    ),
    "inspect: an unknown option": (("inspect", "data.jsonl", *TASK, "--htm", "x"), ("htm", "did you mean")),
    "group: no --output": (("group", "data.jsonl", *TASK), ("--output", "required")),
    "group: --output a file": (
        ("group", "data.jsonl", *TASK, "--output", "data.jsonl"),
        ("--output data.jsonl", "that this user may write"),
    ),
    "group: --output below a file": (
        ("group", "data.jsonl", *TASK, "--output", "data.jsonl/x"),
        ("--output data.jsonl/x", "that this user may write"),
    ),
    "group: data without rows of the loaded groups": (
        ("group", "other.jsonl", "--load", "saved", "--output", "x"),
        ("--load saved", "all 5 rows are unassigned"),
    ),
    "group: another metric than the loaded": (
        ("group", "data.jsonl", "--load", "saved", "--commonit_metric", "length", "--output", "x"),
        ("commonit_metric=length", "--load saved", "Remove one"),
    ),
    "demo: --max_steps 0": (("demo", "--max_steps", "0"), ("--max_steps 0", "1 or more")),
    "demo: --max_steps many": (("demo", "--max_steps", "many"), ("--max_steps", "'many'", "invalid int")),
    "demo: --seed negative": (("demo", "--seed", "-1"), ("--seed -1", "give 0 to")),
    "demo: --output_dir a file": (("demo", "--output_dir", "data.jsonl"), ("--output_dir data.jsonl", "name a dir")),
    "demo: an unknown option": (("demo", "--steps", "3"), ("--steps", "unrecognized")),
}


@pytest.mark.parametrize("name", COMMAND_CASES)
def test_the_other_commands_refuse(name, tmp_path, capfd):
    """No model is named, and none is there."""
    argv, says = COMMAND_CASES[name]
    write(tmp_path / "data.jsonl", ROWS)
    write(tmp_path / "other.jsonl", rows_of_task("walk", 5))
    (tmp_path / "dir").mkdir()
    if "saved" in argv:
        assert cli.main(["group", "data.jsonl", *TASK, "--output", "saved"]) == 0
    front_end = f"commonit {argv[0]}" if argv and argv[0] in cli.COMMANDS else "commonit"
    refuse(tmp_path, capfd, front_end, name, argv, says, NOTHING)


# --- saved groups -------------------------------------------------------------------------------------------------


def changed(**keys: Any) -> Any:
    """`groups.json` with other values; `...` takes a key out."""

    def change(directory: Path) -> None:
        path = directory / "groups.json"
        saved = {**json.loads(path.read_text(encoding="utf-8")), **keys}
        path.write_text(json.dumps({key: value for key, value in saved.items() if value is not ...}), encoding="utf-8")

    return change


def replaced(content: bytes, name: str = "groups.json") -> Any:
    return lambda directory: (directory / name).write_bytes(content)


def with_arrays(**arrays: Any) -> Any:
    return lambda directory: save_file(arrays, directory / "groups.safetensors")


PICKLE = b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'ran'\ntRtR."
GROUP_CASES = {
    "no content": replaced(b""),
    "no text": replaced(b"\xff\xfe"),
    "a pickle for JSON": replaced(PICKLE),
    "a list": replaced(b"[]"),
    "nothing": replaced(b"null"),
    "of another version": changed(format=99),
    "of no version": changed(format=...),
    "of an unknown metric": changed(metric="../../x"),
    "of no names": changed(names=...),
    "of no options": changed(options=None),
    "of unknown options": changed(options={"x": 1}),
    "no arrays": lambda directory: (directory / "groups.safetensors").unlink(),
    "a pickle for arrays": replaced(PICKLE, "groups.safetensors"),
    "arrays that break off": lambda directory: os.truncate(directory / "groups.safetensors", 99),
    "arrays of other names": with_arrays(other=np.zeros((3, 8), np.float32)),
    "arrays of another shape": with_arrays(centroids=np.zeros(3, np.float32)),
    "arrays of other groups": with_arrays(centroids=np.zeros((2, 8), np.float32)),
}


@pytest.mark.parametrize("name", GROUP_CASES)
def test_damaged_groups_are_refused(name, model, tmp_path, capfd):
    write(tmp_path / "data.jsonl", ROWS)
    options = ["--commonit_metric", "embedding", "--commonit_embedding_model", model, "--commonit_num_groups", "3"]
    assert cli.main(["group", "data.jsonl", *options, "--output", "saved"]) == 0
    GROUP_CASES[name](tmp_path / "saved")
    argv = ["inspect", "data.jsonl", "--load", "saved"]
    refuse(tmp_path, capfd, "saved groups", name, argv, ("saved/groups.", "groups again"), MODEL)
    assert not (tmp_path / "ran").exists()


# --- Python -------------------------------------------------------------------------------------------------------

MISSING = "no-such-owner/no-such-model"  # loading it would be another error
PYTHON_CASES = {
    # name: (rows, changes to the arguments, what the line says)
    "no metric": (ROWS, {"commonit_metric": None}, ("commonit_metric", "not set", "'none'")),
    "a metric that is no text": (ROWS, {"commonit_metric": 3}, ("commonit_metric='3'", "task, length")),
    "a column that is no text": (ROWS, {"commonit_task_column": {"a": 1}}, ("commonit_task_column={'a': 1}", "list")),
    "no column": (ROWS, {"commonit_task_column": []}, ("commonit_task_column=[]", "remove the option")),
    "an unknown column": (ROWS, {"commonit_task_column": "k"}, ("commonit_task_column='k'", "did you mean")),
    "an object for a number": (
        ROWS,
        {"commonit_min_group_size": object()},
        ("commonit_min_group_size=<object", "Merge"),
    ),
    "weights of no number": (ROWS, {"commonit_weights": {"add": "1"}}, ("commonit_weights", "'1'", "number >= 0")),
    "no weighting": (ROWS, {"commonit_weights": None}, ("commonit_weights=None", "'proportional'")),
    "an unknown option": (ROWS, {"commonit_matric": "task"}, ("commonit_matric", "did you mean commonit_metric?")),
    "a list of rows": (list(ROWS), {}, ("train_dataset is a list", "Dataset.from_list")),
    "a stream": (
        IterableDataset.from_generator(lambda: iter(ROWS)),
        {},
        ("train_dataset is a IterableDataset", "not streaming"),
    ),
    "splits": (
        DatasetDict({"train": Dataset.from_list(ROWS)}),
        {},
        ("train_dataset is a DatasetDict", "give a datasets.Dataset"),
    ),
    "no rows": (Dataset.from_list(ROWS).select([]), {}, ("train_dataset", "no rows")),
    "rows without a task": (
        Dataset.from_list(ROWS).remove_columns("task"),
        {},
        ("commonit_metric='task'", "prompt, completion", "commonit_task_column"),
    ),
    "packs without a length": (
        ROWS,
        {"packing": True, "max_length": None},
        ("packing=True", "max_length", "set max"),
    ),
    "incomplete batches dropped": (
        ROWS,
        {"dataloader_drop_last": True},
        ("dataloader_drop_last=True", "commonit_remainder='drop'"),
    ),
    "data skipped by nobody": (ROWS, {"ignore_data_skip": True}, ("ignore_data_skip=True", "set it to False")),
}
NEED_A_MODEL = {"packs without a length"}


@pytest.mark.parametrize("name", PYTHON_CASES)
def test_the_trainer_refuses(name, tmp_path):
    rows, options, says = PYTHON_CASES[name]
    if rows is ROWS:
        rows = Dataset.from_list(ROWS)

    def call():
        with pytest.raises(ValueError) as error:
            make_trainer(tmp_path, rows, model="llama" if name in NEED_A_MODEL else MISSING, **options)
        return str(error.value)

    line, seconds = timed(tmp_path, call)
    check_refusal(line, says)
    record("Python", name, "ValueError", line, NONE if name in NEED_A_MODEL else MODEL, seconds)


# --- checkpoints --------------------------------------------------------------------------------------------------

CHECKPOINT_CASES = {
    "no JSON": lambda path: path.write_bytes(b"{"),
    "a pickle": lambda path: path.write_bytes(PICKLE),
    "a list": lambda path: path.write_bytes(b"[]"),
    "without its plan": lambda path: path.write_bytes(b"{}"),
}


@pytest.mark.parametrize("name", CHECKPOINT_CASES)
def test_damaged_checkpoints_are_refused(name, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, id_rows([4, 4]), **steps).train()
    CHECKPOINT_CASES[name](tmp_path / "out" / "checkpoint-1" / "commonit" / "run.json")
    trainer = make_trainer(tmp_path, id_rows([4, 4]), **steps)

    def call():
        with pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        return str(error.value)

    line, seconds = timed(tmp_path, call)
    check_refusal(line, ("checkpoint-1/commonit/run.json", "damaged", "another checkpoint"))
    record("checkpoint", f"run.json: {name}", "ValueError", line, NONE, seconds)
    assert not (tmp_path / "ran").exists()


# --- odd, and right -----------------------------------------------------------------------------------------------


def numbered(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    """Rows of which each column is a list to take from in turn, or a value."""
    return [
        {
            **row(f"q{n}", f"a{n}", f"t{n % 2}"),
            **{name: value[n % len(value)] if isinstance(value, list) else value for name, value in columns.items()},
        }
        for n in range(count)
    ]


HEBREW, ARABIC = "שלום", "مرحبا"
FINE = {
    # name: (rows, options, names of the groups)
    "one row": (numbered(1), {}, ["t0"]),
    "one group": (numbered(task="x"), {}, ["x"]),
    "a group a row": (numbered(task=[f"{n}" for n in range(8)]), {}, [f"{n}" for n in range(8)]),
    "responses of one token": (numbered(completion=""), LENGTH, ["response of any length"]),
    "no label": (numbered(task=None), {}, ["(no label)"]),
    "some labels": (numbered(task=["x", None, "", " \n"]), {}, ["(no label)", "x"]),
    "labels that are numbers": (numbered(task=[0, 1]), {}, ["0", "1"]),
    "labels that are fractions": (numbered(task=[0.5, float("nan")]), {}, ["(no label)", "0.5"]),
    "labels that are truths": (numbered(task=[True, False]), {}, ["False", "True"]),
    "labels that look like ours": (
        numbered(task=["(no label)", "other", "(unseen task)", None]),
        {},
        ["(no label)", "(unseen task)", "other"],
    ),
    "emoji": (
        numbered(prompt="👩‍👩‍👧‍👦 ", completion="🇩🇪", task=["😀", "👩‍👩‍👧‍👦"]),
        {},
        ["👩‍👩‍👧‍👦", "😀"],
    ),
    "right to left": (numbered(prompt=HEBREW, completion=ARABIC, task=[HEBREW, ARABIC]), {}, [HEBREW, ARABIC]),
    "NUL bytes": (numbered(prompt="a\0b", completion="\0", task=["n\0ul", "x"]), {}, ["n\0ul", "x"]),
    "escape sequences": (
        numbered(prompt=ESCAPES, completion=ESCAPES, task=[f"a{ESCAPES}b", "\x1b]8;;http://x\x07y"]),
        {},
        ["\x1b]8;;http://x\x07y", f"a{ESCAPES}b"],
    ),
    "markup": (
        numbered(prompt="[red]", completion="</script>", task=["[bold red]x[/]", "<script>alert(1)</script>", "{x}%s"]),
        {},
        ["<script>alert(1)</script>", "[bold red]x[/]", "{x}%s"],
    ),
    "labels like paths": (
        numbered(task=["../../ran", "/etc/ran", "a/b\\c", "." * 300]),
        {},
        ["." * 300, "../../ran", "/etc/ran", "a/b\\c"],
    ),
    "a long label": (numbered(task=["x" * 10_000, "y"]), {}, ["x" * 10_000, "y"]),
    "more groups asked for than rows": (
        numbered(completion=["a" * n for n in range(8)]),
        {**LENGTH, "commonit_num_groups": 1000},
        None,
    ),
    "groups below the least size": (numbered(), {"commonit_min_group_size": 10**9}, ["other"]),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_right_trains(name, tmp_path):
    rows, options, names = FINE[name]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), commonit_report=True, **options)
    seen = Seen(trainer)
    trainer.train()
    texts = sorted(found.text.removesuffix("<eos>") for found in seen.rows.elements())
    assert texts == sorted(row["prompt"] + row["completion"] for row in rows)
    if names is not None:
        assert trainer.commonit_grouper.names == names
    written = {path.name for path in files_in(tmp_path)}
    assert written <= {"report.html", "groups.json", "run.json"}
    assert not acting(ledger_table(trainer.commonit.summary()), but="\n")


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_right_is_inspected(name, weightless, tmp_path, capfd):
    rows, options, names = FINE[name]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    argv = ["inspect", "data.parquet", "--tokenizer", weightless, *as_argv({"commonit_metric": "task", **options})]
    argv += ["--html", "report.html"]
    capfd.readouterr()
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert not acting(out, but="\n") and not acting(err, but="\n\r")
    assert cli.main([*argv, "--json"]) == 0
    (shown,) = json.loads(capfd.readouterr().out)["inspections"]
    assert sum(group["rows"] for group in shown["groups"]) == len(rows)
    if names is not None:
        assert [group["name"] for group in shown["groups"]] == names
    assert {path.name for path in files_in(tmp_path)} == {"data.parquet", "report.html"}


def test_rows_longer_than_the_context_are_cut_or_left_out(tmp_path):
    """TRL leaves out rows of whose response nothing is left; the others are all trained."""
    rows = [*numbered(), row("q", "a" * 99, "t0"), row("q" * 99, "a", "t1")]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), max_length=20)
    seen = Seen(trainer)
    trainer.train()
    assert sorted(len(found.tokens) for found in seen.rows.elements()) == [*[5] * 8, 20]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b", "task": "x"}\n' * 4),
        ("crlf.jsonl", b'{"prompt": "a", "completion": "b", "task": "x"}\r\n' * 4),
        ("headings twice.csv", b"prompt,completion,task,task\n" + b"a,b,x,y\n" * 4),
        ("a b\n[red]<b>\x1b[2J'.jsonl", b'{"prompt": "a", "completion": "b", "task": "x"}\n' * 4),
    ],
)
def test_odd_files_train(name, content, model, tmp_path, capfd):
    write(tmp_path / name, content)
    assert cli.main(["sft", *as_argv({**sft_flags(model), "dataset_name": name, "output_dir": f"out {name}"})]) == 0
    out, err = capfd.readouterr()
    assert not acting(out, but="\n") and "\x1b" not in err
    assert json.loads((tmp_path / f"out {name}" / "commonit" / "groups.json").read_text())["names"] == ["x"]


def test_a_million_distinct_labels(tmp_path, capfd):
    """Each row is a group, a step and a line of the assignment; tables and report show the largest."""
    count = 1_000_000
    data = Dataset.from_dict({"task": [f"label {n}" for n in range(count)]})
    data.to_parquet(tmp_path / "data.parquet")
    argv = ["data.parquet", *TASK, "--per_device_train_batch_size", "1"]
    assert cli.main(["group", *argv, "--output", "saved"]) == 0
    assert "and 999,970 smaller groups." in capfd.readouterr().out
    ids = pq.read_table(tmp_path / "saved" / "assignment.parquet")["group"].to_numpy()
    assert np.array_equal(np.sort(ids), np.arange(count))
