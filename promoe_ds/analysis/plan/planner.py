"""The plan of one layout: parameters, memory, work, traffic, time; as values, as JSON, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from promoe_ds.analysis.plan.cluster import Cluster, Layout
from promoe_ds.analysis.plan.shapes import PassShapes, trace_pass
from promoe_ds.analysis.plan.speed import Efficiency, StepTime, step_time
from promoe_ds.analysis.plan.traffic import Link, step_traffic
from promoe_ds.config import RunConfig, count_parameters, training_flops_per_image
from promoe_ds.config.accounting import ParameterCount

#: Share of a device's memory that the allocator, the CUDA context and nccl are left with.
RESERVE = 0.08


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its fullest moment, by kind; `phase` says when that is. `host` lies in the host's memory."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    exchange: int
    buckets: int
    phase: str
    host: int = 0

    @property
    def total(self) -> int:
        """All kinds on the device."""
        return sum(value for value in asdict(self).values() if isinstance(value, int)) - self.host


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one optimizer step of a layout needs and how long it may take."""

    config: RunConfig
    layout: Layout
    cluster: Cluster
    parameters: ParameterCount
    parameters_per_rank: int
    memory: Memory
    flops: int
    traffic: dict[str, Link]
    time: StepTime
    efficiency: Efficiency

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, some of it kept back."""
        return self.memory.total <= (1 - RESERVE) * self.cluster.device.memory

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: useful operations (attention, active experts) over what the devices could do."""
        peak = self.cluster.device.flops[self.layout.precision] * self.layout.world_size
        return self.flops / (peak * self.time.total)

    @property
    def images_per_second(self) -> float:
        """Images of a step over its predicted time."""
        return self.layout.world_size * self.layout.micro_batch * self.layout.accumulation / self.time.total

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        parallel, count, memory = self.config.parallel, self.parameters, self.memory
        return {
            "recipe": self.config.name,
            "layout": {**asdict(self.layout), "ep_size": parallel.ep_size, "dispatch": parallel.resolved_dispatch,
                       "activation_checkpointing": parallel.activation_checkpointing},
            "cluster": asdict(self.cluster),
            "parameters": {"total": count.total, "activated": count.activated, "per_rank": self.parameters_per_rank},
            "memory_bytes": {**asdict(memory), "total": memory.total, "device": int(self.cluster.device.memory),
                             "fits": self.fits},
            "flops_per_step": self.flops,
            "bytes_sent_per_rank_and_step": {name: asdict(link) for name, link in self.traffic.items()},
            "predicted": {"seconds": {**asdict(self.time), "total": self.time.total}, "mfu": self.mfu,
                          "images_per_second": self.images_per_second, "assumed_efficiency": asdict(self.efficiency)},
        }


def plan_step(config: RunConfig, layout: Layout, cluster: Cluster, *, efficiency: Efficiency | None = None,
              expert_group: dist.ProcessGroup | None = None) -> StepPlan:
    """Plan one layout; call inside `fake_world(layout.world_size)`.

    Raises: ConfigError for a config that shapes alone cannot follow.
    """
    efficiency = efficiency or Efficiency()
    shapes = trace_pass(config, layout, expert_group)
    traffic = step_traffic(config, layout, cluster, shapes)
    images = layout.world_size * layout.micro_batch * layout.accumulation
    return StepPlan(config=config, layout=layout, cluster=cluster, parameters=count_parameters(config),
                    parameters_per_rank=shapes.parameters, memory=_memory(shapes, layout),
                    flops=images * training_flops_per_image(config), traffic=traffic, efficiency=efficiency,
                    time=step_time(config, layout, cluster, shapes, traffic, efficiency))


def _memory(shapes: PassShapes, layout: Layout) -> Memory:
    """Take the fuller of the two moments: deep in the backward pass, or at the update.

    Later passes of an accumulation, and the update, find the gradients of earlier ones; the traced pass holds its own.
    """
    states, peak = shapes.states, shapes.peak
    kept = {"weights": states.weights, "optimizer": states.optimizer, "ema": states.ema, "host": states.host}
    gradients = peak.get("gradients", 0)
    if layout.accumulation > 1:
        gradients = max(gradients, states.gradients)
    backward = Memory(**kept, gradients=gradients, activations=peak.get("activations", 0), exchange=peak.get("exchange", 0),
                      buckets=peak.get("buckets", 0), phase="backward")
    update = Memory(**kept, gradients=states.gradients + states.update, activations=0, exchange=0, buckets=0, phase="update")
    return max(backward, update, key=lambda memory: memory.total)
