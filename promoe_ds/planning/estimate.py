"""Bytes that one rank sends in a step, and the predicted time of a step: a roofline.

A prediction rests on `Efficiency`: shares of the makers' peaks that were assumed, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.config import RunConfig
from promoe_ds.planning.cluster import Cluster, ClusterLayout
from promoe_ds.planning.replay import AFTER, BESIDE, UPDATE, WEIGHTS
from promoe_ds.planning.shapes import PassShapes
from promoe_ds.planning.trace import PASS, Sent
from promoe_ds.planning.work import Efficiency


@dataclass(frozen=True)
class Link:
    """Bytes that a rank sends: to its node's other devices, to other nodes."""

    inside_node: int = 0
    between_nodes: int = 0

    def __add__(self, other: Link) -> Link:
        return Link(self.inside_node + other.inside_node, self.between_nodes + other.between_nodes)

    def __mul__(self, factor: int) -> Link:
        return Link(self.inside_node * factor, self.between_nodes * factor)


def step_traffic(layout: ClusterLayout, cluster: Cluster, shapes: PassShapes) -> dict[str, Link]:
    """Compute what a rank sends in a step: rows, gradients, updated weights, centroids.

    These are the collectives of the trace, under even routing. Reductions and gatherings are rings,
    whose border between two nodes is crossed by one of a node's ranks: its bytes are shared out
    over the node's ranks.
    """
    exchange = Link()
    for member, size in (pair for one in shapes.trace.sent for pair in one.to_others(0).items()):
        exchange += Link(size, 0) if member < cluster.gpus_per_node else Link(0, size)
    beside, after, weights, centroids = (
        _rings_of(part, layout, cluster, shapes) for part in (BESIDE, AFTER, WEIGHTS, PASS)
    )
    return {
        "exchange": exchange * layout.accumulation,
        "gradients": beside + after,
        "weights": weights,
        "centroids": centroids,
    }


def _rings_of(part: str, layout: ClusterLayout, cluster: Cluster, shapes: PassShapes) -> Link:
    """Return what the reductions and gatherings of a part send."""
    sent = [one for one in shapes.trace.sent if one.part == part and not one.by_member]
    rings = [_of_collective(one, cluster) for one in sent]
    return sum(rings, Link()) * _times(part, layout)


def _times(part: str, layout: ClusterLayout) -> int:
    """Return how often a part of the trace happens in a step: ZeRO 2 reduces after every pass."""
    is_repeated = part == PASS or (part in (BESIDE, AFTER) and layout.zero_stage == 2)
    return layout.accumulation if is_repeated else 1


def _of_collective(one: Sent, cluster: Cluster) -> Link:
    """Return what a reduction, two rings, or a gathering, one, sends."""
    ranks, gathers = len(one.members), one.name.startswith("allgather")
    stride = one.members[1] - one.members[0] if ranks > 1 else 1
    size = one.bytes * ranks if gathers else 2 * one.bytes
    return _ring(size, ranks, stride, cluster)


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
    (rows out, and their gradients back) runs beside the shared experts; under `overlap_comm` full
    buckets travel beside the backward pass, the last one after it.
    """
    device, states = cluster.device, shapes.states
    seconds = dict.fromkeys(("matrix", "attention", "other", "buckets", "update"), 0.0)
    names = {BESIDE: "buckets", AFTER: "buckets", UPDATE: "update"}
    for part, calls in shapes.trace.work.items():
        for work in calls:
            name = names.get(part, work.kind)
            seconds[name] += _times(part, layout) * work.seconds(device, efficiency)
    passes = seconds["matrix"] + seconds["attention"] + seconds["other"]
    if layout.offload:  # gradients go down, weights come back
        seconds["update"] = 2 * (states.host + states.update) / efficiency.host_memory
        seconds["update"] += (states.gradients + states.weights) / efficiency.host_link

    def travelling(link: Link) -> float:
        inside, between = link.inside_node, link.between_nodes
        return (
            inside / device.link_bandwidth + between / cluster.network_bandwidth
        ) / efficiency.link

    links = {name: travelling(link) for name, link in traffic.items()}
    shared = _shared_flops(config, layout) / device.flops[compute_precision(config, layout)]
    hidden = min(links["exchange"] / 2, shared / efficiency.matrix)
    seconds["exchange"] = links["exchange"] - hidden + links["centroids"]
    after = travelling(_rings_of(AFTER, layout, cluster, shapes))
    beside = passes * 2 / 3 if layout.overlap else 0.0
    seconds["gradients"] = max(0.0, links["gradients"] - after - beside) + after
    return seconds | {"weights": links["weights"]}


def step_kernels(layout: ClusterLayout, shapes: PassShapes) -> int:
    """Return how many kernels a rank's device runs in a step, without the routing log's."""
    return sum(
        _times(part, layout) * work.kernels
        for part, calls in shapes.trace.work.items()
        for work in calls
    )


def compute_precision(config: RunConfig, layout: ClusterLayout) -> str:
    """Return the precision of the matrix products: that of the weights, but under autocast."""
    return "bf16" if config.precision.compute == "bf16_autocast" else layout.precision


def _shared_flops(config: RunConfig, layout: ClusterLayout) -> int:
    """Return the operations of the shared experts of all layers, forward and backward."""
    matrices = 3 if config.shared_expert_type == "swiglu" else 2
    hidden = config.routing.num_shared_experts * config.shared_expert_width
    tokens = layout.accumulation * layout.micro_batch * config.model.tokens_per_image
    per_layer = 6 * tokens * matrices * hidden * config.model.hidden_size
    return per_layer * len(config.moe_block_indices)
