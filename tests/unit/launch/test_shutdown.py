"""Signals to a launcher, and to a rank whose launcher may be gone before it starts, in real
processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from promoe_ds.launch import shutdown as shutdowns
from promoe_ds.launch.heartbeat import read_rank_statuses
from promoe_ds.launch.shutdown import ShutdownRequest

REPOSITORY = Path(__file__).parents[3]
RANK = """
import time
from promoe_ds.cli.entry import run_entry
from promoe_ds.launch.shutdown import EarlySignals
def main(arguments):
    early = EarlySignals()
    print("started", len(early.chain), flush=True)
    time.sleep(0.3)
    print(early.reason)
run_entry(main)
"""
BY_DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}


def _start(*command: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_rank_whose_launcher_is_gone_before_it_begins_ends_with_9(tmp_path) -> None:
    rank = _start(sys.executable, "-c", RANK, **BY_DEEPSPEED, PROMOE_STATUS_DIR=str(tmp_path))
    output, errors = rank.communicate(timeout=200)
    assert (rank.returncode, output) == (9, "")
    assert errors.startswith("error: rank 0 on ")
    assert [status.code for status in read_rank_statuses(tmp_path)] == [9]


def test_rank_under_a_launcher_behind_a_script_of_the_user_is_no_orphan(tmp_path) -> None:
    launch = tmp_path / "deepspeed.launcher.launch"
    launch.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    rank = [sys.executable, "-c", RANK]
    output, errors = _start(sys.executable, str(launch), *rank, **BY_DEEPSPEED).communicate(
        timeout=200
    )
    assert output == "started 2\n\n", errors
    output, errors = _start(
        sys.executable, str(launch), "sh", "-c", '"$@"; exit $?', "sh", *rank, **BY_DEEPSPEED
    ).communicate(timeout=200)
    assert output == "started 0\n\n", errors


def test_abort_from_inside_a_library_leaves_the_stacks(tmp_path) -> None:
    """As nccl's watchdog ends a process, in a thread where no exception reaches Python."""
    rank = _start(sys.executable, "-c", RANK.replace("time.sleep(0.3)", "__import__('os').abort()"))
    _, errors = rank.communicate(timeout=200)
    assert rank.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in errors
    assert "in main" in errors


def test_signal_before_the_supervisor_is_a_shutdown_request(tmp_path) -> None:
    rank = _start(
        sys.executable,
        "-c",
        RANK.replace("time.sleep(0.3)", "while not early.reason: time.sleep(0.05)"),
    )
    assert rank.stdout.readline() == "started 0\n"
    rank.send_signal(signal.SIGTERM)
    output, errors = rank.communicate(timeout=200)
    assert (rank.returncode, output) == (0, "SIGTERM\n"), errors


BUSY = """
import hashlib, os, signal, threading, time
from promoe_ds.launch.shutdown import EarlySignals
early = EarlySignals()
early.chain = (os.getppid(), 1 << 30)
def watch():
    lost = early.lost_launcher()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    print(bool(lost), early.reason, early.lost_launcher())
thread = threading.Thread(target=watch)
thread.start()
while thread.is_alive():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000_000)
print(early.reason)
"""


def test_ctrl_c_while_the_main_thread_computes_keeps_a_rank_whose_deepspeed_ends() -> None:
    """It takes signals between steps: the watchdog would find an orphan before."""
    output, errors = _start(sys.executable, "-c", BUSY).communicate(timeout=200)
    assert output == "True  \nSIGINT\n", errors


def test_later_interrupt_means_at_once_and_other_signals_do_not(monkeypatch) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    clock = iter([0.0, 0.0, 0.1, 0.2, 2.0, 3.0])
    try:
        shutdown = ShutdownRequest(terminal=True)
        monkeypatch.setattr(shutdowns, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        for number, at_once in zip(numbers, (False, False, False, True, True), strict=True):
            os.kill(os.getpid(), number)
            assert (shutdown.reason, shutdown.at_once) == ("SIGTERM", at_once)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        ShutdownRequest(terminal=True)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
