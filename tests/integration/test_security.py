"""The promises of SECURITY.md that no other test file keeps.

1. Nothing unpickles, evaluates or trusts code in files: the sources are searched for such calls.
2. Code in a model, a tokenizer or an encoder does not run without `trust_remote_code`.
3. With HF_HUB_OFFLINE=1 nothing uses the network, and all files are written below the directories that options name.
4. Text of the data is sanitized on the terminal and in the model card.
5. Files have the permissions of the umask.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.bad_input import acting, error_of
from helpers.hostile import HOSTILE

import commonit_trl
from commonit_trl.cli import main as cli
from commonit_trl.report import model_card_section

pytestmark = pytest.mark.usefixtures("in_tmp_path")

ROOT = Path(commonit_trl.__file__).parents[1]
SOURCES = sorted(path for package in ("commonit_trl", "axolotl_plugin") for path in (ROOT / package).rglob("*.py"))
LABELS = [*HOSTILE.values(), "../../ran", "/etc/ran", "ran\0", "." * 300, "\x07\x08\r\x9b5m\x85\u202e\u2069"]
UP = "\x1b[A"
UNSAFE = re.compile(
    r"\b(?:import|from) (?:_?pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|jsonpickle|pandas)\b"
    r"|(?<![\w.`])(?:eval|exec|compile|__import__)\(|\b(?:torch|np|numpy|yaml)\.load\(|\.(?:unsafe_load|full_load)\("
    r"|read_pickle|os\.(?:system|popen)\(|\b(?:trust_remote_code|allow_pickle|shell)=True"
)


# --- nothing unpickles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_content_is_run(file):
    assert UNSAFE.findall(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch; torch.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "yaml.load(text, Loader)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import os; os.system('ls')",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_unsafe_calls(source):
    assert UNSAFE.search(source)


# --- code in models -----------------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath('ran').touch()\nimport transformers\nclass Custom(transformers.{}): pass\n"


def with_code(model: str, directory: Path, config_file: str, parent: str, name: str) -> str:
    """Copy a model's directory; `config_file` of the copy names a class in its own code."""
    directory.mkdir()
    for file in Path(model).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "custom.py").write_text(CODE.format(parent), encoding="utf-8")
    config = json.loads((directory / config_file).read_text(encoding="utf-8"))
    config = {**config, "model_type": "custom"} if config_file == "config.json" else config
    reference = ["custom.Custom", None] if name == "AutoTokenizer" else "custom.Custom"
    config["auto_map"] = {name: reference}
    config |= {"tokenizer_class": "Custom"} if name == "AutoTokenizer" else {}
    (directory / config_file).write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


@pytest.fixture
def data(tmp_path):
    rows = [{"task": f"t{n % 2}", "prompt": f"q{n}", "completion": "a" * n} for n in range(8)]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    return "data.jsonl"


@pytest.fixture
def model_with_code(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return with_code(model, tmp_path / "model", "config.json", "LlamaConfig", "AutoConfig")


@pytest.fixture
def tokenizer_with_code(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    name, parent = "AutoTokenizer", "PreTrainedTokenizerFast"
    return with_code(model, tmp_path / "tokenizer", "tokenizer_config.json", parent, name)


OFF = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out", "--report_to", "none", "--max_steps", "1"]
TASK = ["--commonit_metric", "task"]


def test_a_models_code_does_not_run(model_with_code, data, capfd):
    argv = ["sft", "--model_name_or_path", model_with_code, "--dataset_name", data, *TASK, *OFF]
    assert "model_name_or_path" in error_of(capfd, argv)
    assert "model_name_or_path" in error_of(capfd, ["inspect", data, "--model_name_or_path", model_with_code, *TASK])
    assert not Path("ran").exists()


def test_a_tokenizers_code_does_not_run(tokenizer_with_code, data, capfd):
    cli.main(["inspect", data, "--tokenizer", tokenizer_with_code, *TASK])
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_runs_where_it_is_trusted(part, request, data, capfd):
    """The counterpart of the tests above."""
    directory = request.getfixturevalue(f"{part}_with_code")
    option = "--model_name_or_path" if part == "model" else "--tokenizer"
    cli.main(["inspect", data, option, directory, *TASK, "--trust_remote_code", "true"])
    assert Path("ran").exists()


@pytest.mark.parametrize("reference", ["custom.Custom", "pathlib.Path", "subprocess.Popen"])
def test_an_encoders_code_does_not_run(reference, minilm, data, tmp_path, capfd):
    directory = tmp_path / "encoder"
    directory.mkdir()
    (directory / "custom.py").write_text(CODE.format("LlamaModel"), encoding="utf-8")
    modules = [{"idx": 0, "name": "0", "path": "", "type": reference}]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    options = ["--commonit_metric", "embedding", "--commonit_embedding_model", str(directory)]
    line = error_of(capfd, ["inspect", data, *options])
    assert "commonit_embedding_model" in line and reference in line
    assert not Path("ran").exists()


# --- network and files --------------------------------------------------------------------------------------------

WATCH = """
import json, os, sys
used, written = [], []

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        used.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
        raise OSError("no network here")
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.path.abspath(os.fsdecode(args[0])))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        written.extend(os.path.abspath(os.fsdecode(path)) for path in args[:2] if isinstance(path, (str, bytes)))

sys.addaudithook(watch)
from commonit_trl.cli import main as cli

codes = [cli.main(argv) for argv in json.loads(sys.argv[1])]
import socket
before = len(used)
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass
print(json.dumps({"codes": codes, "network": used[:before], "seen": len(used) - before, "written": written}))
"""


@pytest.fixture(scope="module")
def watched(model, minilm, tmp_path_factory):
    """Return the network accesses and written paths of a process that inspects, groups and trains rows with hostile
    labels."""
    directory = tmp_path_factory.mktemp("watched")
    rows = [{"task": label, "prompt": f"q{n}", "completion": "a" * n} for n, label in enumerate(LABELS * 2)]
    Dataset.from_list(rows).to_parquet(directory / "data.parquet")
    embedding = ["--commonit_metric", "embedding", "--commonit_embedding_model", minilm, "--commonit_num_groups", "2"]
    train = ["sft", "--model_name_or_path", model, "--dataset_name", "data.parquet", *OFF]
    commands = [
        ["inspect", "data.parquet", "--compare", "task,length,embedding", "--tokenizer", model, *embedding[2:]],
        ["inspect", "data.parquet", *TASK, "--html", "report.html"],
        ["group", "data.parquet", *TASK, "--output", "saved"],
        [*train, *embedding],
        [*train, *TASK, "--eval_strategy", "steps", "--dataset_test_split", "train", "--log_level", "info"],
        [*train, *TASK, "--packing", "true", "--max_length", "64"],
        # From the hub: one line of error.
        [*train, "--commonit_metric", "embedding"],
        ["inspect", "no/where", *TASK],
    ]
    (directory / "temporary").mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hub"),
        "HF_DATASETS_CACHE": str(directory / "cache"),
        "HOME": str(directory),
        "TMPDIR": str(directory / "temporary"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "temporary"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(commands)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, json.loads(done.stdout.splitlines()[-1]), done


@pytest.mark.slow
def test_offline_nothing_uses_the_network(watched):
    _, found, _ = watched
    assert found["codes"] == [0, 0, 0, 0, 0, 0, 2, 2]
    assert found["network"] == []
    assert found["seen"] > 0, "the hook sees a connection"


@pytest.mark.slow
def test_files_are_written_below_the_named_directories(watched):
    directory, found, _ = watched
    outside = {path for path in found["written"] if not Path(path).is_relative_to(directory)}
    assert outside <= {"/dev/null"}
    names = {path.name for path in directory.rglob("*")}
    assert not any("ran" in {*Path(name.split("\\")[-1]).parts} for name in names)
    assert not Path("/etc/ran").exists()


@pytest.mark.slow
def test_output_of_the_process_is_sanitized(watched):
    """Tables, epoch summary, warnings and metrics; progress bars go to the start of a line, or one up."""
    *_, done = watched
    for text in (done.stdout, done.stderr):
        assert not acting(text.replace(UP, ""), but="\n\r")


def test_labels_stay_text_in_the_model_card():
    groups = [{"name": label, "samples": 1, "steps": 1, "left_out": 0, "repeated": 0, "dropped": 0} for label in LABELS]
    counts = ("samples", "steps", "pure_steps", "baseline_steps", "left_out", "repeated")
    entry = {**dict.fromkeys(counts, 1), "groups": groups}
    entry["dropped"] = {"rows": 1, "by_reason": {LABELS[0]: 1}, "by_group": {LABELS[0]: 1}}
    section = model_card_section(entry, {"commonit_weights": dict.fromkeys(LABELS, 1)})
    assert not acting(section, but="\n")
    assert not re.search(r"(?<!\\)[<&]", section)
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in section.split("\n") if line.startswith("|")]
    assert cells == [5] * (len(LABELS) + 2)


# --- permissions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_have_the_permissions_of_the_umask(umask, model, data, capfd):
    before = os.umask(umask)
    try:
        assert cli.main(["group", data, *TASK, "--output", "saved"]) == 0
        assert cli.main(["inspect", data, *TASK, "--html", "shown/report.html"]) == 0
        assert cli.main(["sft", "--model_name_or_path", model, "--dataset_name", data, *TASK, *OFF]) == 0
    finally:
        os.umask(before)
    found = {
        path: path.stat().st_mode & 0o777
        for name in ("saved", "shown", "out/commonit")
        for path in Path(name).iterdir()
    }
    assert {path.name for path in found} == {"groups.json", "assignment.parquet", "report.html", "run.json"}
    assert set(found.values()) == {0o666 & ~umask}
    assert len(pq.read_table("saved/assignment.parquet"))
