"""Which code computes: Triton's programs or plain torch operations."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


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
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensor.dtype
    if kernels == "auto" and not (tensor.is_cuda and dtype == torch.bfloat16):
        return False
    return can_run(tensor.device)
