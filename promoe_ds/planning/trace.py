"""Watching a pass: what storage is alive when, what is computed, what is sent.

Modes see every operation of forward and backward pass. On fake tensors there are no values: where
the code reads some (how many samples are null, how many rows each rank gets), `ShapeTrace` answers
with what even routing would give.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from promoe_ds.torch_private import (
    changes_inputs,
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
#: Products of fused attention on a CPU, which torch's counter does not know.
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}


@dataclass(frozen=True)
class Sent:
    """One collective of this rank: its name, the bytes for each member of its group, the members.

    members: of an all-to-all; floating: whether it carries rows, not counts.
    """

    name: str
    bytes_by_member: tuple[int, ...]
    members: tuple[int, ...] = ()
    floating: bool = True

    def to_others(self, rank: int) -> dict[int, int]:
        """Return the bytes for each other member."""
        pairs = zip(self.members, self.bytes_by_member, strict=bool(self.members))
        return {member: size for member, size in pairs if member != rank}


class CollectiveWatch(_DispatchMode):
    """Notes every collective of what runs inside; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def rows_sent(self, rank: int) -> int:
        """Return the bytes of rows and their gradients that went from `rank` to others."""
        return sum(sum(one.to_others(rank).values()) for one in self.sent if one.floating)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.sent.append(_sent_by(func, args))
        return func(*args, **(kwargs or {}))


class ShapeTrace(CollectiveWatch):
    """Follows storage, work and traffic of what runs inside.

    Storage made inside is counted from its making to its end under a label: `activations` unless
    `label` or a collective (`exchange`) says otherwise. `work` holds, by kind (matrix, attention,
    other), the floating-point operations and the bytes read and written of each call.
    """

    def __init__(self, *, known: Iterable[Tensor]) -> None:
        """Answer host reads with 0 null samples, and with `rows`, to be set, spread evenly.

        Args:
            known: tensors that are not counted.
        """
        super().__init__()
        self.rows = 0
        self.work: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known = {storage_key(tensor) for tensor in known}
        self._storages: dict[int, tuple[str, int]] = {}
        self._answers: dict[int, int] = {}
        self._peak_bytes = 0

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
        if func.namespace == "c10d":
            for tensor in tensors_in(args):
                self.label(tensor, "exchange")
        elif func.namespace == "aten":
            self._see(func, args, kwargs, result)
        if func is _UNBIND and not args[0].is_floating_point() and args[0].dim() == 1:
            # The entries of a list of counts will be read: the rows, evenly.
            share, more = divmod(self.rows, len(result))
            self._answers = {id(entry): share + (i < more) for i, entry in enumerate(result)}
        return result

    def _see(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Any:
        outputs, inputs = tensors_in(result), tensors_in((args, kwargs))
        for tensor in outputs:
            key, storage = storage_key(tensor), tensor.untyped_storage()
            if key not in self._known and key not in self._storages:
                self._storages[key] = ("activations", storage.nbytes())
                self.live["activations"] += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        if (total := self.live.total()) > self._peak_bytes:
            self._peak_bytes, self.peak = total, self.live.copy()
        read = {storage_key(tensor) for tensor in inputs}
        is_view = not changes_inputs(func) and all(
            storage_key(tensor) in read for tensor in outputs
        )
        if outputs and not is_view:
            unique = {id(tensor): tensor for tensor in inputs + outputs}.values()
            kind, flops = _flops(func, args, kwargs, result)
            self.work[kind].append((flops, sum(t.numel() * t.element_size() for t in unique)))
        return result

    def _forget(self, key: int) -> None:
        label, size = self._storages.pop(key)
        self.live[label] -= size


def _sent_by(func: Any, args: tuple) -> Sent:
    """Read what a collective operation of torch sends from its arguments."""
    name = operation_family(func).__name__
    if name != "alltoall_base_":
        return Sent(name, (sum(t.numel() * t.element_size() for t in tensors_in(args)),))
    _, tensor, group, _, sizes = args[:5]
    members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
    row = math.prod(tensor.shape[1:]) * tensor.element_size()
    counts = sizes or [tensor.shape[0] // len(members)] * len(members)
    return Sent(
        name, tuple(count * row for count in counts), members, floating=tensor.is_floating_point()
    )


def _grouped_gemm_shape(
    a: Tensor, b: Tensor, offs: Tensor | None = None, *unused: Any, **kwargs: Any
) -> Tensor:
    """Return a grouped product's result: torch's own shape function refuses fp32."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


def _flops(func: Any, args: tuple, kwargs: dict, result: Any) -> tuple[str, int]:
    """Return the kind of an operation and its floating-point operations."""
    family = operation_family(func)
    name = family.__name__
    if func is _GROUPED_GEMM:
        return "matrix", 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
    if name in _ATTENTION:
        heads = args[1] if name.endswith("backward") else args[0]
        batch, num_heads, tokens, width = heads.shape
        return "attention", _ATTENTION[name] * 2 * batch * num_heads * tokens * tokens * width
    counter = flop_registry.get(family)
    if counter is None:
        return "other", 0
    kind = "attention" if "attention" in name else "matrix"
    return kind, counter(*args, **kwargs, out_val=result)
