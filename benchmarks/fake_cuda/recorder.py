"""A mode that notes what a GPU would be asked to do, and where in the code."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from promoe_ds.planning.trace import Sent, sent_by
from promoe_ds.planning.work import Work, work_of
from promoe_ds.torch_private import tensors_in

_ROOT = f"{Path(__file__).resolve().parents[2]}/"
#: Libraries whose code is named where it asks for something, beside this package's.
_LIBRARIES = ("deepspeed/", "megatron/", "transformer_engine/")
#: Our own names of torch's operations.
_HELPERS = f"{_ROOT}promoe_ds/torch_private.py"
#: Their wrappers, which say nothing about who asks.
_WRAPPERS = ("deepspeed/comm/", "deepspeed/accelerator/", "deepspeed/utils/")
_LONGEST_CHAIN = 2
_HOST_READ = torch.ops.aten._local_scalar_dense.default
#: Its result's size is read by the host.
_SELECT = torch.ops.aten.masked_select.default
#: Who reads the most rows of an expert.
_CAPACITY = "moe/sharded_moe.py:MOELayer.forward"


class Place(NamedTuple):
    """Where something was asked: files and functions from the innermost out, and the line."""

    name: str
    line: str

    @property
    def file(self) -> str:
        """The innermost file, relative to the repository or to site-packages."""
        return self.name.partition(":")[0]


class Call(NamedTuple):
    """One operation: what it costs, and the shapes of what it takes and makes."""

    name: str
    work: Work
    place: Place
    is_backward: bool
    shapes: tuple[tuple[int, ...], ...]


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
        self.sent: list[tuple[Sent, Place]] = []
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
        place = self._place(node)
        if not any(tensor.device.type == "cuda" for tensor in tensors_in((args, kwargs, result))):
            return
        if func.namespace == "c10d":
            self.sent.append((sent_by(func, args), place))
        elif (way := _between_devices(name, args, result)) is not None:
            self.copies[way, place] += 1
        elif (work := work_of(func, args, kwargs, result)) is not None:
            shapes = tuple(tuple(tensor.shape) for tensor in tensors_in((args, kwargs, result)))
            self.calls.append(Call(name, work, place, node is not None, shapes))

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
        if path == _HELPERS:
            pass
        elif path.startswith(_ROOT + "promoe_ds/"):
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
