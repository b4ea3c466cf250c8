"""Wrong input by way of Axolotl: each user error is one safe line, without a file, before a model is loaded.

The recipe's model does not exist, or has no weights. The rules of `config.py` are tested in tests/unit/test_config.py,
settings of Axolotl that conflict with a metric in test_axolotl_keys.py.
"""

from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from helpers.axolotl_recipes import PLUGIN, make_rows, recipe, save_model, write_recipe, write_rows
from helpers.bad_input import check_refusal, record, timed

from commonit_trl.cli import main as cli

ESCAPE = "\x1b[2J"
LENGTH = {"commonit_metric": "length"}
KEYS = {
    # name: (changed keys, parts of the line)
    "no metric": ({"commonit_metric": ...}, "commonit_metric is not set | 'none'"),
    "an empty metric": ({"commonit_metric": None}, "commonit_metric is not set | 'none'"),
    "a metric that YAML reads as true": ({"commonit_metric": True}, "commonit_metric=True | 'task', 'length'"),
    "a metric that YAML reads as false": ({"commonit_metric": False}, "commonit_metric=False | 'none' ("),
    "an escape sequence": ({"commonit_metric": ESCAPE}, "commonit_metric='\\x1b[2J' | task, length"),
    "a misspelt key": ({"commonit_num_group": 4}, "commonit_num_group | did you mean commonit_num_groups?"),
    "a misspelt key, off": (
        {"commonit_metric": "none", "commonitpurity": 4},
        "commonitpurity | did you mean commonit_purity?",
    ),
    "a misspelt metric key": (
        {"commonit_metric": ..., "commonit_metrics": "length"},
        "commonit_metrics | did you mean commonit_metric?",
    ),
    "a key with a dash": ({"commonit-metric": "task"}, "commonit-metric | did you mean commonit_metric?"),
    "a key of another metric": ({"commonit_task_column": "task"}, "commonit_task_column=['task'] | remove it"),
    "a number that YAML reads as nan": ({"commonit_weights": {"a": float("nan")}}, "commonit_weights | nan | 'a'"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    write_rows(directory / "rows.jsonl", make_rows({"a": 3, "b": 3}))
    save_model(directory / "model")
    (directory / "out").mkdir()
    (directory / "out" / "debug.log").touch()  # Axolotl's own, of all that it does
    return directory


def bad_recipe(directory: Path, **keys: Any) -> Path:
    """A recipe with these keys; `...` leaves one out."""
    ours = {"commonit_cache_dir": None, "commonit_report": None, "plugins": [PLUGIN], **LENGTH}
    written = {**recipe(directory, directory / "rows.jsonl", **ours), **keys}
    return write_recipe(directory / "bad.yml", {key: value for key, value in written.items() if value is not ...})


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str, directory: Path) -> None:
    keys, says = KEYS[name]
    path = bad_recipe(directory, base_model="no/model", **keys)

    def call() -> str:
        with pytest.raises(ValueError) as error:
            load_cfg(str(path))
        return str(error.value)

    line, seconds = timed(directory, call)
    check_refusal(line, says.split(" | "))
    record("Axolotl", name, "ValueError", line, "anything is loaded", seconds)


def test_other_keys_are_for_axolotl_to_check(directory: Path) -> None:
    path = bad_recipe(directory, base_model="no/model")
    path.write_text(path.read_text(encoding="utf-8") + "3: 4\n", encoding="utf-8")
    with pytest.raises(Exception) as error:
        load_cfg(str(path))
    assert "startswith" not in str(error.value)


# --- commonit inspect --axolotl -----------------------------------------------------------------------------------

TASK = {"commonit_metric": "task"}


def data(name: str) -> dict[str, Any]:
    return {"datasets": [{"path": name, "type": "alpaca"}]}


NO_PLUGIN = "--axolotl bad.yml | Add axolotl_plugin.CommonITPlugin"
RECIPES: dict[str, tuple[Any, str]] = {
    # name: (the file, or changed keys, parts of the line)
    "no such file": (None, "--axolotl bad.yml | name a YAML file"),
    "an empty file": (b"", "--axolotl bad.yml | write lines such as"),
    "a list": (b"- a", "--axolotl bad.yml | write lines such as"),
    "bytes that are no text": (b"\xff\xfe\x00", "--axolotl bad.yml | not YAML"),
    "a Python object": (b"plugins: !!python/object/apply:pathlib.Path.touch [ran]", "--axolotl bad.yml | not YAML"),
    "no plugin": ({"plugins": ...}, NO_PLUGIN),
    "a misspelt plugin": ({"plugins": ["axolotl_plugin.CommonitPlugin"]}, NO_PLUGIN),
    "a plugin instead of a list": ({"plugins": PLUGIN}, NO_PLUGIN),
    "a misspelt key": ({"commonit_matric": "task"}, "commonit_matric | did you mean commonit_metric?"),
    "no datasets": ({"datasets": []}, "--axolotl bad.yml | datasets | change it"),
    "a numeric path": ({"datasets": [{"path": 3}]}, "--axolotl bad.yml | path | change it"),
    "an empty data file": (data("empty.jsonl"), "--axolotl bad.yml | datasets | has rows"),
    "an incomplete data file": (data("broken.jsonl"), "--axolotl bad.yml | datasets | has rows"),
    "an unknown column": (
        {**TASK, "commonit_task_column": "kind"},
        "rows.jsonl | commonit_task_column='kind' | Name one",
    ),
    "labels that are lists": ({**TASK, **data("lists.jsonl")}, "lists.jsonl | list< | name a column"),
    "a column with an escape sequence": (
        {**TASK, **data("escapes.jsonl")},
        "escapes.jsonl | \\u001b[2J | commonit_task_column",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_inspect(
    name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The weights of the recipe's model are missing."""
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
    write_rows(directory / "escapes.jsonl", [{ESCAPE: row.pop("task"), **row} for row in rows])
    (directory / "empty.jsonl").write_text("")
    (directory / "broken.jsonl").write_text('{"instruction": "a"')
    capfd.readouterr()
    code, seconds = timed(directory, lambda: cli.main(["inspect", "--axolotl", "bad.yml"]))
    out, err = capfd.readouterr()
    lines = [line for line in err.split("\n") if line.startswith("commonit: error: ")]
    assert (code, len(lines)) == (2, 1), err
    assert out == "" and "Traceback" not in err
    check_refusal(lines[0], says.split(" | "))
    record("commonit inspect --axolotl", name, "exit code 2", lines[0], "a model is loaded", seconds)
    assert not (directory / "ran").exists()
