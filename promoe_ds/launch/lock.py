"""The run directory's lock: two launchers, or two trainings, would write into it together.

The holder keeps a file there and renews it. File systems' own locks are not used: many shared ones
only pretend to have them.
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
from tempfile import NamedTemporaryFile

import psutil

from promoe_ds.errors import LaunchError
from promoe_ds.logs import get_logger
from promoe_ds.run_files import LAUNCHER_LOCK

_LOG = get_logger("lock")
_RENEWALS = 10
_POLL_SECONDS = 0.5


class LockedError(LaunchError):
    """Another process holds the run directory."""


@contextmanager
def locked(
    path: Path,
    period: float,
    *,
    patience: float = 0.0,
    on_loss: Callable[[LockedError], None] = lambda error: None,
) -> Iterator[bool]:
    """Hold a lock file; yield whether a process that is gone had left it.

    Args:
        period: seconds without a renewal after which a holder on another host is considered gone.
        patience: seconds to wait for the end of a holder that runs.
        on_loss: called from a thread if another process took the lock, because this one was frozen.
    Raises: LockedError if another process holds it; OSError.
    """
    token, before = secrets.token_hex(8), wait_until_free(path, period, patience)
    if before is not None:
        _set_aside(path, before)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(_holder(token, 0)))
    except FileExistsError:
        raise _taken(path, _read(path)) from None
    ended = threading.Event()
    renewer = threading.Thread(
        target=_renew,
        args=(path, token, period / _RENEWALS, ended, on_loss),
        name="lock",
        daemon=True,
    )
    renewer.start()
    try:
        yield before is not None
    finally:
        ended.set()
        renewer.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def wait_until_free(path: Path, period: float, patience: float = 0.0) -> dict | None:
    """Wait until no running process holds a lock; for one on another host that takes a period.

    Returns: the content that a process which is gone left there, None where there is no file.
    Raises: LockedError if the holder still runs.
    """
    holder, began = _read(path), time.monotonic()
    seen, renewed = began - _age(path), False
    if path.exists() and _runs(holder) is None and (left := seen + period - began) > 0:
        _LOG.info("%s: waiting up to %.0f s to see whether %s runs", path, left, _name(holder))
    while path.exists():
        runs = _runs(holder)
        if runs is False or (runs is None and time.monotonic() - seen >= period):
            return holder
        if (runs or renewed) and time.monotonic() - began >= patience:
            raise _taken(path, holder)
        time.sleep(min(_POLL_SECONDS, period / _RENEWALS))
        if (now := _read(path)) not in (holder, {}):
            holder, seen, renewed = now, time.monotonic(), True
    return None


def _set_aside(path: Path, before: dict) -> None:
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if (found := _read(aside)) != before:  # another process was quicker
            aside.rename(path)
            raise _taken(path, found)
        aside.unlink()
        _LOG.warning("%s: taken over from %s, which is gone", path, _name(before))


def _renew(
    path: Path,
    token: str,
    seconds: float,
    ended: threading.Event,
    on_loss: Callable[[LockedError], None],
) -> None:
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
    process = {"pid": os.getpid(), "started": _started(os.getpid())}
    return {"token": token, **_place(), **process, "count": count}


def _place() -> dict[str, str]:
    """Return where process ids are valid: machines and containers may share a name, no processes.

    On all machines the name spaces that are not a container's have the same number.
    """
    space = str(Path("/proc/self/ns/pid").readlink())
    return {"host": socket.gethostname(), "booted": f"{psutil.boot_time():.0f}", "space": space}


def _name(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"


def _taken(path: Path, holder: dict) -> LockedError:
    folder = path.parent.parent if path.name == LAUNCHER_LOCK else path.parent
    return LockedError(
        f"--run-dir {folder}: {_name(holder)} uses it already (see {path}): wait for its end, stop "
        "it (SIGTERM), or use another directory"
    )


def _runs(holder: dict) -> bool | None:
    """Return whether a holder on this host runs; None for one that cannot be seen from here."""
    if {name: holder.get(name) for name in _place()} != _place():
        return None
    return holder.get("started") == _started(holder.get("pid")) != ""


def _started(pid: object) -> str:
    """Return when a process started, which differs for a later one of that id; "" if it is gone."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _age(path: Path) -> float:
    """Return a file's age in seconds by the clock of its file system; 0 where it is unknown."""
    try:
        # The file is opened: NFS then asks its server.
        with (
            path.open("rb") as file,
            NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.") as probe,
        ):
            return max(0.0, os.fstat(probe.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime)
    except OSError:
        return 0.0


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
