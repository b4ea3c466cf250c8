"""Wrong input to `commonit`: each user error is one safe line, exit code 2, no file, before anything heavy is loaded.

A key of a table holds the options as a user writes them, its value the parts of the line: the option with its value,
and the fix. Where a model must not be loaded yet, the model does not exist or has no weights. The rules of `config.py`
are tested in tests/unit/test_config.py; of them, one case a front end is here. Odd but valid data train whole.
"""

import json
import re
import shlex
import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from helpers.bad_input import PICKLE, acting, check_refusal, error_of, files_in, no_new_file
from helpers.trainers import SFT_FLAGS, Seen, as_argv, make_trainer, rows_of_task, write_jsonl
from safetensors.numpy import save_file

from commonit_trl.cli import main as cli
from commonit_trl.report import summary_table

pytestmark = pytest.mark.usefixtures("in_tmp_path")

NOTHING, MODEL, NONE = "anything is loaded", "a model is loaded", ""  # what an error comes before
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b5m\r\x08\u202e\u2066\x00"
LONG = "a" * 300


def row(prompt: Any = "a", completion: Any = "b", task: Any = "x") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "task": task}


ROWS = [row for task in ("add", "sort", "spell") for row in rows_of_task(task, 8)]
LENGTH = {"commonit_metric": "length"}


@pytest.fixture(scope="session")
def weightless(model, tmp_path_factory):
    """The directory of a model without its weights."""
    directory = tmp_path_factory.mktemp("weightless")
    shutil.copytree(model, directory, dirs_exist_ok=True)
    (directory / "model.safetensors").unlink()
    return str(directory)


@pytest.fixture
def files(tmp_path):
    """The files that the tables name."""
    for name in ("dir", "d.jsonl", "script", "strange"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    write_jsonl(tmp_path / "types.jsonl", [{"prompt": 1, "completion": 2, "task": [3]}] * 3)
    write_jsonl(tmp_path / "unlabelled.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    write_jsonl(tmp_path / "walk.jsonl", rows_of_task("walk", 5))
    (tmp_path / "bad.jsonl.gz").write_text("not gzip")
    (tmp_path / "script" / "script.py").write_text("open('ran', 'w')")
    (tmp_path / "rows.pkl").write_bytes(PICKLE)
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "split"))
    return tmp_path


def sft_flags(model):
    return {
        "model_name_or_path": model,
        "dataset_name": "data.jsonl",
        "output_dir": "out",
        "commonit_metric": "task",
        "max_steps": 2,
        **SFT_FLAGS,
    }


def sft_argv(model, options):
    """`commonit sft` with these options instead of its own; `-name` leaves one out."""
    words = shlex.split(options)
    left_out = {word for word in words if re.match("-[a-z]", word)}
    own = {name: value for name, value in sft_flags(model).items() if not {f"-{name}", f"--{name}"} & {*words}}
    return ["sft", *as_argv(own), *(word for word in words if word not in left_out)]


def check_refused(tmp_path, capfd, argv, says):
    """Run the command line, which must end as one line that has the parts of `says`."""
    with no_new_file(tmp_path):
        line = error_of(capfd, argv)
    check_refusal(line, says.split(" | "))
    assert not (tmp_path / "ran").exists()


# --- commonit sft -------------------------------------------------------------------------------------------------

EMBEDDING = "--commonit_metric embedding"
FLAGS = {
    NOTHING: {
        "--commonit_metric lenght": "commonit_metric='lenght' | did you mean 'length'",
        "-commonit_metric": "commonit_metric is not set | 'none'",
        "--commonit_metric '\x1b[2Jtask'": "commonit_metric='\\x1b[2Jtask' | did you mean 'task'",
        "--commonit_weights '{\"add\": 1'": "commonit_weights='{\"add\": 1' is not JSON",
        "--commonit_min_group_size 2.5": "--commonit_min_group_size | '2.5' | invalid int",
        "--commonit_report maybe": "--commonit_report | maybe | yes/no",
        "--commonit-num-group 3": "commonit_num_group | did you mean commonit_num_groups?",
        "--commonit_min 3": "commonit_min | did you mean commonit_m",
        "--learning_rte 1": "learning_rte | did you mean learning_rate?",
        "--warmup_steps -1": "warmup_steps",
        "stray": "'stray' | option",
        "--model_name_or_path ''": "model_name_or_path='' | Give a hub name",
        "-model_name_or_path": "model_name_or_path is not set",
        "--model_name_or_path data.jsonl": "model_name_or_path='data.jsonl' | Give a hub name",
        "--model_name_or_path strange": "model_name_or_path='strange' | Give a hub name",
        "--model_name_or_path '\x1b[2Jx'": "model_name_or_path='\\x1b[2Jx' | Give a hub name",
        "--output_dir data.jsonl": "output_dir='data.jsonl' | that this user may write",
        "--output_dir data.jsonl/out": "output_dir='data.jsonl/out' | that this user may write",
        "--resume_from_checkpoint gone": "resume_from_checkpoint='gone' | Name a checkpoint",
        "--per_device_train_batch_size 0": "per_device_train_batch_size=0 | at least 1",
        "--max_length 0": "max_length=0 | at least 1",
        "--seed -1": "seed=-1 | at least 0",
        f"--data_seed {2**32}": "data_seed=4294967296 | at most 4294967295",
        "--num_processes many": "--num_processes | 'many' | invalid int",
        "--num_proceses 2": "num_proceses | did you mean num_processes?",
        "--num_processes 2 stray": "'stray' | Remove it",
        "--accelerate_config zero9": "zero9 | neither a file",
        "--config gone.yaml": "--config gone.yaml | name a YAML file",
        "--config dir": "--config dir | name a YAML file",
        "--config '\x1b[2J.yaml'": "u001b[2J | name a YAML file",
        "--config": "--config | expected one argument",
    },
    MODEL: {
        "--commonit_task_column task kind": "commonit_task_column='kind' | prompt, completion | Name one",
        "--train_sampling_strategy group_by_length": "train_sampling_strategy='group_by_length' | 'random'",
        "--dataset_streaming True": "dataset_streaming=True | set it to False",
        "--eval_strategy epoch": "eval_strategy='epoch' | 'test' | has: train | eval_strategy='no'",
        "--dataset_train_split all": "'all' | has: train | Set dataset_train_split",
        "-dataset_name": "dataset_name | datasets",
        "--datasets data.jsonl --dataset_name x": "dataset_name='x' | 1 entries in datasets",
        "-dataset_name --datasets gone.csv": "datasets | 'gone.csv' | no such file",
        "-dataset_name --datasets split --dataset_train_split x": "datasets | 'split' | give a hub name",
        "--dataset_name split --dataset_config en": "dataset_name='split' | name='en' | save_to_disk",
        "--dataset_name no/where": "dataset_name='no/where' | give a hub name",
        "--dataset_name gone.jsonl": "dataset_name='gone.jsonl' | no such file | give a hub name",
        "--dataset_name 'gone/*.jsonl'": "dataset_name='gone/*.jsonl' | no such file",
        "--dataset_name bad.jsonl.gz": "dataset_name='bad.jsonl.gz' | give a hub name",
        "--dataset_name '\x1b[2J.jsonl'": "dataset_name='\\x1b[2J.jsonl' | give a hub name",
        "--dataset_name d.jsonl": "dataset_name='d.jsonl' | give a hub name",
        "--dataset_name dir": "dataset_name='dir' | give a hub name",
        "--dataset_name script": "dataset_name='script' | give a hub name",
        "--dataset_name rows.pkl": "dataset_name='rows.pkl' | give a hub name",
    },
    NONE: {
        f"{EMBEDDING} --commonit_embedding_model no/where": "commonit_embedding_model='no/where' | local path",
        f"{EMBEDDING} --commonit_embedding_model data.jsonl": "commonit_embedding_model='data.jsonl' | local path",
        f"{EMBEDDING} --commonit_reference_dataset gone.csv": "commonit_reference_dataset='gone.csv' | no such file",
        f"{EMBEDDING} --commonit_reference_dataset unlabelled.jsonl": (
            "commonit_reference_task_column='task' | commonit_reference_dataset='unlabelled.jsonl' | prompt, completion"
        ),
        "--commonit_remainder drop --per_device_train_batch_size 9": "remainder='drop' | largest group has 8 | 'keep'",
        '--commonit_weights \'{"ad": 1, "sort": 1, "spell": 1}\'': "commonit_weights | 'ad' | did you mean 'add'",
        "--commonit_weights '{\"add\": 1}'": "commonit_weights | 'sort', 'spell' | give each group one",
        "--commonit_cache_dir data.jsonl": "commonit_cache_dir='data.jsonl' | that this user may write",
        f"--commonit_cache_dir {LONG}": f"commonit_cache_dir='{LONG}' | that this user may write",
        "--gradient_accumulation_steps 25": "24 samples | 25 | less gradient accumulation",
    },
}


@pytest.mark.parametrize(("before", "options"), [(before, options) for before in FLAGS for options in FLAGS[before]])
def test_sft_flags(before, options, model, weightless, files, capfd):
    argv = sft_argv({NOTHING: "no/model", MODEL: weightless, NONE: model}[before], options)
    check_refused(files, capfd, argv, FLAGS[before][options])


YAML: dict[str | bytes, str] = {
    b"\xff\xfe\x00\x80": "--config c.yaml | not YAML",
    "commonit_metric: !!python/object/apply:pathlib.Path.touch [ran]": "--config c.yaml | not YAML",
    "commonit_metric: [task": "--config c.yaml | not YAML",
    "commonit_weights: " + "[" * 5000: "--config c.yaml | not YAML",
    "": "--config c.yaml | no options",
    "- commonit_metric: task": "--config c.yaml | write lines such as",
    "1: 2": "Unknown option 1 | Write a name",
    "env: 3": "env",
    "commonit_metrics: task": "commonit_metrics | did you mean commonit_metric?",
    "commonit-metrics: task": "commonit-metrics | did you mean commonit_metric?",
    "commonit_metric: off": "commonit_metric=False | 'none' (",
    "learning_rte: 1": "learning_rte | did you mean learning_rate?",
    "logging_steps: many": "logging_steps='many'",
    "output_dir: 3": "output_dir=3 | Change",
    "max_steps: [1]": "max_steps=[1] | Change",
    "seed: 1.5": "seed=1.5 | Change",
    "max_steps:": "max_steps=None | Change",
    "commonit_weights: {add: .nan}": "commonit_weights | nan | number >= 0",
    "datasets: data.jsonl": "datasets='data.jsonl' | - path:",
    "datasets: [data.jsonl]": "'data.jsonl' | - path:",
    "datasets: 3": "datasets=3 | - path:",
    "datasets: [{split: train}]": "datasets | no path | - path:",
    "datasets: [{path: data.jsonl, splt: train}]": "splt | did you mean split?",
    "datasets: [{path: 3}]": "datasets: path=3 | Change",
    "datasets: [{path: data.jsonl, fraction: half}]": "datasets: fraction='half' | Change",
}
MIXTURES = {
    "[{path: data.jsonl, fraction: 0}]": "datasets | [0] | not all 0",
    "[{path: data.jsonl, fraction: 1}, {path: data.jsonl}]": "datasets | [1, None]",
    "[{path: data.jsonl, columns: [nope]}]": "datasets: columns=['nope'] | some of task, prompt, completion",
    "[{path: data.jsonl, columns: [prompt, prompt, completion]}]": "datasets: columns= | each once",
    "[{path: data.jsonl}, {path: types.jsonl}]": "datasets | do not go together | columns:",
}


@pytest.mark.parametrize("text", [*YAML, *(f"datasets: {entries}" for entries in MIXTURES)], ids=repr)
def test_sft_yaml(text, weightless, files, capfd):
    """Flags override the file, so the options of the file are no flags."""
    (files / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    absent = " ".join(f"-{name}" for name in ("output_dir", "max_steps", "dataset_name") if name[:7] in str(text))
    metric = "-commonit_metric" if "off" in str(text) else ""
    before, says = (NOTHING, YAML[text]) if text in YAML else (MODEL, MIXTURES[text.removeprefix("datasets: ")])
    argv = sft_argv("no/model" if before == NOTHING else weightless, f"--config c.yaml {absent} {metric}")
    check_refused(files, capfd, argv, says)


def test_sft_inside_another_launcher(files, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    argv = sft_argv("no/model", "--num_processes 2")
    says = "--num_processes | another launcher | Remove the option"
    check_refused(files, capfd, argv, says)


# --- data ---------------------------------------------------------------------------------------------------------

TOKENS = {"input_ids": [1, 2], "task": "x"}
DATA: dict[str, tuple[Any, str]] = {
    # name: (the file, its suffix after a comma; parts of the line)
    "an empty file": ("", "it is empty | has rows"),
    "blank lines": ("\n\n\n", "has rows"),
    "rows without columns": ([{}] * 4, "has rows"),
    "numbers instead of rows": ("3\n4\n", "has rows"),
    "an incomplete row": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a', "JSON parse error | rows"),
    "a key given twice": ('{"prompt": "a", "prompt": "b", "task": "x"}\n', "twice | has rows"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "completion": "b"}\n', "surrogate | has rows"),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "b", "task": "x"}\n', "'prompt' | UTF-8"),
    "not Parquet, parquet": (b"PAR1 no", "Parquet | has rows"),
    "a header alone, csv": ("prompt,completion,task\n", "has rows"),
    "a missing prompt": ([*ROWS, row(prompt=None)], "'prompt' | 1 of 25 | row 24 | remove them"),
    "missing responses": ([row(completion=None)] * 4, "'completion' | 4 of 4 | remove them"),
    "numeric prompts": ([row(prompt=1)] * 4, "'prompt' | int64 | make that text"),
    "prompts that are lists": ([row(prompt=["a"])] * 4, "'prompt' | list | make that text or messages"),
    "prompts alone": ([{"prompt": "a", "task": "x"}] * 4, "'completion' | 'prompt', 'task' | give prompt"),
    "no text": ([{"kind": "a", "task": "x"}] * 4, "'text' | 'kind', 'task' | dataset_text_field"),
    "missing texts": ([{"text": None, "task": "x"}] * 4, "'text' | 4 of 4 | remove them"),
    "messages that are text": ([{"messages": "hello", "task": "x"}] * 4, "'messages' | text | make that"),
    "an empty conversation": (
        [{"messages": turns, "task": "x"} for turns in ([], [{"role": "user", "content": "a"}])],
        "'messages' | row 0 | remove it",
    ),
    "tokens that are text": ([TOKENS | {"input_ids": ["a"]}] * 4, "'input_ids' | string | token ids"),
    "negative tokens": ([TOKENS | {"input_ids": [1, -5]}] * 4, "'input_ids' | below 0 | token ids"),
    "too few labels": ([TOKENS | {"labels": [1]}] * 4, "row 0 | labels | give each token a label"),
}
LABELS = {
    "labels that are lists": ([row(task=["x"])] * 4, "commonit_task_column='task' | list | name a column"),
    "a column with an escape sequence": (
        [{"prompt": "a", "completion": "b", "\x1b[2J": "x"}] * 4,
        "\\u001b[2J | commonit_task_column",
    ),
}


@pytest.mark.parametrize("name", DATA | LABELS)
def test_data(name, model, weightless, tmp_path, capfd):
    content, says = (DATA | LABELS)[name]
    file = f"bad.{name.partition(', ')[2] or 'jsonl'}"
    if isinstance(content, list):
        write_jsonl(tmp_path / file, content)
    else:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    says = f"dataset_name='{file}' | {says}" if name in DATA else says
    argv = sft_argv(model if name == "labels that are lists" else weightless, f"--dataset_name {file}")
    check_refused(tmp_path, capfd, argv, says)


# --- commonit inspect, group, demo --------------------------------------------------------------------------------

COMMANDS = {
    "": "COMMAND | required",
    "stf": "COMMAND | 'stf' | 'sft'",
    "'\x1b[2J'": "COMMAND | '\\x1b[2J' | 'sft'",
    "inspect data.jsonl": "commonit_metric is not set | --commonit_metric task",
    "inspect data.jsonl --commonit_metric none": "commonit_metric='none' | task, length",
    "inspect data.jsonl --compare ''": "--compare='' | task, length",
    "inspect data.jsonl --compare task,size": "--compare='size' | task, length",
    "inspect data.jsonl TASK --world_size 0": "world_size=0 | >= 1",
    "inspect data.jsonl TASK --world_size 1000000000": "world_size=1000000000 | 24 samples | fewer ranks",
    "inspect data.jsonl TASK --html dir": "--html dir | Name a file",
    "inspect data.jsonl TASK --tokenizer no/where": "--tokenizer='no/where' | Give a hub name",
    "inspect data.jsonl --commonit_metric length": "commonit_metric='length' | add --tokenizer",
    "inspect data.jsonl --load dir": "dir/groups.json | groups again",
    "inspect data.jsonl --axolotl r.yml": "--axolotl r.yml | data.jsonl | Remove one",
    "inspect data.jsonl gone.jsonl TASK": "datasets: path='gone.jsonl' | give a hub name",
    "inspect TASK": "dataset_name=None | datasets | give one",
    "inspect data.jsonl TASK --htm x": "htm | did you mean",
    "inspect data.jsonl TASK --commonit_length_of total": "commonit_length_of='total' | 'length' | remove it",
    "group data.jsonl TASK": "--output | required",
    "group data.jsonl TASK --output data.jsonl": "--output data.jsonl | that this user may write",
    "group data.jsonl TASK --output x --world_size 2": "Unknown option world_size",
    "group walk.jsonl --load saved --output x": "--load saved | all 5 rows are unassigned",
    "group data.jsonl --load saved --commonit_metric length --output x": "commonit_metric=length | --load saved",
    "group data.jsonl --load saved --commonit_min_group_size 3 --output x": "commonit_min_group_size=3 | --load saved",
    "group data.jsonl --load saved --commonit_length_of total --output x": "commonit_length_of='total' | 'length'",
    "demo --max_steps 0": "max_steps=0 | at least 1",
    "demo --seed -1": "seed=-1 | at least 0",
    "demo --output_dir data.jsonl": "output_dir='data.jsonl' | name a dir",
    "demo --steps 3": "--steps | unrecognized",
}
TASK = ("--commonit_metric", "task")


@pytest.mark.parametrize("line", COMMANDS)
def test_the_other_commands(line, files, capfd):
    """No option names a model."""
    argv = shlex.split(line.replace("TASK", " ".join(TASK)))
    if "saved" in argv:
        assert cli.main(["group", "data.jsonl", *TASK, "--output", "saved"]) == 0
    check_refused(files, capfd, argv, COMMANDS[line])


# --- saved groups -------------------------------------------------------------------------------------------------

DAMAGE = {
    "a pickle for JSON": lambda saved: (saved / "groups.json").write_bytes(PICKLE),
    "a pickle for arrays": lambda saved: (saved / "groups.safetensors").write_bytes(PICKLE),
    "arrays of other names": lambda saved: save_file({"x": np.zeros((3, 8))}, saved / "groups.safetensors"),
    "arrays of another shape": lambda saved: save_file({"centroids": np.zeros(3)}, saved / "groups.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_groups(name, model, files, capfd):
    options = ["--commonit_metric", "embedding", "--commonit_embedding_model", model, "--commonit_num_groups", "3"]
    assert cli.main(["group", "data.jsonl", *options, "--output", "saved"]) == 0
    DAMAGE[name](files / "saved")
    check_refused(files, capfd, ["inspect", "data.jsonl", "--load", "saved"], "saved/groups. | groups again")


# --- odd but valid ------------------------------------------------------------------------------------------------


def numbered(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    """Return `count` rows; a column is one value, or a list whose values repeat."""
    return [
        {
            **row(f"q{n}", f"a{n}", f"t{n % 2}"),
            **{name: value[n % len(value)] if isinstance(value, list) else value for name, value in columns.items()},
        }
        for n in range(count)
    ]


HEBREW, ARABIC = "שלום", "مرحبا"
VALID = {
    # name: (rows, options, names of the groups)
    "one row": (numbered(1), {}, ["t0"]),
    "one group": (numbered(task="x"), {}, ["x"]),
    "one row per group": (numbered(task=[f"{n}" for n in range(8)]), {}, [f"{n}" for n in range(8)]),
    "responses of one token": (numbered(completion=""), LENGTH, ["response of any length"]),
    "no label": (numbered(task=None), {}, ["(no label)"]),
    "some labels": (numbered(task=["x", None, "", " \n"]), {}, ["(no label)", "x"]),
    "reserved labels": (
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
    "more groups than rows": (
        numbered(completion=["a" * n for n in range(8)]),
        {**LENGTH, "commonit_num_groups": 1000},
        None,
    ),
    "all groups below the minimum size": (numbered(), {"commonit_min_group_size": 10**9}, ["other"]),
}


@pytest.mark.parametrize("name", VALID)
def test_odd_but_valid_data_train(name, tmp_path):
    rows, options, names = VALID[name]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), commonit_report=True, **options)
    seen = Seen(trainer)
    trainer.train()
    texts = sorted(found.text.removesuffix("<eos>") for found in seen.rows.elements())
    assert texts == sorted(row["prompt"] + row["completion"] for row in rows)
    if names is not None:
        assert trainer.commonit_grouper.names == names
    written = {path.name for path in files_in(tmp_path)}
    assert written <= {"report.html", "groups.json", "run.json"}
    assert not acting(summary_table(trainer.commonit.summary()), but="\n")


HOSTILE = ("emoji", "right to left", "NUL bytes", "escape sequences", "markup", "labels like paths", "a long label")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_inspected(name, weightless, tmp_path, capfd):
    rows, _, names = VALID[name]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    argv = ["inspect", "data.parquet", "--tokenizer", weightless, *TASK, "--html", "report.html"]
    capfd.readouterr()
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert not acting(out, but="\n") and not acting(err, but="\n\r")
    assert cli.main([*argv, "--json"]) == 0
    (shown,) = json.loads(capfd.readouterr().out)["inspections"]
    assert sum(group["rows"] for group in shown["groups"]) == len(rows)
    assert [group["name"] for group in shown["groups"]] == names
    assert {path.name for path in files_in(tmp_path)} == {"data.parquet", "report.html"}


def test_rows_longer_than_the_context_are_truncated_or_dropped(tmp_path):
    """TRL drops a row whose truncation leaves no response token; all others train."""
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
        ("duplicate header.csv", b"prompt,completion,task,task\n" + b"a,b,x,y\n" * 4),
        ("a b\n[red]<b>\x1b[2J'.jsonl", b'{"prompt": "a", "completion": "b", "task": "x"}\n' * 4),
    ],
)
def test_odd_files_train(name, content, model, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    assert cli.main(["sft", *as_argv({**sft_flags(model), "dataset_name": name, "output_dir": f"out {name}"})]) == 0
    out, err = capfd.readouterr()
    assert not acting(out, but="\n") and "\x1b" not in err
    assert json.loads((tmp_path / f"out {name}" / "commonit" / "groups.json").read_text())["names"] == ["x"]


@pytest.mark.slow
def test_a_million_distinct_labels(tmp_path, capfd):
    """Each row is a group and a step; the table shows the largest groups."""
    count = 1_000_000
    data = Dataset.from_dict({"task": [f"label {n}" for n in range(count)]})
    data.to_parquet(tmp_path / "data.parquet")
    argv = ["data.parquet", *TASK, "--per_device_train_batch_size", "1"]
    assert cli.main(["group", *argv, "--output", "saved"]) == 0
    assert "and 999,970 smaller groups." in capfd.readouterr().out
    ids = pq.read_table(tmp_path / "saved" / "assignment.parquet")["group"].to_numpy()
    assert np.array_equal(np.sort(ids), np.arange(count))
