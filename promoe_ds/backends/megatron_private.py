"""Stand-ins for what Megatron-core's MoE layer asks of CUDA, for processes without it: tests and laptops.

Three calls: the current device (buffers of its collectives), a stream for copies to the host (made with the all-to-all
dispatcher), and those copies. Nothing here runs in a process that has CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from promoe_ds.errors import ConfigError


@contextmanager
def cpu_construction() -> Iterator[None]:
    """Let a Megatron layer be built, and later run, in a process without CUDA.

    Raises: ConfigError where there is CUDA and the process runs on the CPU nevertheless.
    """
    if torch.cuda.is_available():
        raise ConfigError("parallel.dispatch=megatron on the CPU needs a process that sees no CUDA device: set "
                          "CUDA_VISIBLE_DEVICES= (empty), or leave DS_ACCELERATOR=cpu out to run on the GPU")
    torch.cuda.current_device = lambda: "cpu"
    before = MoEAlltoAllTokenDispatcher.cuda_dtoh_stream
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()  # None would make a stream
    try:
        yield
    finally:
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = before


def prepare_dispatcher(layer: MoELayer) -> None:
    """Replace this layer's copies from device to host, which go over a stream, by reading the numbers at once."""
    dispatcher = layer.token_dispatcher

    def read(point: str, tokens_per_expert: Tensor | None = None) -> Any:
        for name in ("input_splits", "output_splits"):
            if isinstance(splits := getattr(dispatcher, name), Tensor):
                setattr(dispatcher, name, splits.tolist())
        return tokens_per_expert

    if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        dispatcher._maybe_dtoh_and_synchronize = read
