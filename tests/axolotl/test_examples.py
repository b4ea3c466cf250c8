"""The recipes in example_configs/axolotl and the plugin's README have valid keys and commands, and train.

Axolotl ignores unknown keys, so each recipe is validated for a machine with a GPU and its keys are compared with the
schema. Recipes for one GPU then train two steps on a CPU, with a tiny model and tiny data. `smoke-cpu.yml` runs
unchanged, by the commands in its header.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers.axolotl_recipes import (
    ENVIRONMENT,
    PLUGIN,
    launch,
    process,
    result,
    save_model,
    seen,
    write_recipe,
    write_rows,
)
from helpers.toys import rows_in
from pydantic import AliasChoices, BaseModel

from commonit_trl import load_grouper
from commonit_trl.cli.demo import FAMILIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_configs" / "axolotl"
RECIPES = sorted(EXAMPLES.glob("*.yml"))
A_GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
# Without the recipes for DeepSpeed and FSDP, which need several processes and otherwise equal length.yml.
TRAINED = ["embedding", "length", "lora", "mixture", "packing", "task"]
TOPICS = {"geography": "Which city is the capital of country", "arithmetic": "What is the sum of the numbers 7 and"}
ROWS_PER_TOPIC = 48

README = ROOT / "axolotl_plugin" / "README.md"

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found


# --- the schema -------------------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the pydantic models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def field_of(model: type[BaseModel], key: str) -> Any:
    for name, field in model.model_fields.items():
        aliases = field.validation_alias
        if key in (name, field.alias, *(aliases.choices if isinstance(aliases, AliasChoices) else [aliases])):
            return field
    return None


def unknown_keys(keys: dict[str, Any], model: type[BaseModel], place: str = "") -> list[str]:
    """List the paths of keys that are not in the schema."""
    unknown = []
    for key, value in keys.items():
        field = field_of(model, key)
        if field is None:
            unknown.append(place + key)
            continue
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            nested = models_in(field.annotation)
            if isinstance(part, dict) and nested:
                where = f"{place}{key}.{number}." if isinstance(value, list) else f"{place}{key}."
                unknown += unknown_keys(part, nested[0], where)  # the first of datasets: is for supervised fine-tuning
    return unknown


@pytest.fixture
def load():
    """A function that validates a recipe as on a machine with a GPU and returns it with its schema."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    def load(keys: dict[str, Any]) -> tuple[Any, type[BaseModel]]:
        cfg = DictDefault(keys)
        prepare_plugins(cfg)
        validated = validate_config(cfg, capabilities=A_GPU, env_capabilities={"torch_version": "2.13.0"})
        return validated, merge_input_args()[1]

    return load


@every_recipe
def test_recipe_is_valid_without_unknown_keys(path, load):
    cfg, schema = load(read(path))
    assert PLUGIN in cfg.plugins and cfg.commonit_metric in ("task", "length", "embedding")
    assert unknown_keys(read(path), schema) == []


def test_unknown_keys_finds_nested_keys(load):
    _, schema = load(read(EXAMPLES / "smoke-cpu.yml"))
    keys = {"sequence_length": 1, "sequence_len": 1, "fsdp_config": {"version": 2, "wrap_policy": "f"}}
    keys["datasets"] = [{"path": "b", "tpye": "c", "type": {"field_prompt": "d", "format": "e"}}]
    nested = ["fsdp_config.wrap_policy", "datasets.0.tpye", "datasets.0.type.field_prompt"]
    assert unknown_keys(keys, schema) == ["sequence_length", *nested]


def test_readme_keys_enable_commonit(load):
    keys = {key: value for key, value in read(EXAMPLES / "length.yml").items() if not key.startswith("commonit")}
    del keys["plugins"]
    for block in blocks("yaml"):
        assert load(keys | yaml.safe_load(block))[0].commonit_metric == "length"


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[str]:
    """Return the commands in the header comment of a recipe."""
    top = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    return re.findall(r"^#   ((?:[A-Z_]+=\S+ )*(?:axolotl|python) .*)$", top[0], re.MULTILINE)


def check_command(line: str) -> None:
    from axolotl.cli.main import cli
    from torch.distributed.run import get_args_parser

    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "pip":
        assert words[1:] == ["install", ".[axolotl]"] and "axolotl = [" in (ROOT / "pyproject.toml").read_text()
        return
    if words[:2] == ["python", "-m"]:
        module = ROOT.joinpath(*words[2].split("."))
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        return
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
        return
    context = cli.commands[words[1]].make_context(words[1], words[2:])
    if words[1] in ("preprocess", "train"):
        assert (ROOT / context.params["config"]).is_file()
    if context.params.get("launcher") == "torchrun":
        launched = get_args_parser().parse_args([*context.args, "-m", "axolotl.cli.train"])
        assert int(launched.nproc_per_node) > 1
    else:
        assert context.args == []


@every_recipe
def test_commands_in_recipe_header_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = commands(path)
    for line in lines:
        check_command(line)
    here = f"example_configs/axolotl/{path.name}"
    assert any(f"axolotl train {here}" in line for line in lines)
    assert all(here in line for line in lines if "axolotl train" in line or "axolotl preprocess" in line)
    assert ("axolotl fetch deepspeed_configs" in lines) == ("deepspeed" in read(path))


def test_commands_in_readme_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) > 4
    for line in lines:
        check_command(line)


# --- training ---------------------------------------------------------------------------------------------------------


def test_smoke_recipe_trains(tmp_path):
    folder = tmp_path / EXAMPLES.relative_to(ROOT)
    folder.mkdir(parents=True)
    for name in ("make_smoke.py", "smoke-cpu.yml"):
        (folder / name).write_bytes((EXAMPLES / name).read_bytes())
    programs = {"python": sys.executable, "axolotl": str(Path(sys.executable).with_name("axolotl"))}
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    environment.pop("ACCELERATE_USE_CPU")  # the command sets it
    for line in commands(folder / "smoke-cpu.yml"):
        words = shlex.split(line)
        settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        program, *arguments = words[len(settings) :]
        done = process([programs[program], *arguments], env=environment | settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    output = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    for line in "".join(blocks("text")).splitlines():  # output quoted in the README
        assert line in output
    assert load_grouper(tmp_path / "out/smoke/model/commonit").names == sorted(FAMILIES)
    for family in FAMILIES:
        before, after = map(float, re.findall(rf"'eval_{family}_loss': '([\d.]+)'", output))
        assert after < before


def conversations(topic: str, first: int) -> list[dict[str, Any]]:
    """Make chat rows of one topic; topics differ in question, `source` and response length."""
    length = {"geography": 8, "arithmetic": 60}[topic]
    return [
        {
            "messages": [
                {"role": "user", "content": f"#{number}# {TOPICS[topic]} {number}?"},
                {"role": "assistant", "content": "a" * (length + number % 40)},
            ],
            "source": topic,
        }
        for number in range(first, first + ROWS_PER_TOPIC)
    ]


def on_a_cpu(path: Path, folder: Path, minilm: str) -> dict[str, Any]:
    """Adapt a recipe to two steps on a CPU with a tiny model and tiny data."""
    keys = read(path)
    rows = {topic: conversations(topic, place * ROWS_PER_TOPIC) for place, topic in enumerate(TOPICS)}
    if len(keys["datasets"]) == 1:
        rows = {"all": [row for of_topic in rows.values() for row in of_topic]}
    entry = {name: value for name, value in keys["datasets"][0].items() if name != "name"}
    keys |= {
        "plugins": [*keys["plugins"], "helpers.axolotl_recorder.RecorderPlugin"],
        "base_model": str(folder / "model"),
        "special_tokens": {"pad_token": "<pad>"},
        "datasets": [{**entry, "path": str(write_rows(folder / f"{name}.jsonl", rows[name]))} for name in rows],
        "dataset_prepared_path": str(folder / ("labelled" if keys["commonit_metric"] == "task" else "prepared")),
        "output_dir": str(folder / path.stem / "out"),
        "attn_implementation": "sdpa",
        "bf16": False,
        "max_steps": 2,
        "save_strategy": "no",
        "commonit_cache_dir": str(folder / "groups"),
    }
    if "val_set_size" in keys:
        keys["val_set_size"] = 0.2
    if "commonit_min_group_size" in keys:
        keys["commonit_min_group_size"] = 8
    if "adapter" in keys:  # Axolotl enables its CUDA kernels for LoRA
        keys |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    if keys.get("sample_packing"):
        keys["sequence_len"] = 512
    if "commonit_reference_dataset" in keys:
        reference = [{"task": topic, "prompt": f"{question}?", "completion": ""} for topic, question in TOPICS.items()]
        keys["commonit_reference_dataset"] = str(write_rows(folder / "reference.jsonl", reference))
        keys["commonit_embedding_model"] = minilm
    return keys


@pytest.fixture(scope="module")
def trained(tmp_path_factory, minilm):
    """Folder and output of training the recipes in TRAINED."""
    folder = tmp_path_factory.mktemp("examples")
    save_model(folder / "model")
    runs = []
    for name in TRAINED:
        recipe = write_recipe(folder / f"{name}.yml", on_a_cpu(EXAMPLES / f"{name}.yml", folder, minilm))
        runs.append({"recipe": str(recipe), "name": name})
    done = launch(runs, folder)
    return folder, done.stdout + done.stderr


@pytest.mark.parametrize("name", TRAINED)
def test_recipe_trains_pure_steps(name, trained):
    """I1: topics differ in source, file, response length and meaning, so a group of any metric has one topic."""
    folder, _ = trained
    steps, outcome = seen(folder / name), result(folder / name)
    assert sorted(steps) == [0, 1]
    for ranks in steps.values():
        rows = rows_in([ranks])
        assert len(rows) > 4
        assert len({row // ROWS_PER_TOPIC for row in rows}) == 1
    logged = {key for entry in outcome["log"] for key in entry if re.fullmatch("eval_.+_loss", key)}
    evaluates = "val_set_size" in read(EXAMPLES / f"{name}.yml")
    assert logged == ({f"eval_{topic}_loss" for topic in TOPICS} if evaluates else set())


def test_every_recipe_logs_commonit_is_on(trained):
    _, output = trained
    metrics = [read(EXAMPLES / f"{name}.yml")["commonit_metric"] for name in TRAINED]
    assert re.findall(r"CommonIT is on: commonit_metric=(\w+)", output) == metrics
    assert output.count("CommonIT packs each group alone") == 1
