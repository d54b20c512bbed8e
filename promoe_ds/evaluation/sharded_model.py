"""An export on many ranks, each with its share of the routed experts: models that no single device
holds. Needs no deepspeed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT, build_model
from promoe_ds.model.export import fill_network, open_weights, read_export_config
from promoe_ds.moe.dispatch import AllToAllDispatcher
from promoe_ds.moe.experts import EXPERT_PARAMETERS, StackedExperts


class RankwiseDispatcher(AllToAllDispatcher):
    """The exact-size exchange, without sorting what arrives: rows stay grouped by the rank that
    sent them.
    """

    sort = False


class RankwiseExperts(nn.Module):
    """Experts that compute the rows of each sending rank apart: the products have the shapes that
    they have on one rank.
    """

    def __init__(self, experts: StackedExperts) -> None:
        """Wrap this rank's experts."""
        super().__init__()
        self.experts = experts

    def forward(self, rows_RD: Tensor, counts_We: Tensor) -> Tensor:
        """Run each expert on its rows, (R, D).  Sync: one."""
        counts = counts_We.view(-1, self.experts.num_local_experts)
        parts = rows_RD.split(counts.sum(dim=1).tolist())
        return torch.cat([self.experts(part, own) for part, own in zip(parts, counts, strict=True)])


def load_sharded_model(
    export: Path,
    team: DistributedContext,
    *,
    ep_size: int,
    dtype: torch.dtype | None = None,
    exact: bool = True,
) -> DiT:
    """Load an export with this rank's experts only; all ranks call this together.

    Consecutive ranks share a set of experts. They exchange rows in every pass: all must make
    equally many passes.
    Args:
        ep_size: ranks that share a set.
        exact: whether experts compute the rows of each rank apart, see `sampling`.
    Raises: ConfigError if ep_size does not fit; CheckpointError naming what is missing in the
        export.
    """
    config, _ = read_export_config(export)
    if (
        config.routing.method == "dense"
        or config.routing.num_experts % ep_size
        or team.world_size % ep_size
    ):
        raise ConfigError(
            f"--ep-size {ep_size} must divide the model's {config.routing.num_experts} routed"
            f" experts and the {team.world_size} processes (dense models have no experts)"
        )
    group, _ = dist.new_subgroups(ep_size)
    reader = open_weights(export, config)
    with torch.device("meta"):
        network = build_model(config)
    state: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, StackedExperts):
            share = layer.num_local_experts // ep_size
            first = share * dist.get_rank(group)
            state |= {
                f"{name}.{parameter}": reader.read_rows(f"{name}.{parameter}", first, share)
                for parameter in EXPERT_PARAMETERS[layer.expert_type]
            }
            layer.keep(first, share)
    state |= {name: reader.read(name) for name in reader.shapes if name not in state}
    fill_network(network, state)
    for layer in network.moe_layers().values():
        dispatcher = RankwiseDispatcher if exact else AllToAllDispatcher
        layer.dispatcher = dispatcher(group, counts_waiting=False)
        routed: Any = RankwiseExperts(layer.routed) if exact else layer.routed
        layer.routed = routed
    return network.eval().to(device=team.device, dtype=dtype)
