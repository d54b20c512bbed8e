"""Predicted time of a step: a roofline over the traced operations, links beside it.

A prediction rests on `Efficiency`: shares of the makers' peaks that were assumed, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.analysis.plan.cluster import Cluster, Layout
from promoe_ds.analysis.plan.shapes import PassShapes
from promoe_ds.analysis.plan.traffic import Link
from promoe_ds.config import RunConfig


@dataclass(frozen=True)
class Efficiency:
    """Reached shares of peak: matrix products, attention, memory bandwidth, links.

    For an offloaded update, bytes/s of a rank: host_memory, its share of the host's; host_link, between device and host.
    """

    matrix: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.8
    host_memory: float = 25e9
    host_link: float = 25e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what takes them; communication only where nothing hides it."""

    matrix: float
    attention: float
    other: float
    update: float
    exchange: float
    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.matrix + self.attention + self.other + self.update + self.exchange + self.gradients + self.weights


def step_time(config: RunConfig, layout: Layout, cluster: Cluster, shapes: PassShapes, traffic: dict[str, Link],
              efficiency: Efficiency) -> StepTime:
    """Predict a step.

    Each operation takes the longer of computing and moving its operands. Half of the exchange (rows out, and their
    gradients back) runs beside the shared experts; under `overlap_comm` gradients travel beside the backward pass.
    """
    device, passes = cluster.device, layout.accumulation
    bandwidth = device.memory_bandwidth * efficiency.memory
    rates = {"matrix": device.flops[layout.precision] * efficiency.matrix,
             "attention": device.flops[layout.precision] * efficiency.attention}
    seconds = {kind: passes * sum(max(flops / rates.get(kind, float("inf")), moved / bandwidth) for flops, moved in work.calls)
               for kind, work in shapes.work.items()}
    compute = sum(seconds.values())
    links = {name: (link.inside_node / device.link_bandwidth + link.between_nodes / cluster.network_bandwidth) / efficiency.link
             for name, link in traffic.items()}
    hidden = min(links["exchange"] / 2, _shared_seconds(config, layout, rates["matrix"]))
    gradients = max(0.0, links["gradients"] - compute * 2 / 3) if layout.overlap else links["gradients"]
    states = shapes.states
    # Gradients, masters, both moments and the average are read, all but the gradients written; and the weights.
    update = (2 * states.optimizer + 2 * states.ema + 2 * states.gradients) / bandwidth
    if layout.offload:  # gradients go down, weights come back
        update = 2 * states.host / efficiency.host_memory + (states.gradients + states.weights) / efficiency.host_link
    return StepTime(matrix=seconds.get("matrix", 0.0), attention=seconds.get("attention", 0.0), other=seconds.get("other", 0.0),
                    update=update, exchange=links["exchange"] - hidden + links["centroids"], gradients=gradients,
                    weights=links["weights"])


def _shared_seconds(config: RunConfig, layout: Layout, rate: float) -> float:
    """Return the time of the shared experts of all layers, forward and backward."""
    matrices = 3 if config.shared_expert_type == "swiglu" else 2
    hidden = config.routing.num_shared_experts * config.shared_expert_width
    tokens = layout.accumulation * layout.micro_batch * config.model.tokens_per_image
    return 3 * 2 * tokens * matrices * hidden * config.model.hidden_size * len(config.moe_block_indices) / rate
