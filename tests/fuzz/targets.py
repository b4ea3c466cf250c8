"""Fuzz targets: each reader of files that this package writes, and each front end of its options.

A target takes a folder and returns seeds and a function that runs one input. All have the same property: an input is
read and usable, or refused with a one-line ValueError. The code under test writes the seeds, so they match its format.
The fuzzer (fuzz.py) and test_replay.py both use `mutate`.

Cost: 0.1 to 5 ms per input, and tens of ms where groups are fitted or the command line parser is built.
"""

import contextlib
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset
from transformers import TrainerState

from commonit_trl.cli import main as cli
from commonit_trl.config import OPTIONS, CommonITArguments
from commonit_trl.grouping import EmbeddingGrouper, LengthGrouper, TaskGrouper, fit_assign_cached, load_grouper
from commonit_trl.grouping.column import ColumnGrouper
from commonit_trl.grouping.joined import JoinedGrouper
from commonit_trl.grouping.task import with_task_file
from commonit_trl.rows import Rows
from commonit_trl.sanitize import sanitize
from commonit_trl.trainer.checkpoint import last_checkpoint, load_remaining, read_checkpoint


@dataclass(frozen=True)
class Target:
    seeds: list[bytes]
    run: Callable[[bytes], None]
    """Reads one input; raises where the property does not hold."""
    slow: bool = False
    """Whether an input takes tens of milliseconds."""


WORDS = {"sun": [1.0, 0.0], "moon": [1.0, 0.1], "cat": [0.0, 1.0], "dog": [0.1, 1.0]}
ROWS = Rows(
    Dataset.from_dict(
        {
            "text": [*WORDS, "sun"],
            "task": ["sky", "sky", "pets", None, "sky"],
            "input_ids": [[1] * size for size in (2, 9, 4, 7, 2)],
            "score": [0.5, None, 3.0, 1.0, 2.0],
        }
    )
)


class Encoded(EmbeddingGrouper):
    """`EmbeddingGrouper` without the encoder model."""

    def _encode(self, texts: list[str]) -> Any:
        return np.array([WORDS[text] for text in texts], dtype=np.float32)


def embedding_grouper() -> Encoded:
    return Encoded(model="none", num_groups=2, dtype="float32")


@contextlib.contextmanager
def refusals(shown_as: Callable[[str], str] = str) -> Iterator[None]:
    """Accept a one-line ValueError and no other exception."""
    try:
        yield
    except ValueError as error:
        line = shown_as(str(error))
        assert line and len(line.splitlines()) == 1, f"not one line: {line!r}"


# --- files that we write ----------------------------------------------------------------------------------------------


class Files:
    """Sound files below a folder; the first byte of an input selects one of them, which the rest replaces."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.sound = {name: (folder / name).read_bytes() for name in names}

    def seeds(self) -> list[bytes]:
        return [bytes([number]) + sound for number, sound in enumerate(self.sound.values())]

    def damage(self, content: bytes) -> str:
        """Write all files and return the name of the damaged one."""
        damaged = [*self.sound][content[0] % len(self.sound) if content else 0]
        for name, sound in self.sound.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content[1:] if name == damaged else sound)
        return damaged


def saved_groups(folder: Path) -> Target:
    """`groups.json` of each metric, and `groups.safetensors`."""
    names = []
    task, length, column = TaskGrouper(columns=["task"]), LengthGrouper(edges=[3, 8]), ColumnGrouper(column="score")
    for grouper in (task, length, column, JoinedGrouper(task, column), embedding_grouper()):
        grouper.fit(ROWS).save(folder / grouper.metric)
        names.append(f"{grouper.metric}/groups.json")
    files = Files(folder, [*names, "embedding/groups.safetensors"])

    def run(content: bytes) -> None:
        name = files.damage(content)
        with refusals():
            grouper = load_grouper((folder / name).parent)
            grouper.log_notices()
            grouper.save(folder / "again")
            again = load_grouper(folder / "again")
            assert json.dumps(again.description()) == json.dumps(grouper.description())
            if not isinstance(grouper, EmbeddingGrouper):  # it would load its model
                group_ids = grouper.assign(ROWS)
                assert group_ids.min() >= -1 and group_ids.max() < len(grouper.names)

    return Target(files.seeds(), run)


def cache_entry(folder: Path) -> Target:
    _, expected = fit_assign_cached(embedding_grouper(), ROWS, folder)
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    files = Files(entry, sorted(file.name for file in entry.iterdir()))

    def run(content: bytes) -> None:
        name = files.damage(content)
        _, group_ids = fit_assign_cached(embedding_grouper(), ROWS, folder)
        assert group_ids.shape == (len(ROWS),)
        assert name == "checksums.json" or group_ids.tolist() == expected.tolist()

    return Target(files.seeds(), run, slow=True)


def run_json(folder: Path) -> Target:
    """Files of the newer of two checkpoints."""
    run = {"random states": [0, 1], "remaining rows": None, "times replanned": 0, "data seed": 3}
    for step in (5, 10):
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "commonit").mkdir(parents=True)
        (checkpoint / "commonit" / "run.json").write_text(json.dumps(run, indent=2))
        TrainerState(global_step=step, max_steps=20).save_to_json(str(checkpoint / "trainer_state.json"))
        for rank in range(2):
            with zipfile.ZipFile(checkpoint / f"rng_state_{rank}.pth", "w") as archive:
                archive.writestr("data", "x")
    files = Files(checkpoint, ("commonit/run.json", "trainer_state.json", "rng_state_1.pth"))

    def read(content: bytes) -> None:
        files.damage(content)
        assert last_checkpoint(folder) in {str(checkpoint), str(folder / "checkpoint-5")}
        with refusals():
            saved, _ = read_checkpoint(checkpoint)
            # The trainer turns these, like missing keys, into a one-line error.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                load_remaining(checkpoint / "commonit", saved)

    return Target(files.seeds(), read)


def task_file(folder: Path) -> Target:
    path = folder / "tasks.parquet"
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    seeds = []
    for rows in ([2, 0, 1], [0, None, 1], ["0", None, "1"], [[0], [1], [2]]):
        for names in (["x", None, "y"], [1, 2, 3], [["x"], [], None]):
            pq.write_table(pa.table({"row": rows, "name": names}), path)
            seeds.append(path.read_bytes())

    def run(content: bytes) -> None:
        path.write_bytes(content)
        with refusals():
            assert len(with_task_file(dataset, path)["commonit_task"]) == len(dataset)

    return Target(seeds, run)


# --- front ends of the options ----------------------------------------------------------------------------------------

OPTION_VALUES: list[dict[str, Any]] = [
    {"commonit_metric": "task", "commonit_task_column": ["a", "b"], "commonit_weights": {"a": 0.5, "b": 2}},
    {"commonit_metric": "length", "commonit_length_edges": [64, 256], "commonit_weights": '{"a": 1}'},
    {"commonit_metric": "length", "commonit_num_groups": 4, "commonit_length_of": "total", "commonit_purity": "micro"},
    {"commonit_metric": "embedding", "commonit_reference_dataset": "a/b", "commonit_reference_task_column": "t"},
    {"commonit_metric": "none", "commonit_remainder": "drop", "commonit_weights": "sqrt", "commonit_resume": "replan"},
    {"commonit_metric": "task", "commonit_balance_lengths": False, "commonit_cache_dir": "~/x", "commonit_report": 1},
    {"commonit_metric": "task+length", "commonit_remainder": "mix", "commonit_pure_fraction": [1.0, 0.5]},
    {"commonit_metric": "column", "commonit_column": "c", "commonit_order": "ascending", "commonit_heaviest_first": 1},
    {
        "commonit_metric": "task",
        "commonit_task_file": "f",
        "commonit_small_groups": "drop",
        "commonit_min_group_size": 2,
    },
    {"commonit_metric": "embedding+length", "commonit_embedding_column": "v", "commonit_num_groups": [4, 2]},
]


def _json_seeds(values: list[Any]) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def arguments(folder: Path) -> Target:
    """The dataclass of the TRL API, from a mapping."""

    def run(content: bytes) -> None:
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(given, dict) and all(name.startswith("commonit") for name in given):  # Python refuses others
            with refusals():
                options = CommonITArguments(**given)
                assert asdict(CommonITArguments(**asdict(options))) == asdict(options)

    return Target(_json_seeds(OPTION_VALUES), run)


def yaml_file(folder: Path) -> Target:
    """`commonit sft --config FILE`; JSON is valid YAML."""
    path = folder / "config.yaml"

    def run(content: bytes) -> None:
        path.write_bytes(content)
        _parse(["--output_dir", str(folder), "--use_cpu", "true", "--config", str(path)])

    entries = {"datasets": [{"path": "x", "split": "train"}], "learning_rate": 0.1, "env": {"A": "b"}, "max_length": 9}
    seeds = [entries | OPTION_VALUES[0], *OPTION_VALUES]
    return Target([*_json_seeds(seeds), *(yaml.safe_dump(seed).encode() for seed in seeds[:2])], run, slow=True)


def _parse(argv: list[str]) -> None:
    environment = dict(os.environ)  # `env:` in a YAML file changes it
    try:
        with refusals(sanitize):  # the command sanitizes its messages
            with contextlib.suppress(TypeError):  # TRL's dataclasses do not check types
                cli.parse_sft(argv)
    finally:
        os.environ.clear()
        os.environ.update(environment)


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.__name__: target for target in (saved_groups, cache_entry, run_json, task_file, arguments, yaml_file)
}


# --- damage -----------------------------------------------------------------------------------------------------------

_ODD: list[Any] = [
    *(None, True, 0, 1, 2, -1, 0.5, float("inf"), float("nan"), 2**63, -(2**63), 10**30, 10**400),
    *("", "a", "a\nb", "\x00", "\x1b[2J", "\u202e", "\ud800", "../../a", "9" * 5000, "{", '{"a": 1}', "[" * 5000),
    *([], {}, [[]], [None], [1, "a"], [3, 2], [1.5], {"a": 1}, {"a": {}}, {"a": [1]}, {"1": True}, {"a\nb": 1}),
    *OPTIONS,
    *("task", "length", "embedding", "none", "step", "keep", "sqrt", "F64", "BF16", "F8_E4M3", "I64", "BOOL", "C64"),
]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage values of the JSON in `content`, or its bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.random()
        if kind < 0.6:
            content = _mutate_json(content, rng)
        elif kind < 0.7:
            content = content[: rng.randrange(len(content) + 1)]
        else:
            start = rng.randrange(len(content) + 1)
            end = min(len(content), start + rng.choice((0, 1, 1, 1, 8)))
            some = rng.choice((b"", bytes([rng.randrange(256)]), b"\n", b"[" * 10_000, bytes(8), rng.randbytes(4)))
            content = content[:start] + some + content[end:]
    return content


def _mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Change a value of JSON: all of `content`, all after one byte, or a safetensors header."""
    for start in (0, 1, 8, 9):
        header = start >= 8
        end = start + int.from_bytes(content[start - 8 : start], "little") if header else len(content)
        try:
            value = json.loads(content[start:end])
        except (ValueError, RecursionError):
            continue
        changed = json.dumps(_changed(value, rng)).encode()
        length = len(changed).to_bytes(8, "little") if header else b""
        return content[: start - len(length)] + length + changed + content[end:]
    return content


def _changed(value: Any, rng: random.Random) -> Any:
    """Return `value` with one change."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = value.copy()
        keys = [*value] if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.3 and isinstance(value, dict):
            value[str(rng.choice(_ODD))[:50]] = value[key]
        elif kind < 0.3 and isinstance(value, list):
            value.append(value[key])
        elif kind < 0.4:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = _changed(value[key], rng)
        return value
    return rng.choice(_ODD)
