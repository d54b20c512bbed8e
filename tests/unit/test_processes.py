"""The tests' own processes: their codes and words, and that none outlives its test."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ..processes import REPOSITORY, Forks, environment, run, run_python


def _hang(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_fork_that_hangs_is_named_and_killed(tmp_path: Path) -> None:
    with Forks(_hang, (tmp_path,), [environment()]) as forks:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        with pytest.raises(AssertionError, match="not done within"):
            forks.wait(0.1)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@pytest.mark.parametrize(
    ("code", "ends"),
    [("print(__name__, sys.argv[1:])", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("os.abort()", -6)],
)
def test_fork_ends_as_an_interpreter_of_its_own_would(tmp_path: Path, code: str, ends: int) -> None:
    (tmp_path / "script.py").write_text(f"import os, sys\n{code}\n")
    forked = run_python(["script.py", "a b"], cwd=tmp_path, env=environment(), timeout=100)
    real = run([sys.executable, "script.py", "a b"], cwd=tmp_path, env=environment(), timeout=100)
    assert forked.returncode == real.returncode == ends
    assert forked.stdout == real.stdout
    assert ("ZeroDivisionError" in forked.stderr) == (ends == 1)


def test_processes_of_tests_in_the_background_heed_interrupts() -> None:
    below = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    code = (
        f"import subprocess, sys, tests.conftest; subprocess.run([sys.executable, '-c', {below!r}])"
    )
    done = run(
        ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment(),
        timeout=100,
    )
    assert done.stdout == "True\n", done.stderr
