"""Run on a host by ssh after a job: waits for its ranks to be gone, then kills those that are not.

A rank is known by the launch folder in its environment, which no other job shares.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from promoe_ds.launch.heartbeat import ATTEMPT_VARIABLE


def processes_with(variable: str, value: str) -> list[int]:
    """Return the processes of this user that were started with a variable of that value, this one left out."""
    wanted, found = f"{variable}={value}".encode(), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            with suppress(OSError):  # gone meanwhile, or another user's
                if wanted in (path / "environ").read_bytes().split(b"\0") and path.stat().st_uid == os.getuid():
                    found.append(int(path.name))
    return found


def sweep(folder: str, patience: float) -> list[int]:
    """Wait up to `patience` seconds for an attempt's processes to end; kill and return what is left then."""
    deadline = time.monotonic() + patience
    while (left := processes_with(ATTEMPT_VARIABLE, folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def main() -> None:
    """Answer the request on standard input: {"folder": ..., "patience": seconds}."""
    request = json.load(sys.stdin)
    sys.stdout.write(json.dumps({"killed": sweep(request["folder"], request["patience"])}) + "\n")


if __name__ == "__main__":
    main()
