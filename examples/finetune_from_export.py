"""Fine-tune an export: the weights of a model that was trained before, in a run of its own.

    python examples/finetune_from_export.py exports/digits runs/finetuned

`resume` takes a run, a checkpoint or a published .pth as well; the same on many GPUs is
`--resume exports/digits --run-dir runs/finetuned` of promoe-train.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import promoe_ds

#: A low rate, no warm-up, and the attention left as it is; what is left out is the recipe's.
SETTINGS = {
    "parallel.ep_size": 1,
    "optimizer.lr": 1e-4,
    "optimizer.warmup_steps": 0,
    "train.freeze": ["blocks.*.attention.*"],
    "train.max_steps": 100,
}


def finetune(export: Path, run_dir: Path, overrides: Mapping[str, Any] = SETTINGS) -> Path:
    """Train from an export's weights; the architecture of the recipe must be the export's."""
    return promoe_ds.train("digits_promoe", overrides, run_dir=run_dir, resume=str(export))


if __name__ == "__main__":
    finetune(Path(sys.argv[1]), Path(sys.argv[2]))
