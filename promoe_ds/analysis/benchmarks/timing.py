"""Timings of the package's parts: contenders interleaved in one run, medians and spread, paired ratios.

Interleaving lets a machine's drift hit all contenders alike; the ratio to the baseline is taken round by round.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contender: wall clock, and processor time over all threads; ratios are to the baseline."""

    wall_ms: float
    wall_ms_low: float
    wall_ms_high: float
    cpu_ms: float
    wall_ratio: float
    cpu_ratio: float


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One suite's timings by contender, why others are missing, and what they were measured on."""

    suite: str
    baseline: str
    rounds: int
    timings: dict[str, Timing]
    settings: dict[str, object]
    not_available: dict[str, str] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=lambda: machine_description())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system and having new pages cleared; elsewhere nothing."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def machine_description() -> dict[str, object]:
    """Return processor, threads, device and versions."""
    versions = {package: metadata.version(package) for package in ("deepspeed", "megatron-core", "transformer-engine")
                if find_spec(package.replace("-core", "").replace("-", "_"))}
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), **versions,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def _processor() -> str:
    """Return the processor's name, from Linux's table where there is one."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def interleave(contenders: dict[str, Callable[[], None]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run every contender once a round; the first one is the baseline.

    The order turns from round to round, so that nobody always runs after the same neighbour.
    """
    names = list(contenders)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        for name in names[round_ % len(names):] + names[:round_ % len(names)]:
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            contenders[name]()
            _synchronise()
            if round_ >= warmup:
                wall[name].append(1e3 * (time.perf_counter() - wall_start))
                cpu[name].append(1e3 * (time.process_time() - cpu_start))
    return {name: Timing(
        wall_ms=statistics.median(wall[name]), wall_ms_low=min(wall[name]), wall_ms_high=max(wall[name]),
        cpu_ms=statistics.median(cpu[name]), wall_ratio=_paired(wall[name], wall[names[0]]),
        cpu_ratio=_paired(cpu[name], cpu[names[0]])) for name in names}


def _paired(values: list[float], baseline: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, baseline, strict=True))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
