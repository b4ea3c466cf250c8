"""The report of a full test run."""

import os
import shlex
from collections import defaultdict
from pathlib import Path

import pytest


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
