"""What one rank keeps under ZeRO between the passes of a step.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: each parameter group is one flat buffer,
cut into equal partitions. Of the summed gradients a rank keeps those of its partition, as the
trainer does on a GPU; DeepSpeed itself, on CPUs and with an offloaded optimizer, those of all
parameters that the partition touches.
"""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.config import RunConfig, count_parameters
from promoe_ds.planning.cluster import ClusterLayout

#: DeepSpeed aligns flat buffers to this many elements a rank.
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that one rank keeps between passes.

    gradients: kept from the backward pass to the update; update: fp32 gradients of an update on the
    host; offloaded: optimizer, averages and these are in the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    update: int
    offloaded: bool

    @property
    def total(self) -> int:
        """All but what the update adds."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def host(self) -> int:
        """Optimizer and averages, where the host holds them."""
        return self.optimizer + self.ema if self.offloaded else 0

    @property
    def device(self) -> int:
        """The rest."""
        return self.total - self.host


def states_of_groups(
    groups: list[tuple[list[int], int]], layout: ClusterLayout, averages: int
) -> States:
    """Compute the states of the rank that holds most.

    Args:
        groups: of each parameter group the elements of its parameters, in order, and the number of
            ranks that it is partitioned over.
        averages: moving averages of the weights.
    """
    size = layout.number_bytes
    held = sum(sum(sizes) for sizes, _ in groups)
    if layout.zero_stage == 0:
        return States(
            weights=size * held,
            gradients=size * held,
            optimizer=8 * held,
            ema=4 * averages * held,
            update=0,
            offloaded=False,
        )
    owned = [partition_size(sizes, ranks) for sizes, ranks in groups]
    padded = sum(share * ranks for share, (_, ranks) in zip(owned, groups, strict=True))
    return States(
        weights=size * padded,
        optimizer=12 * sum(owned),
        ema=4 * averages * sum(owned),
        gradients=size * (sum(owned) + padded * (layout.zero_stage == 1)),
        update=4 * sum(owned) * layout.offload,
        offloaded=layout.offload,
    )


def states_of_config(config: RunConfig, layout: ClusterLayout) -> States:
    """Compute the states from the config alone, as if no parameter crossed a partition's border."""
    count, ep_size = count_parameters(config), config.parallel.ep_size
    kinds = (
        (count.dense + count.unconditional, layout.world_size),
        (count.routed // ep_size, layout.world_size // ep_size),
    )
    groups = [([-(-held // ranks)] * ranks, ranks) for held, ranks in kinds if held]
    return states_of_groups(groups, layout, len(config.optimizer.averages))


def partition_size(sizes: list[int], ranks: int) -> int:
    """Return the elements of one rank's partition."""
    return -(-sum(sizes) // (_ALIGNMENT * ranks)) * _ALIGNMENT
