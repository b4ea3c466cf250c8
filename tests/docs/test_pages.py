"""Names, messages, options and outputs in docs/ agree with the code."""

import argparse
import ast
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers.hostile import hostile_inspection

from commonit_trl.cli import compare as comparing
from commonit_trl.report import tables
from commonit_trl.trainer import checkpoint, metrics
from docs import make_batches

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README_LINES = 100
PICTURE_BYTES = 300_000
PLACEHOLDER = "…"


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def first_cells(text):
    """Return the code spans in the first column of all tables."""
    cells = (line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def words_of(node):
    """Return the text of a string node with placeholders for its values; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|%\.\df", PLACEHOLDER, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
        return "".join(map(str, parts))
    return None


def in_order(parts, text):
    """Tell whether `text` has the parts one after the other."""
    for part in filter(None, parts):
        _, found, text = text.partition(part)
        if not found:
            return False
    return True


def keys_of(function):
    """Return the keys of the only dictionary literal in a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (made,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    return [key.value for key in made.keys if key is not None]  # None: another mapping


@pytest.fixture(scope="module")
def strings():
    """Return all strings of both packages."""
    files = [file for package in ("commonit_trl", "axolotl_plugin") for file in (ROOT / package).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [text for text in map(words_of, nodes) if text]


MESSAGES = re.findall(r"^\| `([^`]+)` \|", read("troubleshooting.md"), re.MULTILINE)


def test_messages_are_found_and_unique():
    assert len(MESSAGES) > 50 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_in_the_code(message, strings):
    assert any(in_order(message.split(PLACEHOLDER), text) for text in strings)


def test_checkpoints_page_lists_the_compared_settings():
    keys = [*keys_of(checkpoint.describe), *checkpoint.SPEC_FIELDS.values(), *keys_of(checkpoint.fingerprints)]
    assert sorted(first_cells(read("checkpoints.md"))) == sorted(keys)


def test_metrics_page_lists_the_logged_metrics():
    named = re.findall(r"^\| `([^`]+)` \| (.*) \|$", metrics.__doc__, re.MULTILINE)
    assert first_cells(read("metrics.md")) == [name for name, _ in named]


def test_metric_page_explains_every_line_of_the_overview():
    explained = read("choosing-a-metric.md").partition("## How to read it")[2]
    for label, *_ in tables.overview([hostile_inspection()])[1]:
        words = label.partition(",")[0]
        assert f"| {words} |" in explained, words


def test_metric_page_shows_the_output_of_each_command():
    outputs = re.findall(r"^```text\n(.*?)^```$", read("choosing-a-metric.md"), re.MULTILINE | re.DOTALL)
    assert len(outputs) == 3
    for metric, output in zip(("task", "length", "embedding"), outputs):
        assert f"Groups by {metric} " in output and "Padding ratio" in output


def test_comparison_page_lists_the_options_and_shows_output():
    page = read("compare.md")
    parser = argparse.ArgumentParser()
    comparing.add_arguments(parser)
    options = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert set(first_cells(page)) == options
    (output,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert all(word in output for word in ("Held-out", "vs none", "Groups by task", "intervals of equal"))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_LINES


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.png")), ids=lambda picture: picture.name)
def test_pictures_are_small_and_shown(picture):
    assert picture.stat().st_size < PICTURE_BYTES
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert any(f"({picture.name})" in read(page.name) for page in DOCS.glob("*.md"))


def test_picture_of_the_batches_matches_the_plan():
    mixed, pure = make_batches.steps()
    assert sorted(np.ravel(mixed)) == sorted(np.ravel(pure))  # the same samples
    assert all(len(set(groups)) == 1 for groups in pure) and all(len(set(groups)) > 1 for groups in mixed)
    assert make_batches.PICTURE.read_text(encoding="utf-8") == make_batches.draw(), "run python -m docs.make_batches"
    assert f"(docs/{make_batches.PICTURE.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_readme_links_to_every_page(page):
    assert f"(docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
