"""Build the documentation site into build/site; every warning is an error.

Steps: (1) copy docs/*.md and the files of PAGES to build/docs; (2) rewrite their relative links: to the page of the
site where there is one, to a copy of a picture, to the repository's address otherwise; (3) write the API page, one
entry for each public name of `commonit_trl`; (4) run Zensical in strict mode.

    python -m docs.make_site

Pages keep the relative links that GitHub resolves. Zensical checks links between pages and their anchors; this script
checks links to pictures and other files. Griffe reads the docstrings without importing the package, and its warnings
do not fail a strict build, so this script reads them from the output. Cost: five seconds.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "docs"
PAGES = {  # pages outside docs/, by their path in the repository
    "README.md": "index.md",
    "axolotl_plugin/README.md": "axolotl-plugin.md",
    "example_configs/paper/README.md": "paper.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
API_PAGE = "api.md"
PICTURES = (".png", ".svg", ".jpg", ".gif")

_LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"#\s]+)')


def pages(root: Path = ROOT) -> dict[str, str]:
    """Map the path of each page in the repository to its name on the site."""
    return {**PAGES, **{f"docs/{file.name}": file.name for file in sorted((root / "docs").glob("*.md"))}}


def public_names() -> list[str]:
    """Read `commonit_trl.__all__` without importing the package."""
    tree = ast.parse((ROOT / "commonit_trl" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(names)


def rewrite_links(text: str, page: str, root: Path = ROOT) -> tuple[str, dict[str, str]]:
    """Point the relative links of a page at the site or at the repository.

    Args:
        text: Markdown source.
        page: path of the page in the repository, `/` between its parts.
        root: the repository.

    Returns:
        The text, and the pictures it shows: path in the repository -> name on the site.

    Raises:
        FileNotFoundError: a link names a file that does not exist.
    """
    site = pages(root)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]
    pictures = {}

    def target(match: re.Match[str]) -> str:
        opening, link = match.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(page), link)).replace(os.sep, "/")
        if not (root / path).exists():
            raise FileNotFoundError(f"{page}: {link} does not exist.")
        if path in site:
            return opening + site[path]
        if path.endswith(PICTURES):
            pictures[path] = path.rpartition("/")[2]
            return opening + pictures[path]
        return f"{opening}{repository}/{'tree' if (root / path).is_dir() else 'blob'}/main/{path}"

    return _LINK.sub(target, text), pictures


def stage() -> None:
    """Write the pages and pictures of the site to build/docs."""
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    for page, name in pages().items():
        text, pictures = rewrite_links((ROOT / page).read_text(encoding="utf-8"), page)
        (STAGED / name).write_text(text, encoding="utf-8")
        for path, picture in pictures.items():
            shutil.copyfile(ROOT / path, STAGED / picture)
    entries = "".join(f"\n::: commonit_trl.{name}\n" for name in public_names())
    (STAGED / API_PAGE).write_text(f"# API\n\nThe public names of `commonit_trl`.\n{entries}", encoding="utf-8")


def build() -> bool:
    """Run Zensical, print its output, and return whether it found nothing wrong."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
    print(output, end="")
    return result.returncode == 0 and "griffe:" not in output


if __name__ == "__main__":
    stage()
    sys.exit(0 if build() else "error: the site has warnings; see above.")
