"""What one rank keeps under ZeRO between the passes of a step.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: each parameter group is one flat buffer,
cut into equal partitions; gradients of whole parameters that a rank's partition touches are kept,
but where the device decides about updates, those of the partition alone.
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
    copied = sum(owned)
    if not layout.decides_on_device:  # else only a partition's own numbers are kept
        copied = sum(_copied(sizes, ranks) for sizes, ranks in groups)
    padded = sum(share * ranks for share, (_, ranks) in zip(owned, groups, strict=True))
    return States(
        weights=size * padded,
        optimizer=12 * sum(owned),
        ema=4 * averages * sum(owned),
        gradients=size * (copied if layout.zero_stage == 2 else padded + copied),
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


def _copied(sizes: list[int], ranks: int) -> int:
    """Return the elements of all parameters that a partition touches, at worst.

    Gradients of whole parameters are copied, also of those that begin or end in another's
    partition.
    """
    owned, start, copied = partition_size(sizes, ranks), 0, [0] * ranks
    for size in sizes:
        for rank in range(start // owned, min(ranks - 1, (start + size - 1) // owned) + 1):
            copied[rank] += size
        start += size
    return max(copied)
