"""Bytes that one rank sends in a step, by what they are and over which link: to its node's other devices, to other nodes."""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.analysis.plan.cluster import Cluster, Layout
from promoe_ds.analysis.plan.shapes import PassShapes
from promoe_ds.config import RunConfig, count_parameters


@dataclass(frozen=True)
class Link:
    """Bytes of one kind a step."""

    inside_node: int
    between_nodes: int


def step_traffic(config: RunConfig, layout: Layout, cluster: Cluster, shapes: PassShapes) -> dict[str, Link]:
    """Compute what a rank sends: rows of the exchange, gradients, updated weights, centroids.

    The exchange is what the traced pass sent, to the byte, under even routing. The reductions are rings, whose border
    between two nodes is crossed by one of a node's ranks: its bytes are shared out over the node's ranks.
    """
    ep_size = config.parallel.ep_size
    count = count_parameters(config)
    dense, routed = (layout.number_bytes * n for n in (count.dense + count.unconditional, count.routed // ep_size))
    stride = 1 if layout.data_before_expert else ep_size
    reduced = _sum(_ring(dense, layout.world_size, 1, cluster), _ring(routed, layout.world_size // ep_size, stride, cluster))
    # ZeRO 2 reduces after every pass; without ZeRO an all-reduce is two rings and there is no gathering of weights.
    gradients = _times(reduced, layout.accumulation if layout.zero_stage == 2 else 1)
    centroids = sum(one.bytes_by_member[0] for one in shapes.sent if one.name == "allreduce_")
    return {
        "exchange": _times(_exchange(shapes, cluster), layout.accumulation),
        "gradients": gradients if layout.zero_stage else _times(reduced, 2),
        "weights": reduced if layout.zero_stage else Link(0, 0),
        "centroids": _times(_ring(2 * centroids, layout.world_size, 1, cluster), layout.accumulation),
    }


def _exchange(shapes: PassShapes, cluster: Cluster) -> Link:
    inside = between = 0
    for one in shapes.sent:
        for member, size in zip(one.members, one.bytes_by_member, strict=False):
            if member == one.members[0]:
                continue  # to itself
            if member // cluster.gpus_per_node == one.members[0] // cluster.gpus_per_node:
                inside += size
            else:
                between += size
    return Link(inside, between)


def _ring(size: int, ranks: int, stride: int, cluster: Cluster) -> Link:
    """Reduce-scatter or all-gather of `size` bytes over every stride-th rank."""
    if ranks <= 1:
        return Link(0, 0)
    total = size * (ranks - 1) // ranks
    on_node = max(1, min(ranks, cluster.gpus_per_node // stride))
    between = 0 if on_node == ranks and ranks * stride <= cluster.gpus_per_node else total // on_node
    return Link(total - between, between)


def _sum(a: Link, b: Link) -> Link:
    return Link(a.inside_node + b.inside_node, a.between_nodes + b.between_nodes)


def _times(link: Link, factor: int) -> Link:
    return Link(link.inside_node * factor, link.between_nodes * factor)
