"""Which software wrote a checkpoint."""

from __future__ import annotations

import platform
from importlib.metadata import version

import deepspeed
import torch


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint's reader may want to know."""
    return {"promoe_ds": version("promoe_ds"), "torch": torch.__version__, "deepspeed": deepspeed.__version__,
            "python": platform.python_version()}
