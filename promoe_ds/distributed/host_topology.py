"""On which hosts expert-parallel groups are: exchanges are cheap inside a host, expensive between.

Groups whose ranks share a host exchange tokens over its own links; the replicas of an expert on
other hosts then meet once a step, to average gradients (expert-data parallelism).
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import torch.distributed as dist

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.logs import get_logger

_LOG = get_logger("placement")


def check_placement(
    group: dist.ProcessGroup, context: DistributedContext, *, required: bool
) -> None:
    """Log how many hosts the expert-parallel groups span; all ranks call this together.
    Collectives: one.

    Args:
        group: this rank's; required: whether each must be on one host
            (`parallel.expert_groups=node`).
    Raises: ConfigError on every rank if they must and do not.
    """
    gathered = context.gather((socket.gethostname(), tuple(dist.get_process_group_ranks(group))))
    hosts = [host for host, _ in gathered]
    problem = spanning_problem(hosts, sorted({ranks for _, ranks in gathered}))
    if problem and required:
        raise ConfigError(f"parallel.expert_groups=node: {problem}")
    if context.is_main and dist.get_world_size(group) > 1:
        _LOG.warning("%s", problem) if problem else _LOG.info("every expert group is on one host")


def spanning_problem(hosts: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    """Return "" if each group of ranks is on one host, else the first that does not, and what to
    change.

    Args:
        hosts: host name by rank.
        groups: the ranks of each expert-parallel group.
    """
    spanning = next((ranks for ranks in groups if len({hosts[rank] for rank in ranks}) > 1), None)
    if spanning is None:
        return ""
    ep_size, world_size = len(groups[0]), len(hosts)
    stride = world_size // ep_size
    orders = {
        "false": [range(first, first + ep_size) for first in range(0, world_size, ep_size)],
        "true": [range(first, world_size, stride) for first in range(stride)],
    }
    for value, others in orders.items():
        if all(len({hosts[rank] for rank in ranks}) == 1 for ranks in others):
            remedy = f"set use_data_before_expert_parallelism to {value} in the DeepSpeed JSON"
            break
    else:
        fewest = min(hosts.count(host) for host in hosts)
        remedy = (
            f"lower parallel.ep_size to {math.gcd(ep_size, fewest)}, which divides the {fewest}"
            " ranks of a host"
        )
    listed = ", ".join(f"{rank} on {hosts[rank]}" for rank in spanning)
    return (
        f"the expert group of ranks {listed} spans hosts, tokens cross the network in every layer;"
        f" {remedy}"
    )
