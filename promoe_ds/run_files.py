"""What a run directory holds, by name."""

from __future__ import annotations

import re
from pathlib import Path

#: Name of a complete checkpoint's folder; one that is being written, or was set aside, has more to
#: its name.
CHECKPOINT_NAME = re.compile(r"^step_(\d+)$")
CHECKPOINTS = "checkpoints"
#: Folder of the launcher's files, and of the stacks of ranks that hung. Both may be there before
#: the run is.
LAUNCH_FOLDER, STACKS_FOLDER = "launch", "supervision"
#: Lock of a launcher, inside its folder; lock of a training, in the run directory itself.
LAUNCHER_LOCK, TRAINING_LOCK = "launcher.json", "lock.json"


def make_folder(run_dir: Path, name: str) -> Path:
    """Make a run directory and a folder in it, both for the user alone; return the folder.

    Raises: OSError.
    """
    folder = run_dir / name
    for each in (run_dir, folder):
        each.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
