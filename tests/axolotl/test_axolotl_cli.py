"""Run `axolotl preprocess`, `train`, `evaluate` and `inference` on recipes with and without CommonIT.

Tests share runs: Axolotl prepares and trains without the plugin first. That run is a new process; the others are forks
(see `forked.py`).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.axolotl_recipes import PLUGIN, axolotl, make_rows, process, recipe, result, seen, write_recipe, write_rows

TASKS = {"maths": 10, "code": 8, "chat": 6}
RECORDER = "helpers.axolotl_recorder.RecorderPlugin"


class Workspace:
    """A folder with rows, a model and recipes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        rows = make_rows(TASKS)
        self.tasks = [row["task"] for row in rows]
        self.rows = write_rows(directory / "rows.jsonl", rows)

    def recipe(self, name: str, **keys: Any) -> Path:
        keys = {"plugins": [PLUGIN, RECORDER], "num_epochs": 1, "val_set_size": 4, "eval_strategy": "epoch", **keys}
        keys["output_dir"] = str(self.directory / f"out-{name}")
        return write_recipe(self.directory / f"{name}.yml", recipe(self.directory, self.rows, **keys))

    def run(self, command: str, name: str, *flags: str, **keys: Any) -> subprocess.CompletedProcess[str]:
        return axolotl(command, self.recipe(name, **keys), self.directory / name, *flags)

    def trained(self, name: str, **keys: Any) -> str:
        """Train and return the output."""
        done = self.run("train", name, **keys)
        assert done.returncode == 0, output_of(done)[-3000:]
        return output_of(done)

    def refused(self, name: str, *flags: str, command: str = "train", **keys: Any) -> str:
        """Run a command that must fail before training, and return the last line of its output."""
        done = self.run(command, name, *flags, **keys)
        assert done.returncode != 0, output_of(done)[-3000:]
        assert not (self.directory / f"{name}.ids.rank0").exists(), "it trained"
        return done.stderr.strip().splitlines()[-1]

    def seen(self, name: str) -> dict[int, list[list[list[int]]]]:
        return seen(self.directory / name)

    def result(self, name: str) -> dict[str, Any]:
        return result(self.directory / name)


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def plain(workspace: Workspace) -> str:
    """Train without the plugin and return the output; leaves prepared rows without labels."""
    done = axolotl("train", workspace.recipe("plain", plugins=[RECORDER]), workspace.directory / "plain", start=process)
    assert done.returncode == 0, output_of(done)[-3000:]
    return output_of(done)


def test_recipe_without_plugin_does_not_import_commonit(workspace: Workspace, plain: str) -> None:
    assert workspace.result("plain")["ours"] == []
    assert workspace.result("plain")["trainer"] == "AxolotlTrainer"
    assert "commonit" not in plain.lower()


def test_none_matches_axolotl_exactly(workspace: Workspace, plain: str) -> None:
    output = workspace.trained("none", commonit_metric="none")
    assert output.count("CommonIT is off (commonit_metric: none)") == 1 and "CommonIT is on" not in output
    assert workspace.seen("none") == workspace.seen("plain")
    both = [workspace.result(name) for name in ("none", "plain")]
    read = ("loss", "grad_norm", "learning_rate", "eval_loss")
    logs = [[[entry.get(name) for name in read] for entry in one["log"]] for one in both]
    assert logs[0] == logs[1] and len(logs[0]) > 10
    assert [one["trainer"] for one in both] == ["AxolotlTrainer"] * 2
    weights = [(workspace.directory / f"out-{name}" / "model.safetensors").read_bytes() for name in ("none", "plain")]
    assert weights[0] == weights[1]


def test_task_refuses_data_prepared_without_labels_until_prepared_again(workspace: Workspace, plain: str) -> None:
    line = workspace.refused("task", commonit_metric="task")
    (fix,) = re.findall("`(.*)`", line)
    command, path = shlex.split(fix)[1:]
    done = axolotl(command, Path(path))
    assert done.returncode == 0 and "Tokenizing Prompts" in output_of(done), output_of(done)[-3000:]
    output = workspace.trained("task", commonit_metric="task")
    assert "Tokenizing Prompts" not in output
    for ranks in workspace.seen("task").values():
        assert len({workspace.tasks[number] for rank in ranks for batch in rank for number in batch}) == 1
    on = [line for line in output.splitlines() if "CommonIT is on: " in line]
    assert len(on) == 1 and "commonit_metric=task (columns=['commonit_task[default]']" in on[0]
    losses = {name for entry in workspace.result("task")["log"] for name in entry if re.fullmatch("eval_.+_loss", name)}
    assert losses and losses <= {f"eval_{task}_loss" for task in TASKS}

    for command in ("evaluate", "inference"):
        done = workspace.run(command, "task", "--launcher", "python", commonit_metric="task")
        assert done.returncode == 0, output_of(done)[-3000:]
    assert (workspace.directory / "out-task" / "eval_summary.csv").exists()


def test_command_line_flag_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = ("--commonit-metric", "length")
    line = workspace.refused("flag", *flag, commonit_metric="none")
    assert line.startswith("ValueError: --commonit-metric") and "Set commonit_metric:" in line
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert "--commonit-metric" in workspace.refused("flag", "--launcher", "accelerate", *flag, commonit_metric="none")
    assert "No such option" in workspace.refused("flag", *flag, command="preprocess", commonit_metric="none")


def test_plugin_import_failure_stops_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "commonit_trl.py").write_text("raise ImportError('broken')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    line = workspace.refused("broken", commonit_metric="length")
    assert line.startswith("RuntimeError: axolotl_plugin.CommonITPlugin cannot be imported (ImportError: broken)"), line
    assert "pip install" in line
