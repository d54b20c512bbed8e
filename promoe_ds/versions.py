"""Which software wrote a checkpoint, latents or figures, and on what it ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from promoe_ds import __version__
from promoe_ds.config.loader import release_of
from promoe_ds.errors import ConfigError

#: The first version of DeepSpeed that skips steps whose norm is infinite under ZeRO, and the first
# that is untested.
DEEPSPEED_RANGE = ("0.19.8", "0.20")


def check_deepspeed() -> None:
    """Check the installed DeepSpeed before it is imported; name the CPU to it where there is no
    GPU.

    DeepSpeed would find the CPU itself, and warn.
    Raises: ConfigError if there is none, or another than this package works with.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    least, below = DEEPSPEED_RANGE
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "no version"
    if not release_of(least) <= release_of(found) < release_of(below):
        raise ConfigError(
            f"{found} of deepspeed is installed, training needs at least {least} (earlier ones step"
            f" on infinite gradients under ZeRO) and less than {below}: pip install"
            f" 'deepspeed>={least},<{below}'"
        )


def device_name(device: torch.device) -> str:
    """Return what computes: `cpu`, or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor_name() -> str:
    """Return the model of this machine's processor."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, of this one, torch and Python; none
    is imported.
    """
    found = {
        "promoe_ds": __version__,
        "torch": str(torch.__version__),  # a string of its own kind
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
