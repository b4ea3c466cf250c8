"""The package's imports go one way, and importing it costs little.

config <- text <- grouping; config <- plan <- sampler; both <- trainer <- command line. `trl` stays in the
trainer and the command line, `axolotl` outside, and nothing unpickles.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import commonit_trl

PACKAGE = "commonit_trl"
ROOT = Path(commonit_trl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each module may import of the package; a new module needs a line here.
COMMAND_LINE = {"cli", "compare", "__main__"}
CORE = {
    "config": set(),
    "rows": {"config"},
    "files": set(),
    "loading": set(),
    "sanitize": set(),
    "grouping": {"config", "rows", "loading", "files", "sanitize"},
    "plan": {"config"},
    "report": {"config", "rows", "grouping", "plan", "files", "sanitize"},
    "trainer": {"config", "rows", "grouping", "plan", "report", "files", "sanitize"},
}
MAY_IMPORT = CORE | {module: {*CORE, *COMMAND_LINE, ""} for module in COMMAND_LINE}
MAY_IMPORT["__init__"] = set(CORE) - {"report"}


def module_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all that `file` imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_within_the_package_go_one_way(file: Path) -> None:
    here = module_of(file)
    assert here in MAY_IMPORT, f"{here}: say in MAY_IMPORT what this module may import"
    for name in imported(file):
        if name.split(".")[0] == PACKAGE:
            target = name.split(".")[1]
            target = target if target in MAY_IMPORT else ""  # a name of the package itself, e.g. __version__
            assert target in MAY_IMPORT[here] | {here}, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_frameworks_stay_in_their_rooms(file: Path) -> None:
    tops = {name.split(".")[0] for name in imported(file)}
    assert not tops & {
        "axolotl",
        "axolotl_plugin",
        "pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    if module_of(file) not in COMMAND_LINE and file.parts[-2:] != ("trainer", "sft.py"):
        assert "trl" not in tops
    if module_of(file) in {"config", "plan", "grouping"} and file.name not in {
        "embedding.py",
        "ranks.py",
        "sampler.py",
    }:
        assert "torch" not in tops


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.plan", f"{PACKAGE}.config"])
def test_importing_the_package_imports_no_framework(module: str) -> None:
    frameworks = {"torch", "trl", "transformers", "datasets", "sklearn"}
    code = f"import sys, {module}; print(*{frameworks} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_public_names_are_where_the_package_says() -> None:
    for name in commonit_trl.__all__:
        assert getattr(commonit_trl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        commonit_trl.Trainer  # noqa: B018
