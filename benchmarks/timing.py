"""Timing of candidates: interleaved in one run, medians and spread, paired ratios.

Interleaving lets a machine's drift affect all candidates alike; the ratio to the baseline is taken
round by round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import timer as wall_clock  # waits for the device first

from promoe_ds.versions import device_name, processor_name, versions_of


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one candidate: wall clock, and processor time over all threads; ratios are
    to the baseline.
    """

    wall_ms: float
    wall_ms_low: float
    wall_ms_high: float
    cpu_ms: float
    wall_ratio: float
    cpu_ratio: float


def machine_description() -> dict[str, Any]:
    """Return processor, threads, device and versions."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **versions_of("deepspeed", "megatron-core", "transformer-engine"),
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a suite found: figures by name, as the JSON file holds them, and text for a reader."""

    suite: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    text: list[str]
    machine: dict[str, Any] = field(default_factory=machine_description)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {
            "suite": self.suite,
            "settings": self.settings,
            **self.figures,
            "machine": self.machine,
        }

    def lines(self) -> list[str]:
        """Return the result for a reader."""
        return [f"{self.suite}: {self.settings}", f"{self.machine}", *self.text]


def compare(
    suite: str,
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    settings: dict[str, Any],
    warmup: int = 2,
    missing: dict[str, str] | None = None,
) -> Result:
    """Time candidates by `interleave`; missing: why others cannot be timed here, by name."""
    timings = interleave(candidates, rounds=rounds, warmup=warmup)
    baseline, missing = next(iter(timings)), missing or {}
    return Result(
        suite=suite,
        settings=settings,
        figures={
            "baseline": baseline,
            "rounds": rounds,
            "not_available": missing,
            "timings": {name: asdict(timing) for name, timing in timings.items()},
        },
        text=[
            f"{rounds} rounds, ratios to {baseline}",
            f"{'':30}{'wall ms (low - high)':>26}{'cpu ms':>10}{'wall ratio':>12}{'cpu ratio':>11}",
            *(
                f"{name:30}{f'{t.wall_ms:.1f} ({t.wall_ms_low:.1f} - {t.wall_ms_high:.1f})':>26}"
                f"{t.cpu_ms:>10.1f}{t.wall_ratio:>12.3f}{t.cpu_ratio:>11.3f}"
                for name, t in timings.items()
            ),
            *(f"{name:30}not available: {reason}" for name, reason in missing.items()),
        ],
    )


def interleave(
    candidates: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Run every candidate once a round; the first one is the baseline.

    The order changes from round to round, so that none always runs after the same one.
    """
    names = list(candidates)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = wall_clock(), time.process_time()
            candidates[name]()
            samples[name].append((wall_clock() - began[0], time.process_time() - began[1]))
    baseline = np.array(samples[names[0]][warmup:])
    return {name: _timing(np.array(pairs[warmup:]), baseline) for name, pairs in samples.items()}


def _timing(seconds_R2: np.ndarray, baseline_R2: np.ndarray) -> Timing:
    """Summarise rounds of wall and processor time."""
    walls, cpus = 1e3 * seconds_R2.T
    ratios = np.median(seconds_R2 / baseline_R2, axis=0)
    return Timing(
        wall_ms=float(np.median(walls)),
        wall_ms_low=float(walls.min()),
        wall_ms_high=float(walls.max()),
        cpu_ms=float(np.median(cpus)),
        wall_ratio=float(ratios[0]),
        cpu_ratio=float(ratios[1]),
    )
