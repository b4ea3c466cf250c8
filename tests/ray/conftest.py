"""Tests on Ray, skipped where it is not installed."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

# An import would find this folder, as tests/ is on the path.
INSTALLED = any(importlib.metadata.distributions(name="ray"))


class _Skipped(pytest.Module):
    def collect(self) -> Any:
        raise pytest.skip.Exception("ray is not installed: make test-ray has it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return None if INSTALLED else _Skipped.from_parent(parent, path=module_path)
