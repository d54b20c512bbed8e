"""Which code computes: Triton's programs or plain torch operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_IS_PLANNED = ContextVar("is_planned", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Choose as on a GPU with Triton, on tensors without values."""
    token = _IS_PLANNED.set(True)
    try:
        yield
    finally:
        _IS_PLANNED.reset(token)


def can_run(device: torch.device) -> bool:
    """Return whether Triton's programs run on a device: a GPU's kernels, or, in Triton's
    interpreter (TRITON_INTERPRET=1), on any.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or is_interpreted) and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


def uses_triton(tensor: Tensor, kernels: str) -> bool:
    """Return whether Triton's programs compute on `tensor` under `parallel.kernels`.

    auto: for bf16 on CUDA; triton: for any dtype but fp64; wherever they can run. A network that
    was trained with them computes with plain operations where they cannot.
    """
    if kernels == "eager" or tensor.dtype == torch.float64:
        return False
    is_planned, device = _IS_PLANNED.get(), tensor.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
    is_on_gpu = tensor.is_cuda or is_planned
    if kernels == "auto" and not (is_on_gpu and dtype == torch.bfloat16):
        return False
    return is_planned or can_run(tensor.device)
