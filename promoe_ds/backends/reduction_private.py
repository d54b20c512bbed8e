"""The sum of gradients over ranks in place of ZeRO 1 and 2: each is copied once."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import OwnedSlice, ZeroPartitions, read_private
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
#: A gradient of this part of a bucket or more is not joined with others.
_LARGE = 1 / 4
#: Buckets under way while the backward pass continues, with `overlap_comm`.
_IN_FLIGHT = 2

#: Takes parameters and the fp32 norms of their gradients on this rank.
See = Callable[[Sequence[nn.Parameter], Sequence[Tensor]], None]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a parameter's gradient goes: summed over `ranks`; this rank's part, if it has one, into
    the flat sum of a parameter group.
    """

    parameter: nn.Parameter
    ranks: Any
    group: int
    part: OwnedSlice | None


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
        self._waiting: dict[Any, list[tuple[_Place, Tensor]]] = defaultdict(list)
        self._elements: Counter[Any] = Counter()
        self._sent: deque[tuple[Any, Sequence[_Place], Tensor]] = deque()
        self._at_end: dict[_Place, None] = {}
        self._start()
        self._places = list(self._find_places())
        zero_optimizer.process_gradients = _refuse
        zero_optimizer.reduce_ready_partitions_and_remove_grads = lambda *unused: None
        zero_optimizer.independent_gradient_partition_epilogue = self._finish
        # ZeRO's count the parameters of a pass and call it for each of them.
        for hook in zero_optimizer._grad_acc_hooks:
            hook.remove()
        zero_optimizer._grad_acc_hooks = [
            place.parameter.register_post_accumulate_grad_hook(partial(self._take, place))
            for place in self._places
        ]

    def _find_places(self) -> Iterator[_Place]:
        pieces = ZeroPartitions(self._zero)
        for group, parameters in enumerate(self._zero.bit16_groups):
            own = {id(piece.parameter): piece for piece in pieces.slices(group)}
            ranks = self._zero.real_dp_process_group[group]
            for parameter in parameters:
                yield _Place(parameter, ranks, group, own.get(id(parameter)))

    def _start(self) -> None:
        self._flats: dict[int, Tensor] = {}
        self._arrived: set[_Place] = set()
        #: Of the pass, in the order in which the gradients were made.
        self._norms: dict[_Place, Any] = {}
        self._passes = 0

    def own_norms(self) -> list[Tensor]:
        """Return the fp32 norms of parts that together are all sums of this rank.

        Raises: ConfigError if ZeRO has not handed its gradients over.
        """
        sums = self._zero.averaged_gradients.values()
        if not sums or None in sums:
            raise moved("deepspeed", "DeepSpeedZeroOptimizer._grad_acc_hooks of every gradient")
        norms, passes = self._norms, self._passes
        self._start()
        if passes == 1 and dist.get_world_size(self._zero.dp_process_group) == 1:
            return list(norms.values())  # of the gradients, which are the sums
        return [torch.linalg.vector_norm(flat, dtype=torch.float32) for (flat,) in sums]

    def take_sum(self, group: int) -> Tensor:
        """Return the flat sum of a parameter group and forget it."""
        (flat,), self._zero.averaged_gradients[group] = self._zero.averaged_gradients[group], None
        return flat

    def _take(self, place: _Place, parameter: nn.Parameter) -> None:
        """Take a gradient as it is made; under ZeRO 1, which adds passes up, at a step's end."""
        if self._zero.partition_gradients:
            self._collect(place)
        else:
            self._at_end[place] = None

    def _collect(self, place: _Place) -> None:
        gradient, place.parameter.grad = place.parameter.grad, None
        if gradient is None:
            return
        self._norms[place] = None
        ranks, size = place.ranks, self._zero.reduce_bucket_size
        if gradient.numel() >= _LARGE * size:
            self._send(ranks, [(place, gradient)])
            return
        if self._elements[ranks] + gradient.numel() > size:
            self._send_waiting(ranks)
        self._waiting[ranks].append((place, gradient))
        self._elements[ranks] += gradient.numel()

    def _send_waiting(self, ranks: Any) -> None:
        self._send(ranks, self._waiting.pop(ranks))
        self._elements.pop(ranks)

    def _send(self, ranks: Any, bucket_of: Sequence[tuple[_Place, Tensor]]) -> None:
        """Begin to sum gradients over these ranks.  Collectives: one, if there are others."""
        places, gradients = zip(*bucket_of, strict=True)
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        self._norms.update(zip(places, norms, strict=True))
        flats = [gradient.reshape(-1) for gradient in gradients]
        if dist.get_world_size(ranks) == 1:
            self._keep(places, flats)
            return
        bucket = flats[0] if len(flats) == 1 else torch.cat(flats)
        bucket = bucket.to(self._zero.communication_data_type)
        # DeepSpeed's, which its `comms_logger` counts.
        work = deepspeed.comm.all_reduce(bucket, group=ranks, async_op=True)
        self._sent.append((work, places, bucket))
        self._receive(_IN_FLIGHT if self._zero.overlap_comm else 0)

    def _receive(self, in_flight: int) -> None:
        """Keep the oldest sums until only so many buckets are under way."""
        while len(self._sent) > in_flight:
            work, places, bucket = self._sent.popleft()
            work.wait()
            self._keep(places, bucket.split([place.parameter.numel() for place in places]))

    def _keep(self, places: Sequence[_Place], sums: Sequence[Tensor]) -> None:
        """Copy this rank's parts to where they belong, or add them to those of earlier passes."""
        pairs: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
        for place, total in zip(places, sums, strict=True):
            if place.part is not None:
                source = total.narrow(0, place.part.start, place.part.numel)
                pairs[place in self._arrived].append((self._target(place), source))
        self._arrived.update(places)
        for has_some, join in ((False, torch._foreach_copy_), (True, torch._foreach_add_)):
            if pairs[has_some]:
                targets, sources = zip(*pairs[has_some], strict=True)
                join(targets, sources)

    def _target(self, place: _Place) -> Tensor:
        return self._flat(place.group).narrow(0, place.part.flat_start, place.part.numel)

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
        parts = [place.part for place in self._places if place.group == group and place.part]
        starts = sorted((part.flat_start, part.numel) for part in parts)
        at = 0
        for start, numel in [*starts, (end, 0)]:
            if start > at:
                yield at, start
            at = start + numel

    def _finish(self) -> None:
        """End a backward pass; after a step's last one hand the sums over to ZeRO."""
        for place in self._at_end:
            self._collect(place)
        self._at_end.clear()
        for ranks in list(self._waiting):
            self._send_waiting(ranks)
        self._receive(0)
        self._see([place.parameter for place in self._norms], list(self._norms.values()))
        self._passes += 1
        if not self._zero.is_gradient_accumulation_boundary():
            self._norms.clear()
            return
        if not self._arrived:
            return  # nobody called, which `own_norms` reports
        for place in self._places:
            if place.part is not None and place not in self._arrived:
                self._target(place).zero_()
        for group in range(len(self._zero.bit16_groups)):
            self._zero.averaged_gradients[group] = [self._flat(group)]


def _refuse(*unused: Any) -> None:
    raise moved("deepspeed", "DeepSpeedZeroOptimizer._grad_acc_hooks of every gradient")
