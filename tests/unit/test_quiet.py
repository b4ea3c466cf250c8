"""`quiet_libraries` sends library output to a log and keeps the terminal for the command.

Invariants: (1) stdout and stderr have only the command's output and one line that names the log; (2) the log has the
output of Python, C and child processes, and moves to the output directory; (3) an empty log is removed and not named;
(4) a terminal shows one progress bar at a time.
"""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

CHATTER = """
import logging, os, subprocess, sys, warnings
handler = logging.StreamHandler()  # libraries keep the stream they find at import
def chatter():
    print("to stdout")
    warnings.warn("a warning", FutureWarning)
    logging.getLogger("library").addHandler(handler)
    logging.getLogger("library").warning("a record")
    os.write(2, b"from C\\n")
    subprocess.run(["sh", "-c", "echo from a child"])
"""


def python(code, tmp_path, *, stderr=subprocess.PIPE, exit_code=0):
    """Run `code` with an empty temp directory, and return the process and the logs in that directory."""
    temp = tmp_path / "temp"
    temp.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", "from pathlib import Path\nfrom commonit_trl.cli.quiet import *\n" + CHATTER + code],
        env=os.environ | {"TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == exit_code, done.stderr
    return done, list(temp.iterdir())


def check_log(text):
    assert all(part in text for part in ("to stdout", "a warning", "a record", "from C", "from a child"))


def test_python_c_and_child_output_is_logged(tmp_path):
    done, (log,) = python(
        "with quiet_libraries() as screen:\n    chatter()\n    print('ours', file=screen.stdout)\nprint('after')",
        tmp_path,
    )
    assert done.stdout == "ours\nafter\n"
    assert done.stderr == f"Library messages: {log}\n"
    check_log(log.read_text(encoding="utf-8"))


def test_the_log_moves_to_the_output_directory_if_it_exists(tmp_path):
    code = "with quiet_libraries() as screen:\n    screen.log_dir = Path('out')\n    chatter()"
    done, (log,) = python(code, tmp_path)
    assert done.stderr == f"Library messages: {log}\n"
    log.unlink()
    done, left = python(f"Path('out').mkdir()\n{code}", tmp_path)
    assert (done.stderr, left) == ("Library messages: out/libraries.log\n", [])
    check_log(Path(tmp_path / "out/libraries.log").read_text(encoding="utf-8"))


def test_an_exception_names_the_log_and_keeps_its_traceback(tmp_path):
    code = "with quiet_libraries() as screen:\n    chatter()\n    raise RuntimeError('broken')"
    done, (log,) = python(code, tmp_path, exit_code=1)
    assert done.stderr.startswith(f"Library messages: {log}\nTraceback")
    assert done.stderr.endswith("RuntimeError: broken\n")


def test_without_messages_there_is_no_log(tmp_path):
    done, left = python("with quiet_libraries() as screen:\n    print('ours', file=screen.stderr)", tmp_path)
    assert (done.stdout, done.stderr, left) == ("", "ours\n", [])


def test_verbose_prints_messages_to_stderr(tmp_path):
    code = "with quiet_libraries(verbose=True) as screen:\n    chatter()\n    print('ours', file=screen.stdout)"
    done, left = python(code, tmp_path)
    assert (done.stdout, left) == ("ours\n", [])
    check_log(done.stderr)


BARS = """
from tqdm.auto import tqdm
with quiet_libraries():
    for outer in tqdm(range(3), desc="outer", mininterval=0):
        for inner in tqdm(range(3), desc="inner", mininterval=0):
            pass
    for next in tqdm(range(3), desc="next", mininterval=0):
        pass
"""


def test_a_terminal_shows_one_bar_at_a_time(tmp_path):
    reader, terminal = pty.openpty()
    _, left = python(BARS, tmp_path, stderr=terminal)
    os.close(terminal)
    assert left == []
    parts = []
    with contextlib.suppress(OSError):  # the terminal has no more writers
        while part := os.read(reader, 65_536):
            parts.append(part)
    os.close(reader)
    shown = b"".join(parts).decode()
    assert "outer" in shown and "next" in shown
    assert "inner" not in shown


def test_pipes_and_logs_have_no_bars(tmp_path):
    done, left = python(BARS, tmp_path)
    assert (done.stdout, done.stderr, left) == ("", "", [])


def test_deepspeed_is_quiet_unless_it_is_used(tmp_path):
    code = "hide_unused_deepspeed()\nlogging.getLogger('DeepSpeed').warning('notice')\n"
    used = "os.environ['ACCELERATE_USE_DEEPSPEED'] = 'true'\n"
    assert python(code, tmp_path)[0].stderr == ""
    assert python(used + code, tmp_path)[0].stderr == "notice\n"
    assert python(code.replace("warning", "error"), tmp_path)[0].stderr == "notice\n"
