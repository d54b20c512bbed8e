"""The first moments of a rank, in real processes: a launcher that is gone by then, a wish to stop that comes so early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from promoe_ds.launch.heartbeat import read_notes

REPOSITORY = Path(__file__).parents[3]
RANK = """
import time
from promoe_ds.cli.entry import run_entry
from promoe_ds.launch.early_signals import EarlySignals
def main(arguments):
    beginning = EarlySignals()
    print("begun", len(beginning.chain), flush=True)
    time.sleep(0.3)
    print(beginning.stop_reason)
run_entry(main)
"""
BY_DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}


def _start(*command: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_rank_whose_launcher_is_gone_before_it_begins_ends_with_9(tmp_path) -> None:
    rank = _start(sys.executable, "-c", RANK, **BY_DEEPSPEED, PROMOE_NOTES_DIR=str(tmp_path))
    output, errors = rank.communicate(timeout=200)
    assert (rank.returncode, output) == (9, "")
    assert "its launcher ended before it had begun" in errors
    assert [note.code for note in read_notes(tmp_path)] == [9], "the folder of notes serves where there is no lease"


def test_rank_under_a_launcher_behind_a_script_of_the_user_is_no_orphan(tmp_path) -> None:
    launch = tmp_path / "deepspeed.launcher.launch"
    launch.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    rank = [sys.executable, "-c", RANK]
    output, errors = _start(sys.executable, str(launch), *rank, **BY_DEEPSPEED).communicate(timeout=200)
    assert output == "begun 2\n\n", errors
    output, errors = _start(sys.executable, str(launch), "sh", "-c", '"$@"; exit $?', "sh", *rank,
                            **BY_DEEPSPEED).communicate(timeout=200)
    assert output == "begun 0\n\n", errors


def test_abort_from_inside_a_library_leaves_the_stacks(tmp_path) -> None:
    """As nccl's watchdog ends a process, in a thread where no exception reaches Python."""
    rank = _start(sys.executable, "-c", RANK.replace("time.sleep(0.3)", "__import__('os').abort()"))
    _, errors = rank.communicate(timeout=200)
    assert rank.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in errors
    assert "in main" in errors


def test_signal_before_the_supervisor_is_a_wish_to_stop(tmp_path) -> None:
    rank = _start(sys.executable, "-c", RANK.replace("time.sleep(0.3)", "while not beginning.stop_reason: time.sleep(0.05)"))
    assert rank.stdout.readline() == "begun 0\n"
    rank.send_signal(signal.SIGTERM)
    output, errors = rank.communicate(timeout=200)
    assert (rank.returncode, output) == (0, "SIGTERM\n"), errors
