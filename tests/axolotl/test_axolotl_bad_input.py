"""`commonit inspect --axolotl` on wrong recipes and data: each is one safe line, without a file or a model.

The weights of the recipe's model are missing. test_axolotl_keys.py tests wrong keys.
"""

from pathlib import Path
from typing import Any

import pytest
from helpers.axolotl_recipes import PLUGIN, make_rows, recipe, save_model, write_recipe, write_rows
from helpers.bad_input import check_refusal, error_of, no_new_file

ESCAPE = "\x1b[2J"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    write_rows(directory / "rows.jsonl", make_rows({"a": 3, "b": 3}))
    save_model(directory / "model")
    (directory / "out").mkdir()
    (directory / "out" / "debug.log").touch()  # written by Axolotl
    return directory


def bad_recipe(directory: Path, **keys: Any) -> Path:
    """Write a recipe with these keys; `...` omits one."""
    ours = {"commonit_cache_dir": None, "commonit_report": None, "plugins": [PLUGIN], "commonit_metric": "length"}
    written = {**recipe(directory, directory / "rows.jsonl", **ours), **keys}
    return write_recipe(directory / "bad.yml", {key: value for key, value in written.items() if value is not ...})


TASK = {"commonit_metric": "task"}


def data(name: str) -> dict[str, Any]:
    return {"datasets": [{"path": name, "type": "alpaca"}]}


NO_PLUGIN = "--axolotl bad.yml | Add axolotl_plugin.CommonITPlugin"
RECIPES: dict[str, tuple[Any, str]] = {
    # name: (the file, or changed keys, parts of the line)
    "no such file": (None, "--axolotl bad.yml | name a YAML file"),
    "an empty file": (b"", "--axolotl bad.yml | write lines such as"),
    "bytes that are no text": (b"\xff\xfe\x00", "--axolotl bad.yml | not YAML"),
    "a Python object": (b"plugins: !!python/object/apply:pathlib.Path.touch [ran]", "--axolotl bad.yml | not YAML"),
    "no plugin": ({"plugins": ...}, NO_PLUGIN),
    "a plugin instead of a list": ({"plugins": PLUGIN}, NO_PLUGIN),
    "no datasets": ({"datasets": []}, "--axolotl bad.yml | datasets | change it"),
    "a numeric path": ({"datasets": [{"path": 3}]}, "--axolotl bad.yml | path | change it"),
    "an empty data file": (data("empty.jsonl"), "--axolotl bad.yml | datasets | has rows"),
    "an incomplete data file": (data("broken.jsonl"), "--axolotl bad.yml | datasets | has rows"),
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
    with no_new_file(directory):
        line = error_of(capfd, ["inspect", "--axolotl", "bad.yml"])
    check_refusal(line, says.split(" | "))
    assert not (directory / "ran").exists()
