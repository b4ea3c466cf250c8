"""Code blocks in the documentation run, command lines parse, links resolve, and tables agree with the code.

The Python blocks of a file run in order in one namespace, and so do both sides of a diff, in a directory where
`train.jsonl` has a few rows and `Qwen/Qwen3-0.6B` is a tiny model; other named data and models are small too. The real
parsers of `commonit` parse command lines without running them. tests/axolotl/test_examples.py loads Axolotl's YAML.
"""

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.kinds import image_processor, image_rows, tiny_llava
from helpers.toys import tiny_model, tiny_tokenizer
from helpers.trainers import rows_of_task, write_jsonl

from commonit_trl import CommonITSFTTrainer
from commonit_trl.cli import launch, recipes
from commonit_trl.cli import main as cli
from commonit_trl.compare.strategies import parse_strategies
from commonit_trl.config import OPTIONS, CommonITArguments

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PLUGIN_README = ROOT / "axolotl_plugin" / "README.md"  # its blocks: tests/axolotl/test_examples.py
PAPER_README = ROOT / "example_configs" / "paper" / "README.md"  # its blocks: test_paper_recipes.py and _axolotl.py
MODEL, VISION_MODEL = "Qwen/Qwen3-0.6B", "llava-hf/llava-1.5-7b-hf"
CHECKED = {"python", "bash", "yaml", "diff"}
UNCHECKED = {"text"}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
AXOLOTL_PLUGIN = "axolotl_plugin.CommonITPlugin"
OPTIONS_TABLE = re.compile(r"(?<=-->\n).*(?=<!-- /options -->)", re.DOTALL)
RESULT = re.compile(r"benchmarks/results/\S+?\.md")


def read(document):
    return document.read_text(encoding="utf-8")


def blocks(language):
    return [
        pytest.param(text, id=f"{document.stem}-{number}")
        for document in DOCUMENTS
        for number, (name, text) in enumerate(BLOCK.findall(read(document)), start=1)
        if name == language
    ]


def command_lines():
    joined = [block.values[0].replace("\\\n", " ") for block in blocks("bash")]
    return list(dict.fromkeys(line for text in joined for line in text.splitlines() if line.strip() and line[0] != "#"))


@pytest.fixture
def bf16(monkeypatch):
    """Accept bf16, the default of TRL and the examples, without a GPU."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.fixture
def workspace(bf16, tmp_path, monkeypatch):
    """Change to a directory with the data and the model that the documentation names."""
    write_jsonl(tmp_path / "train.jsonl", [row | {"source": row["task"]} for row in rows_of_task("count", 48)])
    pairs = [(row["prompt"], row["completion"], " no", row["task"]) for row in rows_of_task("a", 9)]
    names = ("prompt", "chosen", "rejected", "source")
    write_jsonl(tmp_path / "preferences.jsonl", [dict(zip(names, pair)) for pair in pairs])
    write_jsonl(tmp_path / "feedback.jsonl", [row | {"label": n % 3 > 0} for n, row in enumerate(rows_of_task("b", 9))])
    tiny_model().save_pretrained(tmp_path / MODEL)
    tiny_tokenizer().save_pretrained(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


# --- code ---------------------------------------------------------------------------------------------------


def test_every_block_has_a_known_language():
    found = {name for document in DOCUMENTS for name, _ in BLOCK.findall(read(document))}
    assert CHECKED <= found <= CHECKED | UNCHECKED


def with_sign(diff, sign):
    """Return the lines of one side of a diff."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if line[0] in f"{sign} \n")


@pytest.mark.parametrize("diff", blocks("diff"))
@pytest.mark.parametrize("sign", "-+")
def test_both_sides_of_a_diff_run(diff, sign, workspace):
    (workspace / "side.py").write_text(with_sign(diff, sign), encoding="utf-8")
    trainer = runpy.run_path("side.py")["trainer"]
    assert isinstance(trainer, CommonITSFTTrainer) == (sign == "+") and trainer.state.global_step > 0


def test_diff_changes_three_lines():
    (diff,) = (block.values[0] for block in blocks("diff"))
    assert [sum(line[0] == sign for line in diff.splitlines() if line) for sign in "-+"] == [3, 3]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_python_blocks_run(document, workspace):
    if VISION_MODEL in read(document):
        pytest.importorskip("PIL")
        tiny_llava().save_pretrained(workspace / VISION_MODEL)
        image_processor().save_pretrained(workspace / VISION_MODEL)
        image_rows().select_columns(["images", "prompt", "completion"]).to_parquet(workspace / "mixture.parquet")
    code = "\n".join(text for name, text in BLOCK.findall(read(document)) if name == "python")
    (workspace / "blocks.py").write_text(code, encoding="utf-8")
    runpy.run_path("blocks.py")


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_are_valid_configs(block, bf16, tmp_path):
    config = yaml.safe_load(block)
    if "plugins" in config:
        assert config.pop("plugins") == [AXOLOTL_PLUGIN]
        assert CommonITArguments(**config).commonit_on
        return
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    (script, training, model, _), _ = cli.parse_sft(["--config", str(tmp_path / "config.yaml")])
    assert training.commonit_metric == config["commonit_metric"]
    assert model.model_name_or_path == config["model_name_or_path"]
    assert script.dataset_name == config["dataset_name"]


# --- command lines ------------------------------------------------------------------------------------------


def check_commonit(words, monkeypatch):
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from commonit_trl.cli import group
    from commonit_trl.cli import inspect as inspecting

    command, *options = words
    assert command in cli.COMMANDS
    if command in ("inspect", "group"):
        given = {}
        monkeypatch.setattr(recipes, "sft_recipe", lambda *arguments, **options: given.update(options))
        monkeypatch.setattr(recipes, "read_foreign_recipe", lambda front_end, path: given.update(recipe=path))
        monkeypatch.setattr(group, "load_grouper", lambda folder: SimpleNamespace(metric="length"))
        own = {"inspect": inspecting, "group": group}[command].add_arguments
        own_options, _ = cli.read_recipe(command, own, options)
        assert own_options.axolotl is None or (ROOT / given["recipe"]).is_file()
    elif command == "compare":
        own_options, (_, _, model, _), _ = cli.read_comparison(options)
        assert parse_strategies("--metrics", own_options.metrics) and model.model_name_or_path
    elif command == "sft":
        (_, training, model, _), launch_flags = cli.parse_sft(options)
        assert training.commonit_on and model.model_name_or_path
        launch.prepare(launch_flags, command, options)
        unset_hf_deepspeed_config()  # otherwise later tests build their models for ZeRO-3
    else:
        assert not options


def check_launcher(words, monkeypatch):
    """tests/integration/test_launchers.py runs such lines."""
    check_commonit(words[words.index("commonit_trl") + 1 :], monkeypatch)


def check_make(words, monkeypatch):
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    assert [word for word in words if "=" not in word and word not in targets] == []


def check_pip(words, monkeypatch):
    if words[1] == "--no-deps":  # as `make bench` installs them
        assert set(words[2:]) <= set(re.findall(r"[\w-]+", read(ROOT / "Makefile")))
        return
    known = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert words[:-1] == ["install"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])[1]
    assert set(extras.split(",") if extras else ()) <= set(known)


def check_python(words, monkeypatch):
    name = ROOT.joinpath(*words[1].split(".")) if words[0] == "-m" else ROOT / words[0]
    script = read(name / "__main__.py" if name.is_dir() else name.with_suffix(".py"))
    assert all(f'"{word}"' in script for word in words if word.startswith("--"))


def check_axolotl(words, monkeypatch):
    """Check without Axolotl, which only one of the environments has."""
    command, recipe = words
    assert command in ("preprocess", "train")
    assert AXOLOTL_PLUGIN in yaml.safe_load(read(ROOT / recipe))["plugins"]


CHECKS = {
    "commonit": check_commonit,
    "accelerate": check_launcher,
    "torchrun": check_launcher,
    "axolotl": check_axolotl,
    "deepspeed": check_launcher,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line, bf16, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line, comments=True)
    CHECKS[program](words, monkeypatch)


# --- files and tables ---------------------------------------------------------------------------------------


def anchors(document):
    """Return the anchors that GitHub generates for a file's headings."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(BLOCK.sub("", read(document))))
    return {title.strip().replace(" ", "-") for title in titles}


every_document = pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, PLUGIN_README, PAPER_README, ROOT / "RELEASE.md", ROOT / "CODE_OF_CONDUCT.md"],
    ids=lambda document: str(document.relative_to(ROOT)),
)


@every_document
def test_links_resolve(document):
    for path, anchor in LINK.findall(read(document)):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@every_document
def test_files_in_backticks_exist(document):
    """Paths such as `tests/helpers/toys.py` are relative to the root; `*` matches any name."""
    folders = "commonit_trl|axolotl_plugin|tests|benchmarks|docs|example_configs|examples|constraints"
    for path in re.findall(rf"`((?:{folders})/[\w/.*-]*)`", read(document)):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_layout_lists_every_module():
    listed = re.findall(r"^ +(\w+\.py) ", read(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    files = [file for package in ("commonit_trl", "axolotl_plugin") for file in (ROOT / package).rglob("*.py")]
    modules = {file.name for file in files} - {"__init__.py", "__main__.py"}
    assert set(listed) == modules


def test_options_table_equals_the_config():
    rows = [["option", "default", "meaning"], ["---", "---", "---"]]
    for name, option in OPTIONS.items():
        default = "–" if option.default is None else f"`{json.dumps(option.default)}`".replace('"', "")
        rows.append([f"`{name}`", default, option.metadata["help"]])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    shown = OPTIONS_TABLE.search(read(ROOT / "docs" / "options.md"))[0]
    assert shown == table, f"Paste this table into docs/options.md:\n{table}"


MEASURED = [ROOT / "docs" / "real-data.md", ROOT / "docs" / "study.md", PLUGIN_README]


@pytest.mark.parametrize("document", MEASURED, ids=lambda document: str(document.relative_to(ROOT)))
def test_command_and_machine_equal_the_result(document):
    page = read(document)
    result = read(ROOT / RESULT.search(page)[0])
    assert all(re.search(rf"^- {key}: (.*)$", result, re.MULTILINE)[1] in page for key in ("command", "machine"))
