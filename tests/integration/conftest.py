"""What the tests of the command line share: a model on disk, and a folder of their own."""

import pytest
import torch
from helpers.toys import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a tiny model and its tokenizer."""
    directory = str(tmp_path_factory.mktemp("model"))
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Relative paths, outputs and caches are the test's own; one thread, as the models are tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
