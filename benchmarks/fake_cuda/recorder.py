"""A mode that notes what a GPU would be asked to do, and where in the code."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ROOT = f"{Path(__file__).resolve().parents[2]}/"
#: Libraries whose code is named where it asks for something, beside this package's.
_LIBRARIES = ("deepspeed/", "megatron/", "transformer_engine/")
#: Their wrappers, which say nothing about who asks.
_WRAPPERS = ("deepspeed/comm/", "deepspeed/accelerator/", "deepspeed/utils/")
_LONGEST_CHAIN = 2
_HOST_READ = torch.ops.aten._local_scalar_dense.default
#: Its result's size is read by the host.
_SELECT = torch.ops.aten.masked_select.default
#: Who reads the most rows of an expert.
_CAPACITY = "moe/sharded_moe.py:MOELayer.forward"
#: Make a tensor without writing it, or change its shape alone.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_NO_KERNEL |= {"set_", "record_stream"}
#: Write their result without reading what was there.
_OVERWRITE = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "uniform_", "normal_"}
#: Touch as much of the indexed tensor as they bring or take.
_ADD_ROWS = {"index_add_", "scatter_add_", "index_put_", "index_copy_"}
_TAKE_ROWS = {"index_select", "gather", "embedding", "index", "select_rows"}
#: Kernels of operations that are several.
_KERNELS = {"sort": 6, "argsort": 6, "index_put_": 3, "embedding_dense_backward": 6}
_KERNELS |= {"_grouped_mm": 2, "topk": 2, "repeat_interleave": 3}
_KERNELS |= {"sum_by_expert": 2, "sum_groups": 2, "cosine_backward": 2}
_KERNELS |= {"sort_choices": 2}
_KERNELS |= {"modulated_norm_backward": 2, "residual_norm_backward": 2}
_KERNELS |= {"gated_residual_backward": 2, "bias_gelu_backward": 2, "join_heads": 2}


class Place(NamedTuple):
    """Where something was asked: files and functions from the innermost out, and the line."""

    name: str
    line: str

    @property
    def file(self) -> str:
        """The innermost file, relative to the repository or to site-packages."""
        return self.name.partition(":")[0]


class Call(NamedTuple):
    """One operation: its kernels, the bytes that it reads and writes, its FLOPs."""

    name: str
    dtype: str
    kernels: int
    bytes: int
    flops: int
    place: Place
    is_backward: bool


@dataclass(frozen=True)
class Sent:
    """One collective: the bytes that this rank puts into it, the ranks of its group."""

    name: str
    bytes: int
    ranks: int
    place: Place


class Recorder(TorchDispatchMode):
    """Notes kernels, bytes, FLOPs, host reads, copies, waits and collectives while `is_on`.

    Fake tensors have no values: a read of one number gets 0 (no null sample, nothing that is not
    finite), a read of counts gets `rows`, to be set, spread evenly. `expert_rows`, to be set, are
    those of one expert.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_on, self.rows, self.expert_rows = False, 0, 0
        self.calls: list[Call] = []
        self.sent: list[Sent] = []
        self.reads: Counter[Place] = Counter()
        self.waits: Counter[tuple[str, Place]] = Counter()
        self.copies: Counter[tuple[str, Place]] = Counter()
        self.events: set[Any] = set()
        self._makers: dict[int, Place] = {}

    def note_wait(self, what: str) -> None:
        """Note that the host waits for an event, a stream or the device."""
        if self.is_on:
            self.waits[what, _here()] += 1

    def read_list(self, tensor: Tensor) -> list[Any]:
        """Note one read of a whole tensor and return values that fit: see the class."""
        self._note_read(tensor)
        share, more = divmod(self.rows, tensor.shape[-1])
        is_count = not tensor.is_floating_point() and tensor.dtype != torch.bool
        row = [(share + (i < more)) if is_count else 0 for i in range(tensor.shape[-1])]
        return [list(row) for _ in range(len(tensor))] if tensor.dim() == 2 else row

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _HOST_READ:
            is_capacity = _CAPACITY in self._note_read(args[0]).name
            return self.expert_rows if is_capacity else _zero(args[0])
        if func is _SELECT:
            self._note_read(args[0])
            result = args[0].new_empty(self.rows)
        else:
            result = func(*args, **kwargs)
        if func.namespace != "prim" and self.is_on:
            self._note(func, args, kwargs, result)
        return result

    def _note_read(self, tensor: Tensor) -> Place:
        place = _here()
        if self.is_on and tensor.device.type == "cuda":
            self.reads[place] += 1
        return place

    def _note(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name, node = func._overloadpacket.__name__, torch._C._current_autograd_node()
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        place = self._place(node)
        if not any(tensor.device.type == "cuda" for tensor in inputs + outputs):
            return
        if func.namespace == "c10d":
            self.sent.append(_sent(name, args, inputs, place))
        elif (way := _between_devices(name, args, result)) is not None:
            self.copies[way, place] += 1
        elif _runs(func, name, inputs, outputs):
            dtype = str(inputs[0].dtype if inputs else outputs[0].dtype).removeprefix("torch.")
            moved = _bytes_moved(func, name, args, kwargs, inputs, outputs)
            flops = _flops(func, args, kwargs, result)
            kernels = _KERNELS.get(name, 1)
            self.calls.append(Call(name, dtype, kernels, moved, flops, place, node is not None))

    def _place(self, node: Any) -> Place:
        """Return where an operation was asked: in the backward pass, without a frame of ours, where
        the forward pass made the node.
        """
        here = _here()
        if node is None:
            # The node of this operation, if it has one, was the last to be made; numbers are those
            # of the thread, and the backward pass has its own.
            self._makers.setdefault(torch._C._autograd._get_sequence_nr() - 1, here)
            return here
        return here if here.name else self._makers.get(node._sequence_nr(), here)


def _here() -> Place:
    """Return the innermost frames of libraries, out to the first of this package."""
    names, line = [], ""
    for file, frame in _frames():
        function = frame.f_code.co_qualname.partition(".<locals>")[0]
        line = line or f"{file}:{frame.f_lineno}"
        if f"{file}:{function}" not in names:
            names.append(f"{file}:{function}")
        if file.startswith("promoe_ds/") or len(names) == _LONGEST_CHAIN:
            break
    return Place(" < ".join(names), line)


def _frames() -> Iterator[tuple[str, Any]]:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        inside = path.rpartition("site-packages/")[2]
        if path.startswith(_ROOT + "promoe_ds/"):
            yield path.removeprefix(_ROOT), frame
        elif (
            inside is not path
            and inside.startswith(_LIBRARIES)
            and not inside.startswith(_WRAPPERS)
        ):
            yield inside, frame
        frame = frame.f_back


def _zero(tensor: Tensor) -> float | int:
    return 0.0 if tensor.is_floating_point() else 0


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _sent(name: str, args: tuple, inputs: list[Tensor], place: Place) -> Sent:
    group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
    # An all-to-all and an all-gather name their output first.
    sent = inputs[1:] if name in ("alltoall_base_", "_allgather_base_") else inputs
    size = sum(tensor.numel() * tensor.element_size() for tensor in sent)
    return Sent(name.strip("_"), size, dist.get_world_size(group), place)


def _between_devices(name: str, args: tuple, result: Any) -> str | None:
    """Return which way a copy between host and device goes; None for any other operation."""
    if name not in ("copy_", "_to_copy"):
        return None
    source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
    if source.device.type == target.device.type:
        return None
    if source.device.type == "cuda":
        return "device to host"
    return "pinned host to device" if source.is_pinned() else "pageable host to device"


def _runs(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether an operation needs a kernel: it writes, or makes new storage."""
    if name in _NO_KERNEL or (not outputs and not func._schema.is_mutable):
        return False
    read = {tensor.untyped_storage()._cdata for tensor in inputs}
    makes = any(tensor.untyped_storage()._cdata not in read for tensor in outputs)
    return makes or func._schema.is_mutable


def _bytes_moved(
    func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]
) -> int:
    if name in _TAKE_ROWS:
        return 2 * _size(outputs)
    if not func._schema.is_mutable:
        return sum(map(_distinct_bytes, inputs)) + _size(outputs)
    moved, positional = 0, dict(enumerate(args))
    for index, argument in enumerate(func._schema.arguments):
        tensors = _tensors(positional.get(index, kwargs.get(argument.name)))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if not is_written:
            moved += sum(map(_distinct_bytes, tensors)) * (2 if name in _ADD_ROWS else 1)
        elif name not in _ADD_ROWS:
            moved += _size(tensors) * (1 if name in _OVERWRITE or argument.kwarg_only else 2)
    return moved


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that is read; expanded dimensions count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count


def _flops(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    if func._overloadpacket is torch.ops.aten._grouped_mm:
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
    counter = flop_registry.get(func._overloadpacket)
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=result))
