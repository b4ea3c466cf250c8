"""Coverage-guided fuzzing of the targets in targets.py: `make fuzz`, or `python tests/fuzz/fuzz.py --help`.

Each target runs in its own process, where atheris (libFuzzer) instruments the modules of this project. Half of the
inputs are libFuzzer's mutations of bytes, half are mutations of JSON by `targets.mutate`. A failure ends the run of its
target and saves the input; `--input FILE` runs it again. The epoch plan has no bytes to mutate: hypothesis runs the
property tests with more examples. The report is written to `--out`.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
SLOW = 20
"""How many times fewer inputs a slow target gets."""
SECONDS_OF_A_HANG = 60


def fuzz(name: str, runs: int, kept: str) -> None:
    """Fuzz one target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["commonit_trl", "axolotl_plugin"]):
        import targets
    make_quiet()

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        content = atheris.Mutate(content, most) if seed % 2 else targets.mutate(content, random.Random(seed))
        return content[:most]

    folder = Path(tempfile.mkdtemp(prefix="commonit-fuzz-"))
    (folder / "seeds").mkdir()
    (folder / "files").mkdir()
    target = targets.TARGETS[name](folder / "files")
    for number, seed in enumerate(target.seeds):
        (folder / "seeds" / str(number)).write_bytes(seed)
    options = [f"-runs={runs // SLOW if target.slow else runs}", f"-timeout={SECONDS_OF_A_HANG}", "-max_len=20000"]
    options += [f"-artifact_prefix={kept}/{name}-", "-seed=1", "-rss_limit_mb=0", str(folder / "seeds")]
    atheris.Setup([sys.argv[0], *options], target.run, custom_mutator=mutated)
    atheris.Fuzz()


def make_quiet() -> None:
    """Silence the log of the code under test."""
    import logging
    import warnings

    import datasets

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()


def fuzz_plan(times: int) -> dict[str, object]:
    """Run the property tests of the epoch plan with `times` as many examples; return the row of the report."""
    tests = str(HERE.parent / "unit" / "test_plan_properties.py")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=0", "--hypothesis-show-statistics", tests],
        env={**os.environ, "COMMONIT_PLAN_EXAMPLES": str(times)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-4000:])
    tried = sum(map(int, re.findall(r"(\d+) passing", done.stdout)))
    row = {"target": "epoch plan", "inputs": tried, "seconds": round(time.monotonic() - started), "covered": "-"}
    row["found"] = "see above" if done.returncode else "nothing"
    print(*row.values(), flush=True)
    return row


def run_all(names: list[str], runs: int, plan_times: int, kept: str, out: Path) -> bool:
    """Fuzz each target in its own process and write the report; return whether all passed."""
    from benchmarks.common import Report, Table, write_report

    rows = []
    for name in names:
        command = [sys.executable, __file__, name, "--runs", str(runs), "--kept", kept, "--alone"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        tried, seconds = (re.findall(r"Done (\d+) runs in (\d+)", done.stderr) or [("0", "0")])[-1]
        covered = (re.findall(r"cov: (\d+)", done.stderr) or ["0"])[-1]
        found = "nothing" if done.returncode == 0 else "see above"
        if done.returncode:
            print(done.stderr[-4000:])
        rows.append({"target": name, "inputs": int(tried), "seconds": int(seconds), "covered": int(covered)})
        rows[-1]["found"] = found
        print(*rows[-1].values(), flush=True)
    rows.append(fuzz_plan(plan_times))
    table = Table(heading="Inputs tried", header=list(rows[0]), rows=[list(row.values()) for row in rows])
    note = (
        "`covered` counts the edges of this project's code that the inputs reached, as libFuzzer sees them. The epoch "
        "plan is tried by hypothesis, in up to 100,000 rows and 10,000 groups (tests/unit/test_plan_properties.py)."
    )
    report = Report(head={}, parts=[table, note], results=rows, packages=("atheris", "safetensors"))
    command = f"make fuzz ARGS='--runs {runs} --plan-times {plan_times}'"
    print(write_report("fuzz", "Damaged files and odd options", "", command, report, out))
    return all(row["found"] == "nothing" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--runs", type=int, default=100_000, help=f"inputs a target; slow ones get 1/{SLOW} of it")
    parser.add_argument("--plan-times", type=int, default=20, help="times the tests' own examples of the epoch plan")
    parser.add_argument("--kept", default=tempfile.gettempdir(), help="folder for inputs that were found")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the figures")
    parser.add_argument("--input", type=Path, help="try this one input again, without atheris")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        fuzz(given.targets[0], given.runs, given.kept)
    import targets

    if given.input:
        with tempfile.TemporaryDirectory() as folder:
            targets.TARGETS[given.targets[0]](Path(folder)).run(given.input.read_bytes())
        return 0
    names = given.targets or list(targets.TARGETS)
    return 0 if run_all(names, given.runs, given.plan_times, given.kept, given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
