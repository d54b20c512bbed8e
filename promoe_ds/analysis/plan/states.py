"""What one rank keeps between passes under ZeRO, as DeepSpeed cuts it: by the sizes of real parameters.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from promoe_ds.analysis.plan.cluster import Layout
from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.config import RunConfig

#: DeepSpeed aligns flat buffers to this many elements a rank.
_ALIGNMENT = 2


@dataclass(frozen=True)
class Partition:
    """One parameter group on its ranks.

    padded: elements of the flat buffer; owned: of one rank's partition; copied: elements of all parameters that a partition
    touches, at worst: gradients of whole parameters are copied, also of those that begin or end in another's partition.
    """

    padded: int
    owned: int
    copied: int


@dataclass(frozen=True)
class States:
    """Bytes of one rank.

    gradients: kept from the backward pass to the update; update: what the update adds at its peak; host: of the optimizer, the
    averages and the update's fp32 gradients, what lies in the host's memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    update: int
    host: int = 0


def rank_states(config: RunConfig, network: nn.Module, layout: Layout) -> States:
    """Compute the states of the rank that holds most."""
    ep_size, size = config.parallel.ep_size, layout.number_bytes
    averages = len(config.optimizer.averages)
    groups = parameter_groups(network, config.optimizer, layout.precision)
    if layout.zero_stage == 0:
        held = sum(p.numel() for group in groups for p in group["params"])
        return States(weights=size * held, gradients=size * held, optimizer=8 * held, ema=4 * averages * held, update=0)
    parts = [_cut([p.numel() for p in group["params"]], layout.world_size // (ep_size if group.get("moe") else 1))
             for group in groups]
    padded, owned = sum(part.padded for part in parts), sum(part.owned for part in parts)
    copied = sum(part.copied for part in parts)
    held = copied if layout.zero_stage == 2 else padded + copied
    # The update flattens one group's gradients after the other, and casts bf16 ones to fp32.
    optimizer, ema = 12 * owned, 4 * averages * owned
    if layout.offload:
        return States(weights=size * padded, gradients=size * held, optimizer=0, ema=0, update=0, host=optimizer + ema + 4 * owned)
    update = max(part.owned for part in parts) * (4 if size == 4 else 6)
    return States(weights=size * padded, gradients=size * held, optimizer=optimizer, ema=ema, update=update)


def _cut(sizes: list[int], ranks: int) -> Partition:
    unit = _ALIGNMENT * ranks
    padded = -(-sum(sizes) // unit) * unit
    owned = padded // ranks
    copied = [0] * ranks
    start = 0
    for size in sizes:
        for rank in range(start // owned, min(ranks - 1, (start + size - 1) // owned) + 1):
            copied[rank] += size
        start += size
    return Partition(padded, owned, max(copied))
