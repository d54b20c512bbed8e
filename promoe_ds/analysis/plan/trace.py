"""Watching a pass over shapes: what storage lives when, what is computed, what is sent.

The mode sees every operation of forward and backward pass on fake tensors. It holds no values: where the code reads some
(how many samples are null, how many rows each rank gets), it answers with what even routing would give.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_HOST_READ = torch.ops.aten._local_scalar_dense.default
_UNBIND = torch.ops.aten.unbind.int
_GROUPED_GEMM = torch.ops.aten._grouped_mm.default
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu": 2, "_scaled_dot_product_flash_attention_for_cpu_backward": 5}


@dataclass
class Work:
    """Operations of one kind: floating-point operations and bytes read and written, a pair for each call."""

    calls: list[tuple[int, int]] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of all calls."""
        return sum(flops for flops, _ in self.calls)


@dataclass(frozen=True)
class Sent:
    """One collective of this rank: its name, the bytes for each member of its group, the members.

    rows: whether its parts have sizes of their own, as rows of tokens do; floating: whether it carries fractions, not counts.
    """

    name: str
    bytes_by_member: tuple[int, ...]
    members: tuple[int, ...]
    rows: bool
    floating: bool


class ShapeTrace(TorchDispatchMode):
    """Follows storage, work and traffic of what runs inside.

    Storage made inside is counted from its making to its end under a label: `activations` unless `label` or a collective
    (`exchange`) says otherwise.
    """

    def __init__(self, *, null_samples: int, known: Iterable[Tensor]) -> None:
        """Answer host reads with `null_samples`, and with `rows`, to be set, spread evenly; `known` tensors are not counted."""
        super().__init__()
        self.null_samples, self.rows = null_samples, 0
        self.work: dict[str, Work] = defaultdict(Work)
        self.sent: list[Sent] = []
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known = {_key(tensor) for tensor in known}
        self._storages: dict[int, tuple[str, int]] = {}
        self._answers: dict[int, int] = {}
        self._peak_bytes = 0

    def label(self, tensor: Tensor, label: str) -> Tensor:
        """Count a tensor's storage under another label from now on."""
        key = _key(tensor)
        if key in self._storages:
            old, size = self._storages[key]
            self.live[old] -= size
            self.live[label] += size
            self._storages[key] = (label, size)
            if self.live.total() == self._peak_bytes:
                self.peak = self.live.copy()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _HOST_READ:
            return self._answers.pop(id(args[0]), self.null_samples)
        if func is _GROUPED_GEMM:
            result = _grouped_gemm_shape(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._see_collective(func, args)
        elif func.namespace == "aten":
            self._see_storage(result)
            self._see_work(func, args, kwargs, result)
        if func is _UNBIND and not args[0].is_floating_point() and args[0].dim() == 1:
            self._expect_reads(result)
        return result

    def _expect_reads(self, entries: tuple[Tensor, ...]) -> None:
        """Prepare answers for the entries of a list of counts: the rows, evenly."""
        share, more = divmod(self.rows, len(entries))
        self._answers = {id(entry): share + (index < more) for index, entry in enumerate(entries)}

    def _see_storage(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            key = _key(tensor)
            if key in self._known or key in self._storages:
                continue
            storage = tensor.untyped_storage()
            self._storages[key] = ("activations", storage.nbytes())
            self.live["activations"] += storage.nbytes()
            weakref.finalize(storage, self._forget, key)
        if (total := self.live.total()) > self._peak_bytes:
            self._peak_bytes, self.peak = total, self.live.copy()

    def _forget(self, key: int) -> None:
        label, size = self._storages.pop(key)
        self.live[label] -= size

    def _see_work(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        read = {_key(tensor) for tensor in inputs}
        in_place = func._schema.is_mutable
        if not outputs or (not in_place and all(_key(tensor) in read for tensor in outputs)):
            return  # a view
        moved = sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in inputs + outputs}.values())
        name = func._overloadpacket.__name__
        kind, flops = _flops(func, name, args, kwargs, result)
        self.work[kind].calls.append((flops, moved))

    def _see_collective(self, func: Any, args: tuple) -> None:
        for tensor in tree_leaves(args):
            if isinstance(tensor, Tensor):
                self.label(tensor, "exchange")
        self.sent.append(sent_by(func, args))


class CollectiveWatch(TorchDispatchMode):
    """Notes every collective of what runs inside, forward and backward; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.sent.append(sent_by(func, args))
        return func(*args, **(kwargs or {}))


def sent_by(func: Any, args: tuple) -> Sent:
    """Read what a collective operation of torch sends from its arguments."""
    name = func._overloadpacket.__name__
    if name != "alltoall_base_":
        tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        return Sent(name, (sum(t.numel() * t.element_size() for t in tensors),), (), rows=False,
                    floating=any(t.is_floating_point() for t in tensors))
    _, tensor, group, _, sizes = args[:5]
    members = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
    row = math.prod(tensor.shape[1:]) * tensor.element_size()
    counts = sizes or [tensor.shape[0] // len(members)] * len(members)
    return Sent(name, tuple(count * row for count in counts), members, rows=bool(sizes),
                floating=tensor.is_floating_point())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _grouped_gemm_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *unused: Any, **kwargs: Any) -> Tensor:
    """Return a grouped product's result: torch's own shape function refuses fp32."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


def _flops(func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> tuple[str, int]:
    """Return the kind of an operation (matrix, attention, other) and its floating-point operations."""
    if func is _GROUPED_GEMM:
        return "matrix", 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
    if name in _ATTENTION:
        heads = args[1] if name.endswith("backward") else args[0]
        batch, num_heads, tokens, width = heads.shape
        return "attention", _ATTENTION[name] * 2 * batch * num_heads * tokens * tokens * width
    counter = flop_registry.get(func._overloadpacket)
    if counter is None:
        return "other", 0
    return ("attention" if "attention" in name else "matrix"), counter(*args, **kwargs, out_val=result)
