"""Run benchmarks: `python -m benchmarks [NAME ...] [--size quick|full|gpu] [--data FOLDER]`.

Without names, run all benchmarks of the size, each in its own process; skipped ones print the reason. Reports go to
benchmarks/results, or to `--out`. `--set NAME=VALUE` changes a parameter of the size (see `SIZES` of each module).
Under torchrun every rank runs the benchmark and rank 0 writes the report.
"""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Settings, Skipped, write_report

NAMES = (
    "plan_speed",
    "reading",
    "padding",
    "balance",
    "compositions",
    "training",
    "overhead",
    "embedding",
    "dtype",
    "sharded",
    "ray_embeddings",
    "clustering",
    "backends",
    "metrics_overhead",
    "evaluation",
    "real_data",
    "gradients",
    "study",
    "axolotl_real_data",
)


def run(name: str, size: str, given: list[str], folder: Path | None, out: Path) -> None:
    """Run one benchmark and write its report.

    Raises:
        Skipped: if it cannot run here.
    """
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if size not in benchmark.SIZES:
        raise Skipped(f"has no size {size}")
    parameters = {**benchmark.SIZES[size], **dict(map(parameter, given))}
    unknown = parameters.keys() - benchmark.SIZES[size].keys()
    if unknown:
        raise SystemExit(f"--set: {name} has no {', '.join(sorted(unknown))}; {size} has {benchmark.SIZES[size]}")
    out.mkdir(parents=True, exist_ok=True)  # benchmarks also write there themselves
    report = benchmark.run(Settings(size=size, given=parameters, folder=folder, out=out))
    if os.environ.get("RANK", "0") == "0":
        data = ["--data", "FOLDER"] if folder else []
        changes = [word for change in given for word in ("--set", change)]
        ranks = os.environ.get("WORLD_SIZE", "1")
        start = ["python"] if ranks == "1" else ["torchrun", "--nproc_per_node", ranks]
        command = shlex.join([*start, "-m", "benchmarks", name, "--size", size, *data, *changes])
        path = write_report(name, benchmark.TITLE, size, command, report, out)
        print(f"{path.read_text(encoding='utf-8')}\n{name}: {path}", flush=True)


def parameter(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is JSON if it is valid JSON, else text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--size", choices=("quick", "full", "gpu"), default="quick", help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("COMMONIT_REAL_DATA") or None,
        help="directory of the real data, see benchmarks/mixture.py (default: COMMONIT_REAL_DATA)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter")
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if args.set and len(args.names) != 1:
        parser.error("--set changes one benchmark: name it")

    if len(args.names) == 1:
        try:
            run(args.names[0], args.size, args.set, args.data, args.out)
        except Skipped as reason:
            print(f"{args.names[0]}: skipped, {reason}", flush=True)
        return
    options = ["--size", args.size, "--out", str(args.out)]
    if args.data:
        options += ["--data", str(args.data)]
    commands = {name: [sys.executable, "-m", "benchmarks", name, *options] for name in args.names or NAMES}
    failed = [name for name, command in commands.items() if subprocess.run(command).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
