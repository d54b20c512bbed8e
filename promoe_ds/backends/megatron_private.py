"""Every use of Megatron-core's insides in this package; `NAMES` is read as soon as this file is
imported.

Among them are stand-ins for what Megatron's MoE layer asks of CUDA, for processes without it: its
own modules, and nothing else in the process, see a current device that is the CPU; copies to the
host need no stream there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from promoe_ds import private_names
from promoe_ds.errors import ConfigError
from promoe_ds.private_names import check_names, find_private

_DISPATCHERS, _STATE = (
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.parallel_state",
)
#: Modules that ask for the current device: of the buffers of their collectives.
_ASK_FOR_DEVICE = ("megatron.core.tensor_parallel.mappings", "megatron.core.utils")
#: module -> attributes; a dot goes into a class.
NAMES = {
    _DISPATCHERS: (
        "MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    ),
    _STATE: ("_GLOBAL_MEMORY_BUFFER", "_set_global_memory_buffer"),
    **dict.fromkeys(_ASK_FOR_DEVICE, ("torch",)),
}
check_names(NAMES)
read_private = partial(private_names.read_private, library="megatron")
_AllToAllDispatcher: Any = find_private(_DISPATCHERS, "MoEAlltoAllTokenDispatcher")


class _TorchWithoutCuda:
    """Torch, but that the current device is the CPU."""

    cuda = SimpleNamespace(current_device=lambda: "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def cpu_construction() -> Iterator[None]:
    """Let a Megatron layer be built, and later run, in a process without CUDA.

    Raises: ConfigError where there is CUDA and the process runs on the CPU nevertheless.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "parallel.dispatch=megatron on the CPU needs a process that sees no CUDA device: set "
            "CUDA_VISIBLE_DEVICES= (empty), or leave DS_ACCELERATOR=cpu out to run on the GPU"
        )
    for module in _ASK_FOR_DEVICE:
        vars(sys.modules[module])["torch"] = _TorchWithoutCuda()
    before = _AllToAllDispatcher.cuda_dtoh_stream
    _AllToAllDispatcher.cuda_dtoh_stream = object()  # None would make a stream
    try:
        yield
    finally:
        _AllToAllDispatcher.cuda_dtoh_stream = before


def copy_without_stream(layer: Any) -> None:
    """Replace this layer's copies from device to host, which go over a stream, by reading the
    numbers at once.

    Raises: ConfigError naming library, version and attribute.
    """
    dispatcher = read_private(layer, "token_dispatcher")
    if not isinstance(dispatcher, _AllToAllDispatcher):
        return

    def read(point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        for name in ("input_splits", "output_splits"):
            if isinstance(splits := read_private(dispatcher, name), Tensor):
                setattr(dispatcher, name, splits.tolist())
        return tokens_per_expert

    dispatcher._maybe_dtoh_and_synchronize = read


def make_gather_buffer() -> None:
    """Make the buffer that Megatron's `allgather` gathers into; once a process."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
