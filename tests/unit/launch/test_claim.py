"""One launcher a run directory, on one host and on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from promoe_ds.launch.claim import TakenError, claimed


def _left_by_another_host(folder, **changes) -> None:
    holder = {"token": "t", "host": "elsewhere", "space": "pid:[1]", "pid": 1, "count": 0} | changes
    (folder / "launcher.json").write_text(json.dumps(holder))


def test_claim_is_given_back(tmp_path) -> None:
    for _ in range(2):
        with claimed(tmp_path, 60) as left_behind:
            assert not left_behind
    assert list(tmp_path.iterdir()) == []


def test_claim_of_a_running_launcher_is_refused_with_its_process(tmp_path) -> None:
    code = "import sys, time; from pathlib import Path; from promoe_ds.launch.claim import claimed\n" \
           "with claimed(Path(sys.argv[1]), 60): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "promoe_ds.cli.launch"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TakenError, match=f"process {other.pid} on {socket.gethostname()} launches it already"), \
                claimed(tmp_path, 60):
            pass
    finally:
        other.kill()
        other.wait()
    with claimed(tmp_path, 60) as left_behind:  # at once: nobody has to wait for a process that is seen to be gone
        assert left_behind
    assert list(tmp_path.iterdir()) == []


def test_claim_renewed_from_another_host_is_refused_and_an_old_one_taken(tmp_path) -> None:
    _left_by_another_host(tmp_path)
    renewal = threading.Timer(0.2, _left_by_another_host, [tmp_path], {"count": 1})
    renewal.start()
    with pytest.raises(TakenError, match="process 1 on elsewhere launches it already"), claimed(tmp_path, 5):
        pass
    renewal.join()
    with claimed(tmp_path, 0.4) as left_behind:
        assert left_behind
        assert json.loads((tmp_path / "launcher.json").read_text())["pid"] == os.getpid()


def test_claim_is_renewed_while_held(tmp_path) -> None:
    count, deadline = 0, time.monotonic() + 5
    with claimed(tmp_path, 0.1):
        while count <= 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            count = json.loads((tmp_path / "launcher.json").read_text())["count"]
    assert count > 2, "the file should have been written anew every 0.01 s"
