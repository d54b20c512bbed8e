"""The sum of gradients over ranks in place of ZeRO 1 and 2: `GradientSums` behind their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import ZeroPartitions, read_private
from promoe_ds.backends.gradient_sums import GradientSums, Place, SumSettings
from promoe_ds.private_names import moved

#: What is taken of ZeRO's gradients.
_NAMES = (
    "_grad_acc_hooks",
    "averaged_gradients",
    "bit16_groups",
    "communication_data_type",
    "dp_process_group",
    "gradient_accumulation_dtype",
    "independent_gradient_partition_epilogue",
    "is_gradient_accumulation_boundary",
    "overlap_comm",
    "partition_gradients",
    "partition_size",
    "process_gradients",
    "real_dp_process_group",
    "reduce_bucket_size",
    "reduce_ready_partitions_and_remove_grads",
)

#: Takes parameters and the fp32 norms of their gradients on this rank.
See = Callable[[Sequence[nn.Parameter], Sequence[Tensor]], None]


class GradientReducer:
    """Sums gradients over ranks into this rank's flat partitions, one of each parameter group."""

    def __init__(self, zero_optimizer: Any, see: See) -> None:
        """Take the place of a ZeRO 1 or 2 optimizer's own reduction from now on.

        Args:
            see: is called once a pass, with the order in which the gradients were made.
        """
        for name in _NAMES:
            read_private(zero_optimizer, name)
        self._zero, self._see, self._passes = zero_optimizer, see, 0
        self._norms: list[Tensor] = []
        places = list(self._find_places())
        settings = SumSettings(
            partitions=[int(size) for size in zero_optimizer.partition_size],
            bucket=zero_optimizer.reduce_bucket_size,
            overlaps=zero_optimizer.overlap_comm,
            at_end=not zero_optimizer.partition_gradients,
            sent_as=zero_optimizer.communication_data_type,
            kept_as=zero_optimizer.gradient_accumulation_dtype,
        )
        # DeepSpeed's, which its `comms_logger` counts.
        self._sums = GradientSums(
            places,
            settings,
            lambda bucket, ranks: deepspeed.comm.all_reduce(bucket, group=ranks, async_op=True),
        )
        zero_optimizer.process_gradients = _refuse
        zero_optimizer.reduce_ready_partitions_and_remove_grads = lambda *unused: None
        zero_optimizer.independent_gradient_partition_epilogue = self._finish
        # ZeRO's count the parameters of a pass and call it for each of them.
        for hook in zero_optimizer._grad_acc_hooks:
            hook.remove()
        zero_optimizer._grad_acc_hooks = [
            place.parameter.register_post_accumulate_grad_hook(
                partial(lambda place, _: self._sums.take(place), place)
            )
            for place in places
        ]

    def _find_places(self) -> Iterator[Place]:
        pieces = ZeroPartitions(self._zero)
        for group, parameters in enumerate(self._zero.bit16_groups):
            own = {id(piece.parameter): piece for piece in pieces.slices(group)}
            ranks = self._zero.real_dp_process_group[group]
            for parameter in parameters:
                yield Place(parameter, ranks, group, own.get(id(parameter)))

    def own_norms(self) -> list[Tensor]:
        """Return the fp32 norms of parts that together are all sums of this rank.

        Raises: ConfigError if ZeRO has not handed its gradients over.
        """
        sums = self._zero.averaged_gradients.values()
        if not sums or None in sums:
            raise moved("deepspeed", "DeepSpeedZeroOptimizer._grad_acc_hooks of every gradient")
        norms, passes = self._norms, self._passes
        self._sums.begin_step()
        self._passes = 0
        if passes == 1 and dist.get_world_size(self._zero.dp_process_group) == 1:
            return norms  # of the gradients, which are the sums
        return [torch.linalg.vector_norm(flat, dtype=torch.float32) for (flat,) in sums]

    def take_sum(self, group: int) -> Tensor:
        """Return the flat sum of a parameter group and forget it."""
        (flat,), self._zero.averaged_gradients[group] = self._zero.averaged_gradients[group], None
        return flat

    def _finish(self) -> None:
        """End a backward pass; after a step's last one hand the sums over to ZeRO."""
        norms = self._sums.end_pass()
        self._norms = list(norms.values())
        self._see([place.parameter for place in norms], self._norms)
        self._passes += 1
        # None: nobody called, which `own_norms` reports.
        if self._zero.is_gradient_accumulation_boundary() and (sums := self._sums.end_step()):
            for group, flat in enumerate(sums):
                self._zero.averaged_gradients[group] = [flat]


def _refuse(*unused: Any) -> None:
    raise moved("deepspeed", "DeepSpeedZeroOptimizer._grad_acc_hooks of every gradient")
