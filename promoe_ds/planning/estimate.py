"""Bytes that one rank sends in a step, and the predicted time of a step: a roofline.

A prediction rests on `Efficiency`: shares of the makers' peaks that were assumed, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.config import RunConfig, count_parameters
from promoe_ds.planning.cluster import Cluster, ClusterLayout
from promoe_ds.planning.shapes import PassShapes


@dataclass(frozen=True)
class Link:
    """Bytes that a rank sends: to its node's other devices, to other nodes."""

    inside_node: int = 0
    between_nodes: int = 0

    def __add__(self, other: Link) -> Link:
        return Link(self.inside_node + other.inside_node, self.between_nodes + other.between_nodes)

    def __mul__(self, factor: int) -> Link:
        return Link(self.inside_node * factor, self.between_nodes * factor)


@dataclass(frozen=True)
class Efficiency:
    """Reached shares of peak: matrix products, attention, memory bandwidth, links.

    For an offloaded update, bytes/s of a rank: host_memory, its share of the host's; host_link,
    between device and host.
    """

    matrix: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.8
    host_memory: float = 25e9
    host_link: float = 25e9


def step_traffic(
    config: RunConfig, layout: ClusterLayout, cluster: Cluster, shapes: PassShapes
) -> dict[str, Link]:
    """Compute what a rank sends in a step: rows, gradients, updated weights, centroids.

    The exchange is what the traced pass sent, to the byte, under even routing. The reductions are
    rings, whose border between two nodes is crossed by one of a node's ranks: its bytes are shared
    out over the node's ranks.
    """
    ep_size, world_size, sent = config.parallel.ep_size, layout.world_size, shapes.trace.sent
    count = count_parameters(config)
    dense = layout.number_bytes * (count.dense + count.unconditional)
    routed = layout.number_bytes * (count.routed // ep_size)
    stride = 1 if layout.data_before_expert else ep_size
    reduced = _ring(dense, world_size, 1, cluster)
    reduced += _ring(routed, world_size // ep_size, stride, cluster)
    centroids = sum(one.bytes_by_member[0] for one in sent if one.name == "allreduce_")
    exchange = Link()
    for member, size in (pair for one in sent for pair in one.to_others(0).items()):
        exchange += Link(size, 0) if member < cluster.gpus_per_node else Link(0, size)
    # ZeRO 2 reduces after every pass; without ZeRO an all-reduce is two rings, and no weights are
    # gathered.
    gradients = reduced * (layout.accumulation if layout.zero_stage == 2 else 1)
    return {
        "exchange": exchange * layout.accumulation,
        "gradients": gradients if layout.zero_stage else reduced * 2,
        "weights": reduced if layout.zero_stage else Link(),
        "centroids": _ring(2 * centroids, world_size, 1, cluster) * layout.accumulation,
    }


def _ring(size: int, ranks: int, stride: int, cluster: Cluster) -> Link:
    """Reduce-scatter or all-gather of `size` bytes over every stride-th rank."""
    total = size * (ranks - 1) // ranks
    on_node = max(1, min(ranks, cluster.gpus_per_node // stride))
    inside = on_node == ranks and ranks * stride <= cluster.gpus_per_node
    between = 0 if inside else total // on_node
    return Link(total - between, between)


def step_seconds(
    config: RunConfig,
    layout: ClusterLayout,
    cluster: Cluster,
    shapes: PassShapes,
    traffic: dict[str, Link],
    efficiency: Efficiency,
) -> dict[str, float]:
    """Predict the seconds of a step by what takes them; communication where nothing hides it.

    Each operation takes the longer of computing and moving its operands. Half of the exchange
    (rows out, and their gradients back) runs beside the shared experts; under `overlap_comm`
    gradients travel beside the backward pass.
    """
    device, states = cluster.device, shapes.states
    bandwidth = device.memory_bandwidth * efficiency.memory
    peak = device.flops[layout.precision]
    seconds = {}
    for kind, rate in (
        ("matrix", peak * efficiency.matrix),
        ("attention", peak * efficiency.attention),
        ("other", float("inf")),
    ):
        calls = shapes.trace.work[kind]
        seconds[kind] = layout.accumulation * sum(
            max(flops / rate, moved / bandwidth) for flops, moved in calls
        )
    beside = sum(seconds.values()) * 2 / 3 if layout.overlap else 0.0
    # Gradients, masters, both moments and the average are read, all but the gradients written; and
    # the weights.
    seconds["update"] = 2 * (states.optimizer + states.ema + states.gradients) / bandwidth
    if layout.offload:  # gradients go down, weights come back
        seconds["update"] = 2 * (states.host + states.update) / efficiency.host_memory
        seconds["update"] += (states.gradients + states.weights) / efficiency.host_link
    links = {
        name: (
            link.inside_node / device.link_bandwidth
            + link.between_nodes / cluster.network_bandwidth
        )
        / efficiency.link
        for name, link in traffic.items()
    }
    hidden = min(links["exchange"] / 2, _shared_flops(config, layout) / (peak * efficiency.matrix))
    seconds["exchange"] = links["exchange"] - hidden + links["centroids"]
    seconds["gradients"] = max(0.0, links["gradients"] - beside)
    return seconds | {"weights": links["weights"]}


def _shared_flops(config: RunConfig, layout: ClusterLayout) -> int:
    """Return the operations of the shared experts of all layers, forward and backward."""
    matrices = 3 if config.shared_expert_type == "swiglu" else 2
    hidden = config.routing.num_shared_experts * config.shared_expert_width
    tokens = layout.accumulation * layout.micro_batch * config.model.tokens_per_image
    per_layer = 6 * tokens * matrices * hidden * config.model.hidden_size
    return per_layer * len(config.moe_block_indices)
