"""What one rank keeps under ZeRO, and where gradients go while the backward pass runs.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: each parameter group is one flat buffer,
cut into equal partitions; gradients are copied into a bucket; a full bucket is reduced through a
flat copy; gradients of this rank's partition are kept. A parameter larger than the bucket is
reduced alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from promoe_ds.config import RunConfig, count_parameters
from promoe_ds.planning.cluster import ClusterLayout
from promoe_ds.planning.trace import ShapeTrace

#: DeepSpeed aligns flat buffers to this many elements a rank.
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that one rank keeps between passes.

    gradients: kept from the backward pass to the update; update: what the update adds at its peak;
    offloaded: optimizer, averages and the update's fp32 gradients are in the host's memory.
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
    owned = [_owned(sizes, ranks) for sizes, ranks in groups]
    copied = sum(_copied(sizes, ranks) for sizes, ranks in groups)
    padded = sum(share * ranks for share, (_, ranks) in zip(owned, groups, strict=True))
    # On the device the update flattens one group's gradients after the other, and casts bf16 ones.
    update = 4 * sum(owned) if layout.offload else max(owned) * (4 if size == 4 else 6)
    return States(
        weights=size * padded,
        optimizer=12 * sum(owned),
        ema=4 * averages * sum(owned),
        gradients=size * (copied if layout.zero_stage == 2 else padded + copied),
        update=update,
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


def _owned(sizes: list[int], ranks: int) -> int:
    """Return the elements of one rank's partition."""
    return -(-sum(sizes) // (_ALIGNMENT * ranks)) * _ALIGNMENT


def _copied(sizes: list[int], ranks: int) -> int:
    """Return the elements of all parameters that a partition touches, at worst.

    Gradients of whole parameters are copied, also of those that begin or end in another's
    partition.
    """
    owned, start, copied = _owned(sizes, ranks), 0, [0] * ranks
    for size in sizes:
        for rank in range(start // owned, min(ranks - 1, (start + size - 1) // owned) + 1):
            copied[rank] += size
        start += size
    return max(copied)


class GradientStaging:
    """Replays a backward pass's gradient buffers with tensors of the same sizes."""

    def __init__(
        self, network: nn.Module, layout: ClusterLayout, trace: ShapeTrace, *, kept: int
    ) -> None:
        """Hook the parameters of a network; `kept` bytes of its gradients stay with the rank."""
        self._layout, self._trace = layout, trace
        self._kept_elements, self._has_kept = kept // layout.number_bytes, False
        self._dtype = next(network.parameters()).dtype
        parameters = [p for p in network.parameters() if p.requires_grad]
        self._total = sum(p.numel() for p in parameters)
        self._filled = 0
        self._buffers: list[Tensor] = []
        self._waiting: list[nn.Parameter] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        layout = self._layout
        self._trace.label(parameter.grad, "gradients")
        if layout.zero_stage < 2:
            return
        if not self._buffers:
            size = min(layout.bucket, self._total) if layout.touched_only else layout.bucket
            for _ in range(2 if layout.overlap and not layout.touched_only else 1):
                self._make(size, "buckets", keep=True)
        if self._filled + parameter.numel() > layout.bucket:
            self._reduce()
        self._filled += parameter.numel()
        if parameter.numel() > layout.bucket:
            self._waiting.append(parameter)
        else:
            parameter.grad = None

    def finish(self) -> None:
        """Reduce what is left, as the end of a backward pass does."""
        if self._layout.zero_stage == 2:
            self._reduce()
        self._buffers.clear()

    def _reduce(self) -> None:
        if not self._filled:
            return
        if self._layout.touched_only:
            self._make(self._kept_elements * self._filled // self._total, "gradients", keep=True)
        elif not self._has_kept:
            self._make(self._kept_elements, "gradients", keep=True)
        self._has_kept = True
        largest = max((p.numel() for p in self._waiting), default=0)
        self._make(min(self._filled, self._layout.bucket + largest), "buckets", keep=False)
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting.clear()
        self._filled = 0

    def _make(self, elements: int, label: str, *, keep: bool) -> None:
        made = self._trace.label(torch.empty(elements, dtype=self._dtype), label)
        self._buffers += [made] if keep else []
