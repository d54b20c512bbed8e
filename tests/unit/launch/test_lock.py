"""One process a run directory, on one host and on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from promoe_ds.launch.lock import LockedError, locked, wait_until_free


def _left_by_another_host(path: Path, **changes: object) -> None:
    path.write_text(
        json.dumps(
            {"token": "t", "host": "elsewhere", "space": "pid:[1]", "pid": 1, "count": 0} | changes
        )
    )


def test_lock_is_given_back(tmp_path) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock", 60) as left_behind:
            assert not left_behind
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_running_process_is_refused_and_of_a_killed_one_taken_at_once(
    tmp_path, caplog
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from promoe_ds.launch.lock import locked\n"
        "with locked(Path(sys.argv[1]), 60): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=f"process {other.pid} on {socket.gethostname()}"),
            locked(path, 60),
        ):
            pass
        with pytest.raises(LockedError):
            wait_until_free(path, 60, patience=0.1)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie holds nothing
        with locked(path, 60) as left_behind:
            assert left_behind and f"process {other.pid}" in caplog.text
    finally:
        other.kill()
        other.wait()
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_process_number_given_again_is_taken_at_once(tmp_path) -> None:
    with locked(tmp_path / "lock", 60):
        values = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(values | {"started": "1"}))
    with locked(tmp_path / "lock", 60) as left_behind:
        assert left_behind


def test_lock_renewed_from_another_host_is_refused_and_an_old_one_taken(tmp_path) -> None:
    path = tmp_path / "lock"
    _left_by_another_host(path)
    renewal = threading.Timer(0.2, _left_by_another_host, [path], {"count": 1})
    renewal.start()
    with pytest.raises(LockedError, match="process 1 on elsewhere"), locked(path, 5):
        pass
    renewal.join()
    with locked(path, 0.4) as left_behind:
        assert left_behind
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_lock_of_another_machine_of_the_same_name_is_not_taken_at_once(tmp_path) -> None:
    with locked(tmp_path / "lock", 60):
        values = json.loads((tmp_path / "lock").read_text())
    machine = {"booted": "1000000000", "started": "1"}
    _left_by_another_host(tmp_path / "lock", **values | machine)
    before = time.monotonic()
    with locked(tmp_path / "lock", 0.5) as left_behind:
        assert left_behind
    assert time.monotonic() - before > 0.4


@pytest.mark.parametrize("content", ['{"token": "t", "host": "elsewhere"}', "", "[1]"])
def test_lock_not_renewed_for_long_or_damaged_is_taken_without_waiting(tmp_path, content) -> None:
    path, before = tmp_path / "lock", time.monotonic()
    path.write_text(content)
    os.utime(path, (time.time() - 100,) * 2)
    with locked(path, 60) as left_behind:
        assert left_behind
    assert time.monotonic() - before < 10 and list(tmp_path.iterdir()) == []


def test_lock_is_renewed_while_held_and_its_loss_is_reported(tmp_path) -> None:
    path, lost, count, deadline = tmp_path / "lock", [], 0, time.monotonic() + 5
    with locked(path, 0.1, on_loss=lost.append):
        while count <= 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            count = json.loads(path.read_text())["count"]
        assert count > 2 and not lost, "the file should have been written anew every 0.01 s"
        while not lost and time.monotonic() < deadline:
            _left_by_another_host(path)
            time.sleep(0.05)
    assert isinstance(lost[0], LockedError) and json.loads(path.read_text())["host"] == "elsewhere"
