"""Watching a pass: what storage is alive when, what is computed, what is sent.

Modes see every operation of forward and backward pass. On fake tensors there are no values: where
the code reads some (how many samples are null, how many rows each rank gets), `ShapeTrace` answers
with what even routing would give.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.kernels.ops import LIBRARY
from promoe_ds.planning.work import Work, work_of
from promoe_ds.torch_private import (
    dispatch_mode,
    operation_family,
    storage_key,
    tensors_in,
    traced_operation,
)

_DispatchMode: Any = dispatch_mode()
_HOST_READ = traced_operation("_local_scalar_dense.default")
_UNBIND = torch.ops.aten.unbind.int
_GROUPED_GEMM = traced_operation("_grouped_mm.default")
#: The part of a step that nobody named otherwise: the forward and the backward pass.
PASS = "pass"


@dataclass(frozen=True)
class Sent:
    """One collective of this rank: its name, the bytes that this rank puts in, its group's members.

    by_member: of an all-to-all, the bytes for each member; floating: whether it carries rows, not
    counts; part: of the step, see `ShapeTrace.during`.
    """

    name: str
    bytes: int
    members: tuple[int, ...]
    by_member: tuple[int, ...] = ()
    floating: bool = True
    part: str = PASS

    def to_others(self, rank: int) -> dict[int, int]:
        """Return the bytes of an all-to-all for each other member."""
        if not self.by_member:
            return {}
        pairs = zip(self.members, self.by_member, strict=True)
        return {member: size for member, size in pairs if member != rank}


class CollectiveWatch(_DispatchMode):
    """Notes every collective of what runs inside; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self.part = PASS

    def rows_sent(self, rank: int) -> int:
        """Return the bytes of rows and their gradients that went from `rank` to others."""
        return sum(sum(one.to_others(rank).values()) for one in self.sent if one.floating)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.sent.append(sent_by(func, args, self.part))
        return func(*args, **(kwargs or {}))


class ShapeTrace(CollectiveWatch):
    """Follows storage, work and traffic of what runs inside.

    Storage made inside is counted from its making to its end under a label: `activations` unless
    `label` or a collective (`exchange`) says otherwise. `work` holds, by part of the step, what
    each call costs; `fullest` is the part in which most was alive.
    """

    def __init__(self, *, known: Iterable[Tensor]) -> None:
        """Answer host reads with 0 null samples, and with `rows`, to be set, spread evenly.

        Args:
            known: tensors that are not counted.
        """
        super().__init__()
        self.rows = 0
        self.work: dict[str, list[Work]] = defaultdict(list)
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.fullest = PASS
        self._known: set[int] = set()
        self.know(known)
        self._storages: dict[int, tuple[str, int]] = {}
        self._answers: dict[int, int] = {}
        self._peak_bytes = 0

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors no longer."""
        self._known |= {storage_key(tensor) for tensor in tensors}

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count work and collectives of what runs inside under a part of the step."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def label(self, tensor: Tensor, label: str) -> Tensor:
        """Count a tensor's storage under another label from now on."""
        key = storage_key(tensor)
        if key in self._storages:
            old, size = self._storages[key]
            self.live[old] -= size
            self.live[label] += size
            self._storages[key] = (label, size)
            if self.live.total() == self._peak_bytes:
                self.peak = self.live.copy()
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _HOST_READ:
            return self._answers.pop(id(args[0]), 0)
        if func is _GROUPED_GEMM:
            return self._see(func, args, kwargs, _grouped_gemm_shape(*args, **kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d" and self.part == PASS:
            for tensor in tensors_in(args):
                self.label(tensor, "exchange")
        elif func.namespace in ("aten", LIBRARY):
            self._see(func, args, kwargs, result)
        if func is _UNBIND and not args[0].is_floating_point() and args[0].dim() == 1:
            # The entries of a list of counts will be read: the rows, evenly.
            share, more = divmod(self.rows, len(result))
            self._answers = {id(entry): share + (i < more) for i, entry in enumerate(result)}
        return result

    def _see(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Any:
        for tensor in tensors_in(result):
            key, storage = storage_key(tensor), tensor.untyped_storage()
            if key not in self._known and key not in self._storages:
                self._storages[key] = ("activations", storage.nbytes())
                self.live["activations"] += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        if (total := self.live.total()) > self._peak_bytes:
            self._peak_bytes, self.peak, self.fullest = total, self.live.copy(), self.part
        if (work := work_of(func, args, kwargs, result)) is not None:
            self.work[self.part].append(work)
        return result

    def _forget(self, key: int) -> None:
        label, size = self._storages.pop(key)
        self.live[label] -= size


def sent_by(func: Any, args: tuple, part: str = PASS) -> Sent:
    """Read what a collective operation of torch sends from its arguments."""
    name, tensors = operation_family(func).__name__, tensors_in(args)
    group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
    # An all-to-all and an all-gather name their output first.
    sent = tensors[1:] if name in ("alltoall_base_", "_allgather_base_") else tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in sent)
    if name != "alltoall_base_":
        return Sent(name.strip("_"), size, members, part=part)
    tensor, sizes = args[1], args[4]
    row = size // max(1, tensor.shape[0])
    counts = sizes or [tensor.shape[0] // len(members)] * len(members)
    by_member = tuple(count * row for count in counts)
    floating = tensor.is_floating_point()
    return Sent(name.strip("_"), size, members, by_member, floating, part)


def _grouped_gemm_shape(
    a: Tensor, b: Tensor, offs: Tensor | None = None, *unused: Any, **kwargs: Any
) -> Tensor:
    """Return a grouped product's result: torch's own shape function refuses fp32."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
