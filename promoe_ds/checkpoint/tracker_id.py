"""Under which id a run is known at Weights & Biases: kept in the run directory and in checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

WANDB_ID = "wandb_run_id"


def read_wandb_id(run_dir: Path) -> str:
    """Return the id of a run at Weights & Biases, "" before it has one."""
    try:
        text = (run_dir / WANDB_ID).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else ""
