"""A tiny model on disk."""

import pytest
from helpers.toys import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a tiny model and its tokenizer."""
    directory = str(tmp_path_factory.mktemp("model"))
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
