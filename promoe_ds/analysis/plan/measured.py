"""A plan held against real ranks on this machine: bytes of the exchange, and resident memory at its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from promoe_ds.analysis.plan.cluster import Cluster, fake_world, layout_of
from promoe_ds.analysis.plan.planner import StepPlan, plan_step
from promoe_ds.analysis.plan.shapes import trace_pass
from promoe_ds.config import RunConfig, plan_batches, resolve_deepspeed
from promoe_ds.config.devices import find_device
from promoe_ds.errors import TrainingError

#: glibc gives every block of this size or more back to the system when it is freed, so that resident means live.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}
_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank saw: resident bytes before the model, at the peak of later steps; rows and bytes sent to other ranks."""

    baseline_bytes: int
    peak_bytes: int
    rows_leaving: int
    exchange_bytes: int

    @property
    def used_bytes(self) -> int:
        """What training added: interpreter, libraries, process group and data set are the baseline."""
        return self.peak_bytes - self.baseline_bytes


@dataclass(frozen=True)
class Comparison:
    """A plan beside the ranks measured."""

    plan: StepPlan
    ranks: list[RankMeasurement]
    bytes_per_row: float

    @property
    def memory_ratio(self) -> float:
        """Largest measured rank over the plan."""
        return max(rank.used_bytes for rank in self.ranks) / self.plan.memory.total

    @property
    def planned_exchange_bytes(self) -> float:
        """What the plan says of the rows that were really routed away, all ranks together."""
        return self.bytes_per_row * sum(rank.rows_leaving for rank in self.ranks)

    @property
    def measured_exchange_bytes(self) -> int:
        """What the ranks really sent."""
        return sum(rank.exchange_bytes for rank in self.ranks)


def compare_with_measurement(config: RunConfig, zero: dict[str, Any], world_size: int) -> Comparison:
    """Plan a config, train a few steps of it on `world_size` processes, and return both.

    Args:
        zero: the `zero_optimization` section of the DeepSpeed JSON; numbers are fp32.
    """
    batches = plan_batches(config, world_size)
    deepspeed = resolve_deepspeed({"zero_optimization": zero}, config, batches, source="measurement")
    layout = layout_of(batches, deepspeed, touched_only=True)
    here = Cluster(nodes=1, gpus_per_node=world_size, device=find_device("h100"), network_bandwidth=1.0)
    with fake_world(world_size):
        plan, shapes = plan_step(config, layout, here), trace_pass(config, layout)
    return Comparison(plan, measure_ranks(config, world_size, zero=zero),
                      shapes.exchange_bytes / max(1, shapes.rows_leaving))


def measure_ranks(config: RunConfig, world_size: int, *, zero: dict[str, Any] | None) -> list[RankMeasurement]:
    """Train on real processes; zero=None: plain data parallelism of torch, AdamW and a full copy as moving average.

    Raises: TrainingError with the processes' last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"config": config.model_dump(mode="json"), "zero": zero, "folder": folder}), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", "-m",
                   "promoe_ds.analysis.plan.measure_worker", str(job)]
        environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        if done.returncode:
            raise TrainingError(f"measuring {config.name} on {world_size} processes failed:\n{done.stderr[-2000:]}")
        return [RankMeasurement(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(world_size)]


def write_measurement(path: Path, measurement: RankMeasurement) -> None:
    """Leave a rank's measurement for the process that asked."""
    path.write_text(json.dumps(asdict(measurement)), encoding="utf-8")
