"""Memory and traffic of real ranks: against the plan, and against plain data parallelism."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from promoe_ds.analysis.benchmarks.timing import machine_description
from promoe_ds.analysis.plan.measured import RankMeasurement, compare_with_measurement, measure_ranks
from promoe_ds.config import load_config
from promoe_ds.errors import ConfigError

#: ZeRO 2 with buckets small enough to matter less than what they carry.
ZERO_2: dict[str, Any] = {"stage": 2, "contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": 2_000_000}
_MEGA = 1e6


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark:
    """Bytes of the rank that needs most, planned and measured, and of the exchange of a step; `plain`: everything everywhere."""

    suite: str = "memory"
    settings: dict[str, object]
    planned: dict[str, int | str]
    planned_bytes: int
    measured_bytes: int
    plain_bytes: int
    planned_exchange_bytes: float
    measured_exchange_bytes: int
    ranks: list[dict[str, int]]
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return the result for a reader."""
        kinds = ", ".join(f"{kind} {value / _MEGA:,.0f}" for kind, value in self.planned.items() if kind != "phase" and value)
        return [
            f"memory: {self.settings}", f"{self.machine}",
            f"planned   {self.planned_bytes / _MEGA:10,.1f} MB a rank ({kinds}; fullest: {self.planned['phase']})",
            f"measured  {self.measured_bytes / _MEGA:10,.1f} MB, {self.measured_bytes / self.planned_bytes:.3f} of the plan",
            f"plain     {self.plain_bytes / _MEGA:10,.1f} MB (data parallel, full copy as moving average): measured is "
            f"{self.measured_bytes / self.plain_bytes:.3f} of it",
            f"exchange  {self.measured_exchange_bytes:,} bytes sent in a step, planned for the rows routed "
            f"{self.planned_exchange_bytes:,.0f}",
        ]


def benchmark_memory(*, recipe: str, ranks: int, images: int = 4) -> MemoryBenchmark:
    """Train a recipe on `ranks` processes with as large an `ep_size`, and as plain data parallelism, in fp32.

    Args:
        images: of a step over all ranks.
    """
    if ranks < 1 or images % ranks:
        raise ConfigError(f"--ranks {ranks}: must divide the {images} images of a step")
    common = ["data.dataset=synthetic", f"data.synthetic_samples={4 * images}", f"train.global_batch_size={images}"]
    sharded = load_config(recipe, [*common, f"parallel.ep_size={ranks}"])
    comparison = compare_with_measurement(sharded, ZERO_2, ranks)
    plain = measure_ranks(load_config(recipe, common), ranks, zero=None)
    return MemoryBenchmark(
        settings={"recipe": recipe, "ranks": ranks, "ep_size": ranks, "images": images, "zero": ZERO_2, "precision": "fp32"},
        planned=asdict(comparison.plan.memory), planned_bytes=comparison.plan.memory.total,
        measured_bytes=_most(comparison.ranks), plain_bytes=_most(plain),
        planned_exchange_bytes=comparison.planned_exchange_bytes, measured_exchange_bytes=comparison.measured_exchange_bytes,
        ranks=[asdict(rank) for rank in comparison.ranks])


def _most(ranks: list[RankMeasurement]) -> int:
    return max(rank.used_bytes for rank in ranks)
