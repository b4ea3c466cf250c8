"""The documentation site: its pages, its navigation and the links that `make docs` rewrites."""

import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import commonit_trl

ROOT = Path(__file__).parents[2]
make_site = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "make_site.py")))
SITE = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]


def leaves(nav):
    """Yield the pages of a navigation tree, in order."""
    for entry in nav:
        for target in entry.values():
            yield from leaves(target) if isinstance(target, list) else [target]


@pytest.fixture
def repository(tmp_path):
    """Make a repository with two pages, a picture, and files outside docs/."""
    for path in ("docs/one.md", "docs/two.md", "docs/shot.png", "README.md", "results/a.md", "results/a.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_navigation_lists_every_page_once():
    assert sorted(leaves(SITE["nav"])) == sorted([*make_site.pages().values(), make_site.API_PAGE])


def test_site_and_package_have_the_same_urls():
    assert (SITE["repo_url"], SITE["site_url"]) == (URLS["Source"], URLS["Documentation"])


def test_api_page_lists_the_public_names():
    assert make_site.public_names() == commonit_trl.__all__


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("[x](two.md#part)", "[x](two.md#part)"),
        ("[x](../README.md)", "[x](index.md)"),
        ("[x](../results/a.md#part)", f"[x]({URLS['Source']}/blob/main/results/a.md#part)"),
        ("[x](../results)", f"[x]({URLS['Source']}/tree/main/results)"),
        ("![x](../results/a.png)", "![x](a.png)"),
        ('<img src="../results/a.png">', '<img src="a.png">'),
        ("[x](#part) [y](https://host/two.md)", "[x](#part) [y](https://host/two.md)"),
    ],
)
def test_links_are_rewritten_to_the_site_or_the_repository(source, expected, repository):
    text, pictures = make_site.rewrite_links(source, "docs/one.md", repository)
    assert text == expected
    assert all((repository / path).is_file() and name in text for path, name in pictures.items())
    assert len(pictures) == source.count(".png")


def test_links_of_the_readme_are_rewritten_to_pages(repository):
    assert make_site.rewrite_links("[x](docs/two.md)", "README.md", repository)[0] == "[x](two.md)"


@pytest.mark.parametrize("link", ["gone.md", "../results/gone.png"])
def test_link_to_a_missing_file_is_an_error(link, repository):
    with pytest.raises(FileNotFoundError, match=f"docs/one.md.*{link}"):
        make_site.rewrite_links(f"[x]({link})", "docs/one.md", repository)
