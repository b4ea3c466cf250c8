"""Bad recipes and data are refused by `axolotl train` and `commonit inspect --axolotl`.

Each error is one line with the key, its value and the fix, and leaves no file behind. Keys are checked before the model
is loaded: the recipe's model does not exist, so loading it would raise another error.
"""

from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from helpers.axolotl_recipes import PLUGIN, make_rows, recipe, save_model, write_recipe, write_rows
from helpers.bad_input import check_refusal, record, timed

from commonit_trl.cli import main as cli
from commonit_trl.config import OPTIONS

ESCAPE = "\x1b[2J"
LENGTH = {"commonit_metric": "length"}
EMBEDDING = {"commonit_metric": "embedding"}
KEYS = {
    # name: (changed keys, parts of the message)
    "no metric": ({"commonit_metric": ...}, ("commonit_metric", "not set", "'none'")),
    "a metric of nothing": ({"commonit_metric": None}, ("commonit_metric", "not set", "'none'")),
    "a misspelt metric": ({"commonit_metric": "lenght"}, ("commonit_metric='lenght'", "did you mean 'length'")),
    "a metric that is yes": ({"commonit_metric": True}, ("commonit_metric=True", "'task', 'length', 'embedding'")),
    "a metric that is a list": ({"commonit_metric": ["task"]}, ("commonit_metric=['task']", "'task', 'length'")),
    "a metric that clears the screen": ({"commonit_metric": ESCAPE}, ("commonit_metric='\\x1b[2J'", "task, length")),
    "a misspelt key": ({"commonit_num_group": 4}, ("commonit_num_group", "did you mean commonit_num_groups?")),
    "a key with a dash": ({"commonit-metric": "task"}, ("commonit-metric", "did you mean commonit_metric?")),
    "an unread key": ({"commonit_task_column": "task"}, ("commonit_task_column=['task']", "'length'", "remove it")),
    "columns that are a mapping": (
        {"commonit_metric": "task", "commonit_task_column": {"a": 1}},
        ("commonit_task_column={'a': 1}", "label column"),
    ),
    "no groups": ({"commonit_num_groups": 0}, ("commonit_num_groups=0", "at least 1")),
    "a fraction of groups": ({"commonit_num_groups": 2.5}, ("commonit_num_groups=2.5", "Number of quantile bins")),
    "groups that are no number": ({"commonit_num_groups": float("nan")}, ("commonit_num_groups=nan", "Number of")),
    "another length": ({"commonit_length_of": "all"}, ("commonit_length_of='all'", "response, prompt, total")),
    "edges in one text": ({"commonit_length_edges": "64,256"}, ("commonit_length_edges='64,256'", "list")),
    "descending edges": ({"commonit_length_edges": [9, 3]}, ("commonit_length_edges=[9, 3]", "[64, 256]")),
    "another text": (
        {**EMBEDDING, "commonit_embedding_text": "all"},
        ("commonit_embedding_text='all'", "prompt, response, both"),
    ),
    "an encoder that is a list": (
        {**EMBEDDING, "commonit_embedding_model": ["a"]},
        ("commonit_embedding_model=['a']", "name or local path"),
    ),
    "another precision": (
        {**EMBEDDING, "commonit_embedding_dtype": "float8"},
        ("commonit_embedding_dtype='float8'", "auto, float32"),
    ),
    "another way to resume": ({"commonit_resume": "yes"}, ("commonit_resume='yes'", "exact, replan")),
    "a column of no reference": (
        {**EMBEDDING, "commonit_reference_task_column": "kind"},
        ("commonit_reference_task_column='kind'", "remove it"),
    ),
    "a reference and a number of groups": (
        {**EMBEDDING, "commonit_reference_dataset": "r.csv", "commonit_num_groups": 4},
        ("commonit_num_groups=4", "commonit_reference_dataset='r.csv'", "remove one"),
    ),
    "another purity": ({"commonit_purity": "epoch"}, ("commonit_purity='epoch'", "step, micro")),
    "another remainder": ({"commonit_remainder": "wrap"}, ("commonit_remainder='wrap'", "keep, drop")),
    "groups of no row": ({"commonit_min_group_size": -1}, ("commonit_min_group_size=-1", "at least 1")),
    "weights that are a list": ({"commonit_weights": [1, 2]}, ("commonit_weights=[1, 2]", "mapping")),
    "a weight that is no number": (
        {"commonit_weights": {"a": float("nan")}},
        ("commonit_weights", "nan", "'a'", "number >= 0"),
    ),
    "weights in words": ({"commonit_weights": "even"}, ("commonit_weights='even'", "did you mean 'uniform'")),
    "a balance that is maybe": ({"commonit_balance_lengths": "maybe"}, ("commonit_balance_lengths='maybe'", "Arrange")),
    "a cache that is a list": ({"commonit_cache_dir": ["a"]}, ("commonit_cache_dir=['a']", "Where")),
    "a report that is maybe": ({"commonit_report": "maybe"}, ("commonit_report='maybe'", "Write a report")),
    "a stream": ({"streaming": True}, ("streaming: True", "set it to false")),
    "preferences": ({"rl": "dpo"}, ("rl: 'dpo'", "supervised fine-tuning")),
    "another order": ({"group_by_length": True}, ("group_by_length: True", "remove it")),
}


def test_every_option_has_a_case() -> None:
    assert {key for keys, _ in KEYS.values() for key in keys} >= {*OPTIONS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    write_rows(directory / "rows.jsonl", make_rows({"a": 3, "b": 3}))
    save_model(directory / "model")
    (directory / "out").mkdir()
    (directory / "out" / "debug.log").touch()  # Axolotl's log file
    return directory


def bad_recipe(directory: Path, **keys: Any) -> Path:
    """Write a recipe with these keys; `...` omits a key."""
    ours = {"commonit_cache_dir": None, "commonit_report": None, "plugins": [PLUGIN], **LENGTH}
    written = {**recipe(directory, directory / "rows.jsonl", **ours), **keys}
    return write_recipe(directory / "bad.yml", {key: value for key, value in written.items() if value is not ...})


@pytest.mark.parametrize("name", KEYS)
def test_invalid_key_is_refused(name: str, directory: Path) -> None:
    keys, says = KEYS[name]
    path = bad_recipe(directory, base_model="no/model", **keys)

    def call() -> str:
        with pytest.raises(ValueError) as error:
            load_cfg(str(path))
        return str(error.value)

    line, seconds = timed(directory, call)
    check_refusal(line, says)
    record("Axolotl", name, "ValueError", line, "anything is loaded", seconds)


def test_axolotl_validates_other_keys(directory: Path) -> None:
    path = bad_recipe(directory, base_model="no/model")
    path.write_text(path.read_text(encoding="utf-8") + "3: 4\n", encoding="utf-8")
    with pytest.raises(Exception) as error:
        load_cfg(str(path))
    assert "startswith" not in str(error.value)


# --- commonit inspect --axolotl -----------------------------------------------------------------------------------

TASK = {"commonit_metric": "task"}


def data(name: str) -> dict[str, Any]:
    return {"datasets": [{"path": name, "type": "alpaca"}]}


RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    # name: (file content or changed keys, parts of the message)
    "no such file": (None, ("--axolotl bad.yml", "name a recipe's YAML file")),
    "an empty file": (b"", ("--axolotl bad.yml", "write lines such as")),
    "a list": (b"- a", ("--axolotl bad.yml", "write lines such as")),
    "no YAML": (b"a: [b", ("--axolotl bad.yml", "not YAML")),
    "no text": (b"\xff\xfe\x00", ("--axolotl bad.yml", "not YAML")),
    "an object of Python": (
        b"plugins: !!python/object/apply:pathlib.Path.touch [ran]",
        ("--axolotl bad.yml", "not YAML"),
    ),
    "no plugin": ({"plugins": ...}, ("--axolotl bad.yml", "Add axolotl_plugin.CommonITPlugin")),
    "a misspelt plugin": (
        {"plugins": ["axolotl_plugin.CommonitPlugin"]},
        ("--axolotl bad.yml", "Add axolotl_plugin.CommonITPlugin"),
    ),
    "no list of plugins": ({"plugins": PLUGIN}, ("--axolotl bad.yml", "Add axolotl_plugin.CommonITPlugin")),
    "a misspelt key": ({"commonit_matric": "task"}, ("commonit_matric", "did you mean commonit_metric?")),
    "no datasets": ({"datasets": []}, ("--axolotl bad.yml", "datasets", "change it")),
    "a dataset whose path is a number": ({"datasets": [{"path": 3}]}, ("--axolotl bad.yml", "path", "change it")),
    "an empty data file": (data("empty.jsonl"), ("--axolotl bad.yml", "datasets", "has rows")),
    "a data file that breaks off": (data("broken.jsonl"), ("--axolotl bad.yml", "datasets", "has rows")),
    "a column that is not there": (
        {**TASK, "commonit_task_column": "kind"},
        ("rows.jsonl", "commonit_task_column='kind'", "Name one"),
    ),
    "labels that are lists": ({**TASK, **data("lists.jsonl")}, ("lists.jsonl", "list<", "name a column")),
    "labels that are mappings": ({**TASK, **data("mappings.jsonl")}, ("mappings.jsonl", "struct<", "name a column")),
    "a column that clears the screen": (
        {**TASK, **data("escapes.jsonl")},
        ("escapes.jsonl", "\\u001b[2J", "commonit_task_column"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_inspect_refuses_bad_recipe(
    name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given, says = RECIPES[name]
    monkeypatch.chdir(directory)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
    (directory / "model" / "model.safetensors").unlink(missing_ok=True)
    path = directory / "bad.yml"
    path.unlink(missing_ok=True)
    if isinstance(given, bytes):
        path.write_bytes(given)
    elif given is not None:
        bad_recipe(directory, **given)
    rows = make_rows({"a": 3})
    write_rows(directory / "lists.jsonl", [{**row, "task": ["a"]} for row in rows])
    write_rows(directory / "mappings.jsonl", [{**row, "task": {"a": 1}} for row in rows])
    write_rows(directory / "escapes.jsonl", [{ESCAPE: row.pop("task"), **row} for row in rows])
    (directory / "empty.jsonl").write_text("")
    (directory / "broken.jsonl").write_text('{"instruction": "a"')
    capfd.readouterr()
    code, seconds = timed(directory, lambda: cli.main(["inspect", "--axolotl", "bad.yml"]))
    out, err = capfd.readouterr()
    lines = [line for line in err.split("\n") if line.startswith("commonit: error: ")]
    assert (code, len(lines)) == (2, 1), err
    assert out == "" and "Traceback" not in err
    check_refusal(lines[0], says)
    record("commonit inspect --axolotl", name, "exit code 2", lines[0], "a model is loaded", seconds)
    assert not (directory / "ran").exists()
