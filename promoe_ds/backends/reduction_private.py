"""The sum of gradients over ranks in place of ZeRO 1 and 2: each is copied once."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import ZeroPartitions, read_private
from promoe_ds.private_names import moved

#: What is taken of ZeRO's gradients.
_NAMES = (
    "averaged_gradients",
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
#: A gradient of this part of a bucket or more is not joined with others.
_LARGE = 1 / 4
#: Buckets under way while the backward pass continues, with `overlap_comm`.
_IN_FLIGHT = 2

#: Takes parameters and the fp32 norms of their gradients on this rank.
See = Callable[[Sequence[nn.Parameter], Sequence[Tensor]], None]


class GradientReducer:
    """Sums gradients over ranks into this rank's flat partitions, one of each parameter group.

    ZeRO copies each gradient into a bucket, divides, flattens, sums and copies the bucket, and
    copies this rank's part of it twice. Here large gradients are summed where they are, others wait
    until a bucket is full and are joined; this rank's part is copied. Nobody divides: the sums are
    not means.
    """

    def __init__(self, zero_optimizer: Any, see: See) -> None:
        """Take the place of a ZeRO 1 or 2 optimizer's own reduction from now on.

        Args:
            see: is called once a pass, with the order in which the gradients were made.
        """
        for name in _NAMES:
            read_private(zero_optimizer, name)
        self._zero, self._see = zero_optimizer, see
        pieces = ZeroPartitions(zero_optimizer)
        self._owned = {
            piece.parameter: (group, piece)
            for group in range(len(pieces.flats))
            for piece in pieces.slices(group)
        }
        self._waiting: dict[Any, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        self._elements: Counter[Any] = Counter()
        self._sent: deque[tuple[Any, Sequence[nn.Parameter], Tensor]] = deque()
        self._at_end: dict[nn.Parameter, int] = {}
        self._start()
        zero_optimizer.process_gradients = self._take
        zero_optimizer.reduce_ready_partitions_and_remove_grads = self._take
        zero_optimizer.independent_gradient_partition_epilogue = self._finish

    def _start(self) -> None:
        self._flats: dict[int, Tensor] = {}
        self._arrived: set[nn.Parameter] = set()
        #: Of the pass, in the order in which the gradients were made.
        self._norms: dict[nn.Parameter, Any] = {}
        self._passes = 0

    def own_norms(self) -> list[Tensor]:
        """Return the fp32 norms of parts that together are all sums of this rank.

        Raises: ConfigError if ZeRO has not handed its gradients over.
        """
        sums = self._zero.averaged_gradients.values()
        if not sums or None in sums:
            raise moved("deepspeed", "call of DeepSpeedZeroOptimizer.process_gradients")
        norms, passes = self._norms, self._passes
        self._start()
        if passes == 1 and dist.get_world_size(self._zero.dp_process_group) == 1:
            return list(norms.values())  # of the gradients, which are the sums
        return [torch.linalg.vector_norm(flat, dtype=torch.float32) for (flat,) in sums]

    def take_sum(self, group: int) -> Tensor:
        """Return the flat sum of a parameter group and forget it."""
        (flat,), self._zero.averaged_gradients[group] = self._zero.averaged_gradients[group], None
        return flat

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        """Take a gradient as it is made; under ZeRO 1, which adds passes up, at a step's end."""
        if self._zero.partition_gradients:
            self._collect(parameter, group)
        else:
            self._at_end[parameter] = group

    def _collect(self, parameter: nn.Parameter, group: int) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        self._norms[parameter] = None
        ranks, size = self._zero.real_dp_process_group[group], self._zero.reduce_bucket_size
        if gradient.numel() >= _LARGE * size:
            self._send(ranks, [(parameter, gradient)])
            return
        if self._elements[ranks] + gradient.numel() > size:
            self._send_waiting(ranks)
        self._waiting[ranks].append((parameter, gradient))
        self._elements[ranks] += gradient.numel()

    def _send_waiting(self, ranks: Any) -> None:
        self._send(ranks, self._waiting.pop(ranks))
        self._elements.pop(ranks)

    def _send(self, ranks: Any, bucket_of: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Begin to sum gradients over these ranks.  Collectives: one, if there are others."""
        parameters, gradients = zip(*bucket_of, strict=True)
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        self._norms.update(zip(parameters, norms, strict=True))
        flats = [gradient.reshape(-1) for gradient in gradients]
        if dist.get_world_size(ranks) == 1:
            self._keep(parameters, flats)
            return
        bucket = flats[0] if len(flats) == 1 else torch.cat(flats)
        bucket = bucket.to(self._zero.communication_data_type)
        # DeepSpeed's, which its `comms_logger` counts.
        work = deepspeed.comm.all_reduce(bucket, group=ranks, async_op=True)
        self._sent.append((work, parameters, bucket))
        self._receive(_IN_FLIGHT if self._zero.overlap_comm else 0)

    def _receive(self, in_flight: int) -> None:
        """Keep the oldest sums until only so many buckets are under way."""
        while len(self._sent) > in_flight:
            work, parameters, bucket = self._sent.popleft()
            work.wait()
            self._keep(parameters, bucket.split([p.numel() for p in parameters]))

    def _keep(self, parameters: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        """Copy this rank's parts to their places, or add them to those of earlier passes."""
        pairs: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
        for parameter, total in zip(parameters, sums, strict=True):
            if parameter in self._owned:
                group, piece = self._owned[parameter]
                place = self._flat(group).narrow(0, piece.flat_start, piece.numel)
                part = total.narrow(0, piece.start, piece.numel)
                pairs[parameter in self._arrived].append((place, part))
        self._arrived.update(parameters)
        for has_some, join in ((False, torch._foreach_copy_), (True, torch._foreach_add_)):
            if pairs[has_some]:
                places, parts = zip(*pairs[has_some], strict=True)
                join(places, parts)

    def _flat(self, group: int) -> Tensor:
        """Return the flat sum of a parameter group; new, only its padding is written."""
        if group not in self._flats:
            zero = self._zero
            flat = self._flats[group] = torch.empty(
                int(zero.partition_size[group]),
                dtype=zero.gradient_accumulation_dtype,
                device=zero.device,
            )
            for start, end in self._gaps(group, flat.numel()):
                flat[start:end].zero_()
        return self._flats[group]

    def _gaps(self, group: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where a flat tensor of `end` numbers holds none of a parameter."""
        own = [piece for index, piece in self._owned.values() if index == group]
        starts = sorted((piece.flat_start, piece.numel) for piece in own)
        at = 0
        for start, numel in [*starts, (end, 0)]:
            if start > at:
                yield at, start
            at = start + numel

    def _finish(self) -> None:
        """End a backward pass; after a step's last one hand the sums over to ZeRO."""
        for parameter, group in self._at_end.items():
            self._collect(parameter, group)
        self._at_end.clear()
        for ranks in list(self._waiting):
            self._send_waiting(ranks)
        self._receive(0)
        self._see(list(self._norms), list(self._norms.values()))
        self._passes += 1
        if not self._zero.is_gradient_accumulation_boundary():
            self._norms.clear()
            return
        if not self._arrived:
            return  # nobody called, which `own_norms` reports
        for parameter in self._owned.keys() - self._arrived:
            group, piece = self._owned[parameter]
            self._flat(group).narrow(0, piece.flat_start, piece.numel).zero_()
        for group in range(len(self._zero.partition_size)):
            self._zero.averaged_gradients[group] = [self._flat(group)]
