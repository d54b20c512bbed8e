"""The sum of gradients over ranks, kept as this rank's flat partitions: each is copied once.

ZeRO copies each gradient into a bucket, divides, flattens, sums and copies the bucket, and copies
this rank's part of it twice. Here large gradients are summed where they are, others wait until a
bucket is full and are joined; this rank's part is copied. Nobody divides: the sums are not means.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import OwnedSlice
from promoe_ds.torch_private import add_all, copy_all, norms_of_all

#: A gradient of this part of a bucket or more is not joined with others.
_LARGE = 1 / 4
#: Buckets under way while the backward pass continues, with `overlaps`.
_IN_FLIGHT = 2

#: Sums a tensor over a process group in place; returns what can be waited for.
AllReduce = Callable[[Tensor, Any], Any]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter's gradient goes: summed over `ranks`; this rank's part, if it has one, into
    the flat sum of a parameter group.
    """

    parameter: nn.Parameter
    ranks: Any
    group: int
    part: OwnedSlice | None


@dataclass(frozen=True, kw_only=True)
class SumSettings:
    """How to sum.

    partitions: numbers of this rank's partition of each parameter group.
    bucket: numbers that are summed at once, but for a larger gradient.
    overlaps: whether the backward pass continues meanwhile.
    at_end: whether gradients wait for the end of a step, which adds passes up (ZeRO 1).
    sent_as, kept_as: dtypes of what travels and of the sums.
    """

    partitions: Sequence[int]
    bucket: int
    overlaps: bool
    at_end: bool
    sent_as: torch.dtype
    kept_as: torch.dtype


class GradientSums:
    """Sums the gradients of a step's passes as they are made."""

    def __init__(self, places: Sequence[Place], settings: SumSettings, reduce: AllReduce) -> None:
        """Begin a first step."""
        self._places, self._settings, self._reduce = places, settings, reduce
        self._waiting: dict[Any, list[tuple[Place, Tensor]]] = defaultdict(list)
        self._elements: Counter[Any] = Counter()
        self._sent: deque[tuple[Any, Sequence[Place], Tensor]] = deque()
        self._at_end: dict[Place, None] = {}
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what was summed."""
        self._flats: dict[int, Tensor] = {}
        self._arrived: set[Place] = set()
        #: Of the pass, in the order in which the gradients were made.
        self._norms: dict[Place, Any] = {}

    def take(self, place: Place) -> None:
        """Take a gradient as it is made; under ZeRO 1, at a step's end."""
        if self._settings.at_end:
            self._at_end[place] = None
        else:
            self._collect(place)

    def end_pass(self) -> dict[Place, Tensor]:
        """Sum what is left; return the fp32 norms of this rank's gradients of the pass, in the
        order in which they were made.
        """
        for place in self._at_end:
            self._collect(place)
        self._at_end.clear()
        for ranks in list(self._waiting):
            self._send_waiting(ranks)
        self._receive(0)
        norms, self._norms = self._norms, {}
        return norms

    def end_step(self) -> list[Tensor] | None:
        """Return the flat sum of each parameter group; None if no gradient was taken."""
        if not self._arrived:
            return None
        for place in self._places:
            if place.part is not None and place not in self._arrived:
                self._target(place, place.part).zero_()
        return [self.flat_sum(group) for group in range(len(self._settings.partitions))]

    def _collect(self, place: Place) -> None:
        gradient, place.parameter.grad = place.parameter.grad, None
        if gradient is None:
            return
        self._norms[place] = None
        ranks, size = place.ranks, self._settings.bucket
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

    def _send(self, ranks: Any, bucket_of: Sequence[tuple[Place, Tensor]]) -> None:
        """Begin to sum gradients over these ranks.  Collectives: one, if there are others."""
        places, gradients = zip(*bucket_of, strict=True)
        norms = norms_of_all(list(gradients))
        self._norms.update(zip(places, norms, strict=True))
        flats = [gradient.reshape(-1) for gradient in gradients]
        if dist.get_world_size(ranks) == 1:
            self._keep(places, flats)
            return
        # A product's gradient is its own result; one of an added vector may be another's memory.
        is_own = len(flats) == 1 and gradients[0].dim() > 1
        bucket = (flats[0] if is_own else torch.cat(flats)).to(self._settings.sent_as)
        self._sent.append((self._reduce(bucket, ranks), places, bucket))
        self._receive(_IN_FLIGHT if self._settings.overlaps else 0)

    def _receive(self, in_flight: int) -> None:
        """Keep the oldest sums until only so many buckets are under way."""
        while len(self._sent) > in_flight:
            work, places, bucket = self._sent.popleft()
            work.wait()
            self._keep(places, bucket.split([place.parameter.numel() for place in places]))

    def _keep(self, places: Sequence[Place], sums: Sequence[Tensor]) -> None:
        """Copy this rank's parts to where they belong, or add them to those of earlier passes."""
        pairs: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
        for place, total in zip(places, sums, strict=True):
            if (part := place.part) is not None:
                source = total.narrow(0, part.start, part.numel)
                pairs[place in self._arrived].append((self._target(place, part), source))
        self._arrived.update(places)
        for has_some, join in ((False, copy_all), (True, add_all)):
            if pairs[has_some]:
                targets, sources = map(list, zip(*pairs[has_some], strict=True))
                join(targets, sources)

    def _target(self, place: Place, part: OwnedSlice) -> Tensor:
        return self.flat_sum(place.group).narrow(0, part.flat_start, part.numel)

    def flat_sum(self, group: int) -> Tensor:
        """Return the flat sum of a parameter group; new, only its padding is written."""
        if group not in self._flats:
            flat = self._flats[group] = torch.empty(
                self._settings.partitions[group],
                dtype=self._settings.kept_as,
                device=self._places[0].parameter.device,
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
