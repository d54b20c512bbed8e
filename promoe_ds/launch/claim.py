"""One launcher a run directory: two would train and save into it together.

The launcher that holds a run directory keeps a file there and renews it. Nobody asks the file system for a lock, which many
shared ones only pretend to have.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from promoe_ds.errors import LaunchError
from promoe_ds.logs import get_logger

_LOG = get_logger("launch")
_FILE = "launcher.json"
_MODULE = "promoe_ds.cli.launch"
_RENEWALS = 10


class TakenError(LaunchError):
    """Another launcher holds the run directory."""


@contextmanager
def claimed(folder: Path, period: float) -> Iterator[bool]:
    """Hold a launch folder; whether a launcher that is gone had held it is what it gives.

    Args:
        period: seconds without a renewal after which a launcher on another host counts as gone.
    Raises: TakenError if another launcher holds it.
    """
    path, token = folder / _FILE, secrets.token_hex(8)
    before = _read(path)
    if before:
        _require_gone(path, before, period)
        _set_aside(path, before)
    _write_new(path, _holder(token, 0))
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, token, period / _RENEWALS, ended), name="claim", daemon=True)
    renewer.start()
    try:
        yield bool(before)
    finally:
        ended.set()
        renewer.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def _require_gone(path: Path, before: dict, period: float) -> None:
    """Raise unless the launcher that wrote `before` has ended; on another host it takes a period to see that."""
    visible = [before.get("host"), before.get("space")] == [socket.gethostname(), _process_space()]
    alive = visible and _runs(before.get("pid"))
    if not visible:
        _LOG.info("%s: waiting up to %.0f s to see whether the launcher on %s is alive", path, period, before.get("host"))
        deadline = time.monotonic() + period
        while not alive and time.monotonic() < deadline:
            time.sleep(min(0.5, period / _RENEWALS))
            alive = _read(path) not in (before, {})
    if alive:
        raise _taken(path, _read(path) or before)


def _set_aside(path: Path, before: dict) -> None:
    aside = path.with_name(f"{_FILE}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if (found := _read(aside)) != before:  # another launcher was quicker
            aside.rename(path)
            raise _taken(path, found)
        aside.unlink()


def _write_new(path: Path, values: dict) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(values))
    except FileExistsError:
        raise _taken(path, _read(path)) from None


def _renew(path: Path, token: str, seconds: float, ended: threading.Event) -> None:
    count, temporary = 0, path.with_name(f"{_FILE}.{token}")
    while not ended.wait(seconds):
        count += 1
        with suppress(OSError):  # the next renewal may succeed
            if _read(path).get("token") == token:
                temporary.write_text(json.dumps(_holder(token, count)), encoding="utf-8")
                temporary.replace(path)


def _holder(token: str, count: int) -> dict:
    return {"token": token, "host": socket.gethostname(), "space": _process_space(), "pid": os.getpid(), "count": count}


def _process_space() -> str:
    """Return what process ids are good for: containers of one host may share its name and not see each other."""
    return str(Path("/proc/self/ns/pid").readlink())


def _taken(path: Path, holder: dict) -> TakenError:
    return TakenError(f"--run-dir {path.parent.parent}: process {holder.get('pid', '?')} on {holder.get('host', 'another host')} "
                    f"launches it already: wait for its end, stop it (SIGTERM), or take another directory ({path} says so)")


def _runs(pid: object) -> bool:
    try:
        return _MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
