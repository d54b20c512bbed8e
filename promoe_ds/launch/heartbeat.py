"""What the launcher and its ranks report to each other, through the shared run directory.

The launcher renews a heartbeat; ranks that see no new one for too long end themselves, so that no
rank trains unwatched. The heartbeat also carries a shutdown request. Each rank writes its status:
that it started, and how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.files import write_json
from promoe_ds.logs import rank_from_environment

#: Names the attempt's folder, in the environment of every rank that `promoe_ds.cli.launch` starts.
ATTEMPT_VARIABLE = "PROMOE_LAUNCH_DIR"
#: Names the folder of rank statuses where no launcher renews a heartbeat, as under Slurm.
STATUS_VARIABLE = "PROMOE_STATUS_DIR"
_HEARTBEAT = "heartbeat.json"


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What a rank reports: `code` is None while it runs, else its exit code; `time` is that of its
    last sign of life.
    """

    rank: int
    host: str
    pid: int
    code: int | None
    message: str
    time: float


def attempt_folder() -> Path | None:
    """Return the folder of this process's attempt, None outside `promoe_ds.cli.launch`."""
    return _folder(ATTEMPT_VARIABLE)


def renew_heartbeat(folder: Path, count: int, shutdown: str = "") -> None:
    """Write the heartbeat: a number that grows, and why the job must stop, if it must."""
    write_json(folder / _HEARTBEAT, {"count": count, "shutdown": shutdown})


def read_heartbeat(folder: Path) -> tuple[int, str] | None:
    """Return the heartbeat's number and its shutdown request; None if it is missing or damaged."""
    try:
        values = json.loads((folder / _HEARTBEAT).read_text(encoding="utf-8"))
        return int(values["count"]), str(values["shutdown"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def this_rank() -> str:
    """Return which rank this process is, and where: `rank 3 on gpu02`."""
    return f"rank {rank_from_environment()} on {socket.gethostname()}"


def write_rank_status(code: int | None, message: str) -> None:
    """Write this rank's status; nothing where no folder was given or it cannot be written."""
    folder, rank = attempt_folder() or _folder(STATUS_VARIABLE), rank_from_environment()
    if folder is None:
        return
    status = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "code": code,
        "message": message,
        "time": time.time(),
    }
    with suppress(OSError):  # the launcher will report that the rank wrote none
        write_json(folder / f"rank_{rank:05d}.json", status)


def read_rank_statuses(folder: Path) -> list[RankStatus]:
    """Return the statuses of all ranks, by rank; a damaged one is left out."""
    statuses = []
    for path in sorted(folder.glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            statuses.append(RankStatus(**json.loads(path.read_text(encoding="utf-8"))))
    return statuses


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
