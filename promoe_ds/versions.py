"""Which software wrote a checkpoint, latents or figures."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint's reader may want to know."""
    return {"promoe_ds": version("promoe_ds"), "torch": torch.__version__, "deepspeed": version("deepspeed"),
            "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """Return what computes: `cpu`, or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, of this one, torch and Python; none is imported."""
    found = {"promoe_ds": version("promoe_ds"), "torch": torch.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
