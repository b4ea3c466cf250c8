"""Files for GitHub and packaging agree with the Makefile, pyproject.toml and the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from commonit_trl.report.summary import CITATION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_makefile_targets(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {*re.findall(r"^([\w-]+):", makefile, re.MULTILINE), ".venv/.ready"}
    steps = [step.get("run", "") for job in load(path)["jobs"].values() for step in job["steps"]]
    called = [words[1] for words in map(str.split, steps) if words[:1] == ["make"]]
    assert called and set(called) <= targets


def test_ci_covers_the_classified_python_versions():
    classified = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: Python :: 3." in name]
    assert load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_version_is_defined_once():
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    assert "version" not in load(ROOT / "CITATION.cff")


def test_citation_file_and_model_card_cite_the_same_paper():
    bibtex = dict(re.findall(r'(\w+) = "(.*)"', CITATION))
    paper = load(ROOT / "CITATION.cff")["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert authors == bibtex["author"]
    assert paper["title"] == re.sub("[{}]", "", bibtex["title"])
    assert (paper["collection-title"], str(paper["year"]), paper["url"]) == (
        bibtex["booktitle"],
        bibtex["year"],
        bibtex["url"],
    )
