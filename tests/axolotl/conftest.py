"""Tests on the real Axolotl, skipped where it is not installed."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

INSTALLED = any(
    importlib.metadata.distributions(name="axolotl")
)  # an import would find this folder, as tests/ is on the path
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # Axolotl reads it on import
# Prepare rows in this process unless a recipe sets the number of processes.
os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0"

if INSTALLED:
    import axolotl.cli  # noqa: F401 - configures logging on import and hides other packages' messages

    logging.setLoggerClass(logging.Logger)
    for logger in (logging.getLogger(), logging.getLogger("axolotl")):
        for handler in logger.handlers.copy():
            if getattr(handler, "stream", None) is sys.stdout:  # it would mix with the output of commands under test
                logger.removeHandler(handler)


class _Skipped(pytest.Module):
    def collect(self) -> Any:
        raise pytest.skip.Exception("axolotl is not installed: make test-lowest has it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return None if INSTALLED else _Skipped.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def fresh_axolotl() -> Iterator[None]:
    """Restore the plugins, functions and environment variables that a test changes."""
    environment = dict(os.environ)
    yield
    from axolotl.integrations.base import PluginManager

    from axolotl_plugin.labels import _REPLACED

    PluginManager.get_instance().plugins.clear()
    for (module, name), original in _REPLACED.items():
        setattr(module, name, original)
    os.environ.clear()
    os.environ.update(environment)
