"""The run directory's lock: two launchers, or two trainings, would write into it together.

The holder keeps a file there and renews it. Nobody asks the file system for a lock, which many shared
ones only pretend to have.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from promoe_ds.errors import LaunchError
from promoe_ds.logs import get_logger
from promoe_ds.run_files import LAUNCHER_LOCK

_LOG = get_logger("lock")
_RENEWALS = 10
_POLL_SECONDS = 0.5


class LockedError(LaunchError):
    """Another process holds the run directory."""


@contextmanager
def locked(path: Path, period: float, *, patience: float = 0.0,
           on_loss: Callable[[LockedError], None] = lambda error: None) -> Iterator[bool]:
    """Hold a lock file; what it gives is whether a process that is gone had left it.

    Args:
        period: seconds without a renewal after which a process on another host counts as gone.
        patience: seconds to wait for a living holder's end.
        on_loss: called from a thread if another process took the lock of this one, which was frozen.
    Raises: LockedError if another process holds it; OSError.
    """
    token, before = secrets.token_hex(8), wait_until_free(path, period, patience)
    if before is not None:
        _set_aside(path, before)
    _write_new(path, _holder(token, 0))
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, token, period / _RENEWALS, ended, on_loss), name="lock", daemon=True)
    renewer.start()
    try:
        yield before is not None
    finally:
        ended.set()
        renewer.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def wait_until_free(path: Path, period: float, patience: float = 0.0) -> dict | None:
    """Wait until no living process holds a lock; on another host it takes up to a period to see that one is gone.

    Returns: what a process that is gone has left there, None where there is no file.
    Raises: LockedError if the holder lives on.
    """
    holder, began = _read(path), time.monotonic()
    seen, lives = began - _age(path), False
    if path.exists() and not _is_visible(holder) and began - seen < period:
        _LOG.info("%s: waiting up to %.0f s to see whether process %s on %s is alive", path, seen + period - began,
                  holder.get("pid", "?"), holder.get("host", "another host"))
    while path.exists():
        if _is_visible(holder):
            lives = _runs(holder)
            gone = not lives
        else:
            gone = time.monotonic() - seen >= period
        if gone:
            return holder
        if lives and time.monotonic() - began >= patience:
            raise _taken(path, holder)
        time.sleep(min(_POLL_SECONDS, period / _RENEWALS))
        if (now := _read(path)) not in (holder, {}):
            holder, seen, lives = now, time.monotonic(), True
    return None


def _set_aside(path: Path, before: dict) -> None:
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if (found := _read(aside)) != before:  # another process was quicker
            aside.rename(path)
            raise _taken(path, found)
        aside.unlink()
        _LOG.warning("%s: taken over from process %s on %s, which is gone", path, before.get("pid", "?"),
                     before.get("host", "another host"))


def _write_new(path: Path, values: dict) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(values))
    except FileExistsError:
        raise _taken(path, _read(path)) from None


def _renew(path: Path, token: str, seconds: float, ended: threading.Event, on_loss: Callable[[LockedError], None]) -> None:
    count, temporary = 0, path.with_name(f"{path.name}.{token}")
    while not ended.wait(seconds):
        count += 1
        with suppress(OSError):  # the next renewal may succeed
            if (found := _read(path)).get("token") == token:
                temporary.write_text(json.dumps(_holder(token, count)), encoding="utf-8")
                temporary.replace(path)
            elif found:
                return on_loss(_taken(path, found))


def _holder(token: str, count: int) -> dict:
    return {"token": token, "host": socket.gethostname(), "space": _process_space(), "pid": os.getpid(),
            "started": _started(os.getpid()), "count": count}


def _process_space() -> str:
    """Return what process ids are good for: containers of one host may share its name and not see each other."""
    return str(Path("/proc/self/ns/pid").readlink())


def _taken(path: Path, holder: dict) -> LockedError:
    folder = path.parent.parent if path.name == LAUNCHER_LOCK else path.parent
    return LockedError(f"--run-dir {folder}: process {holder.get('pid', '?')} on {holder.get('host', 'another host')} "
                       f"works in it already: wait for its end, stop it (SIGTERM), or take another directory ({path} says so)")


def _is_visible(holder: dict) -> bool:
    return [holder.get("host"), holder.get("space")] == [socket.gethostname(), _process_space()]


def _runs(holder: dict) -> bool:
    return holder.get("started") == _started(holder.get("pid")) != ""


def _started(pid: object) -> str:
    """Return when a process was started, which no other process of that number shares; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _age(path: Path) -> float:
    """Return how long ago a file was written, by the clock of its file system; 0 where that cannot be known."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with path.open("rb") as file:  # opened: NFS then asks its server
            written = os.fstat(file.fileno()).st_mtime
        probe.touch()
        return max(0.0, probe.stat().st_mtime - written)
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
