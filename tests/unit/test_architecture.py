"""Imports within the package have no cycles, and importing the package loads no framework.

Only the trainer and the command line import `trl`; no module imports `axolotl` or unpickles.
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

# module -> modules of the package it may import; a new module needs a line here.
COMMAND_LINE = {"cli", "compare", "__main__"}
CORE = {
    "config": set(),
    "rows": {"config", "turns"},
    "turns": set(),
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
    """Yield the dotted names that `file` imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_are_those_allowed(file: Path) -> None:
    here, names = module_of(file), list(imported(file))
    assert here in MAY_IMPORT, f"{here}: add this module to MAY_IMPORT"
    for name in names:
        if name.split(".")[0] == PACKAGE:
            target = name.split(".")[1]
            target = target if target in MAY_IMPORT else ""  # a name of the package itself, e.g. __version__
            assert target in MAY_IMPORT[here] | {here}, f"{file} imports {name}"
    tops = {name.split(".")[0] for name in names}
    assert not tops & {"axolotl", "axolotl_plugin", "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert "trl" not in tops or here in COMMAND_LINE or file.parts[-2:] == ("trainer", "sft.py")
    uses_torch = {"embedding.py", "ranks.py", "sampler.py"}
    assert "torch" not in tops or here not in {"config", "plan", "grouping"} or file.name in uses_torch


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.plan", f"{PACKAGE}.config"])
def test_package_import_loads_no_framework(module: str) -> None:
    frameworks = {"torch", "trl", "transformers", "datasets", "sklearn"}
    code = f"import sys, {module}; print(*{frameworks} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_resolve() -> None:
    for name in commonit_trl.__all__:
        assert getattr(commonit_trl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        commonit_trl.Trainer  # noqa: B018
