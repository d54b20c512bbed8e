"""The plan of one layout: parameters, memory, work, traffic, time; as values, JSON, a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from promoe_ds.config import RunConfig, count_parameters, training_flops_per_image
from promoe_ds.config.accounting import ParameterCount
from promoe_ds.planning.cluster import Cluster, ClusterLayout
from promoe_ds.planning.estimate import (
    Link,
    compute_precision,
    step_kernels,
    step_seconds,
    step_traffic,
)
from promoe_ds.planning.replay import UPDATE
from promoe_ds.planning.shapes import trace_pass
from promoe_ds.planning.work import Efficiency

#: Share of a device's memory that the allocator, the CUDA context and nccl are left with.
RESERVE = 0.08


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one optimizer step of a layout needs and how long it may take.

    memory: bytes of one rank's device at its fullest moment, by kind; phase: which moment that is;
    host: bytes in the host's memory; traffic: what a rank sends, by what it is; seconds: by what
    takes them; kernels: that the device is asked to run.
    """

    config: RunConfig
    layout: ClusterLayout
    cluster: Cluster
    parameters: ParameterCount
    parameters_per_rank: int
    memory: dict[str, int]
    phase: str
    host: int
    flops: int
    traffic: dict[str, Link]
    seconds: dict[str, float]
    kernels: int
    efficiency: Efficiency

    @property
    def total_memory(self) -> int:
        """All kinds on the device."""
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        """The predicted time of a step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, some of it kept back."""
        return self.total_memory <= (1 - RESERVE) * self.cluster.device.memory

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: useful operations over what the devices could do."""
        precision = compute_precision(self.config, self.layout)
        peak = self.cluster.device.flops[precision] * self.layout.world_size
        return self.flops / (peak * self.total_seconds)

    @property
    def images_per_second(self) -> float:
        """Images of a step over its predicted time."""
        return self.layout.images / self.total_seconds

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        parallel, count = self.config.parallel, self.parameters
        return {
            "recipe": self.config.name,
            "layout": {
                **asdict(self.layout),
                "ep_size": parallel.ep_size,
                "dispatch": parallel.resolved_dispatch,
                "activation_checkpointing": parallel.activation_checkpointing,
            },
            "cluster": asdict(self.cluster),
            "parameters": {
                "total": count.total,
                "activated": count.activated,
                "per_rank": self.parameters_per_rank,
            },
            "memory_bytes": {
                **self.memory,
                "phase": self.phase,
                "host": self.host,
                "total": self.total_memory,
                "device": int(self.cluster.device.memory),
                "fits": self.fits,
            },
            "flops_per_step": self.flops,
            "kernels_per_step": self.kernels,
            "bytes_sent_per_rank_and_step": {k: asdict(link) for k, link in self.traffic.items()},
            "predicted": {
                "seconds": {**self.seconds, "total": self.total_seconds},
                "mfu": self.mfu,
                "images_per_second": self.images_per_second,
                "assumed_efficiency": asdict(self.efficiency),
            },
        }


def plan_step(
    config: RunConfig,
    layout: ClusterLayout,
    cluster: Cluster,
    *,
    efficiency: Efficiency | None = None,
) -> StepPlan:
    """Plan one layout; call inside `fake_world(layout.world_size)`.

    Raises: ConfigError for a config that shapes alone cannot follow.
    """
    efficiency = efficiency or Efficiency()
    shapes = trace_pass(config, layout)
    traffic = step_traffic(layout, cluster, shapes)
    # Of the fullest moment: deep in the backward pass, or at the update.
    states, peak = shapes.states, shapes.trace.peak
    on_device = not states.offloaded
    memory = {
        "weights": states.weights,
        "gradients": peak["gradients"],
        "optimizer": states.optimizer * on_device,
        "ema": states.ema * on_device,
        **{kind: peak[kind] for kind in ("activations", "exchange", "buckets")},
    }
    return StepPlan(
        config=config,
        layout=layout,
        cluster=cluster,
        parameters=count_parameters(config),
        parameters_per_rank=shapes.parameters,
        memory=memory,
        phase="update" if shapes.trace.fullest == UPDATE else "backward",
        host=states.host + states.update,
        flops=layout.images * training_flops_per_image(config, config.model.longest_text),
        traffic=traffic,
        seconds=step_seconds(config, layout, cluster, shapes, traffic, efficiency),
        kernels=step_kernels(layout, shapes),
        efficiency=efficiency,
    )


def plan_lines(plan: StepPlan) -> list[str]:
    """Return the table of one plan."""
    layout, cluster, count = plan.layout, plan.cluster, plan.parameters
    parallel, seconds = plan.config.parallel, plan.total_seconds
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    moment = f"{plan.phase} pass" if plan.phase == "backward" else plan.phase
    host = [f"  {'in host memory':14}{plan.host / 1e9:10.2f}"] if plan.host else []
    return [
        f"{plan.config.name}: {count.total:,} parameters, {count.activated:,} active for a token, "
        f"{plan.parameters_per_rank:,} on a rank",
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}: dp {layout.world_size}, "
        f"ep {parallel.ep_size}, micro-batch {layout.micro_batch}, accumulation "
        f"{layout.accumulation}, checkpointing {parallel.activation_checkpointing}, ZeRO "
        f"{layout.zero_stage}, {layout.precision}",
        "",
        f"memory of a rank, GB (fullest in the {moment})",
        *(f"  {kind:14}{value / 1e9:10.2f}" for kind, value in plan.memory.items()),
        f"  {'total':14}{plan.total_memory / 1e9:10.2f}   of "
        f"{cluster.device.memory / 1e9:.0f}: {verdict}",
        *host,
        "",
        f"{'sent by a rank in a step, MB':32}{'in the node':>14}{'to other nodes':>16}",
        *(
            f"  {name:30}{link.inside_node / 1e6:14.2f}{link.between_nodes / 1e6:16.2f}"
            for name, link in plan.traffic.items()
        ),
        "",
        f"work of a step: {plan.flops / 1e12:,.1f} TFLOP (attention and active experts), "
        f"{plan.kernels:,} kernels",
        "predicted time of a step, ms (from assumed shares of peak, nothing measured)",
        *(f"  {name:14}{1e3 * value:10.2f}" for name, value in plan.seconds.items()),
        f"  {'total':14}{1e3 * seconds:10.2f}   {plan.images_per_second:,.0f} images/s, "
        f"MFU {100 * plan.mfu:.1f} %",
    ]
