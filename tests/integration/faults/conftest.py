"""A server of training runs (see server.py), and the report of a full test run."""

import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


class Server:
    """Starts server.py and sends it one run at a time."""

    def __init__(self, log):
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

    def do(self, **run):
        """Return the answer to `run`, with each rank's log in `output`."""
        self.process.stdin.write(json.dumps(run) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        logs = [
            Path(run["dir"]) / f"{run['name']}.{run.get('attempt', 0)}.rank{rank}.log"
            for rank in range(run["world_size"])
        ]
        return {**answer, "output": [log.read_text(encoding="utf-8", errors="replace") for log in logs]}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stream:
        server = Server(stream)
        yield server
        server.process.stdin.close()
        server.process.wait(timeout=60)


@pytest.fixture(scope="session")
def figures(pytestconfig):
    """Rows of the report by table; written to the folder COMMONIT_FAULTS_RESULTS at the end."""
    found = defaultdict(list)
    yield found
    folder = os.environ.get("COMMONIT_FAULTS_RESULTS")
    if folder and found:
        from benchmarks.common import Report, Table, write_report

        tables = [
            Table(heading=heading, header=list(rows[0]), rows=[list(row.values()) for row in rows])
            for heading, rows in found.items()
        ]
        report = Report(head={}, parts=tables, results=dict(found), packages=("accelerate", "deepspeed"))
        command = shlex.join(["python", "-m", "pytest", *pytestconfig.invocation_params.args])
        write_report("faults", "Faults, survived", "", command, report, Path(folder))
