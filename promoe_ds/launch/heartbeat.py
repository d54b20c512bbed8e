"""What the launcher and its ranks tell each other, through the run directory that all hosts share.

The launcher renews a lease; ranks that see no new one for too long end themselves, so that nobody trains unwatched. The lease
also carries the wish to stop. DistributedContext leave notes: that they started, and how they ended.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from promoe_ds.files import write_json

#: Names the folder of the attempt, in the environment of every rank that `promoe_ds.cli.launch` starts.
ATTEMPT_VARIABLE = "PROMOE_LAUNCH_DIR"
#: Names the folder of notes where nobody renews a lease, as under Slurm.
NOTES_VARIABLE = "PROMOE_NOTES_DIR"
#: Folder of the launcher's files inside a run directory.
LAUNCH_FOLDER = "launch"
#: Folder of the stack dumps there. Both may be there before the run is.
DUMP_FOLDER = "supervision"
#: Name of a finished checkpoint's folder; one that is being written, or was set aside, has more to its name.
CHECKPOINT_NAME = re.compile(r"^step_(\d+)$")
_LEASE = "lease.json"


@dataclass(frozen=True, kw_only=True)
class Note:
    """How a rank stands: `code` None while it runs, else its exit code."""

    rank: int
    host: str
    pid: int
    code: int | None
    message: str
    time: float


def make_launch_folder(run_dir: Path) -> Path:
    """Make a run directory and the launcher's folder inside it, both for the user alone.

    Raises: OSError.
    """
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = run_dir / LAUNCH_FOLDER
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def attempt_folder() -> Path | None:
    """Return the folder of the attempt that this process belongs to, None outside `promoe_ds.cli.launch`."""
    value = os.environ.get(ATTEMPT_VARIABLE)
    return Path(value) if value else None


def renew_lease(folder: Path, count: int, stop: str = "") -> None:
    """Write the lease: a number that grows, and why the job shall stop, if it shall."""
    write_json(folder / _LEASE, {"count": count, "stop": stop})


def read_lease(folder: Path) -> tuple[int, str] | None:
    """Return the lease's number and its wish to stop; None while there is none or it cannot be read."""
    try:
        values = json.loads((folder / _LEASE).read_text(encoding="utf-8"))
        return int(values["count"]), str(values["stop"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def leave_note(rank: int, code: int | None, message: str) -> None:
    """Say how this rank stands; where nobody gave it a folder for that, or the folder is out of reach, nobody is told."""
    folder = attempt_folder() or (Path(os.environ[NOTES_VARIABLE]) if os.environ.get(NOTES_VARIABLE) else None)
    if folder is None:
        return
    note = Note(rank=rank, host=socket.gethostname(), pid=os.getpid(), code=code, message=message, time=time.time())
    try:
        write_json(folder / f"rank_{rank:05d}.json", asdict(note))
    except OSError:
        return  # the launcher will say that the rank left none


def read_notes(folder: Path) -> list[Note]:
    """Return the notes of all ranks, by rank."""
    notes = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            notes.append(Note(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # half a note says nothing
    return notes
