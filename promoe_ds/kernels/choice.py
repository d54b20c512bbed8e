"""Which code computes: Triton's programs or plain torch operations."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

#: Values of `parallel.kernels`.
KERNELS = ("auto", "eager", "triton")


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def uses_triton(tensor: Tensor, kernels: str) -> bool:
    """Return whether Triton's programs compute on `tensor` under `parallel.kernels`.

    auto: for bf16 on CUDA where Triton is installed. "triton" takes them for any dtype but fp64 and
    on any device; on a CPU they need Triton's interpreter (TRITON_INTERPRET=1).
    """
    if kernels == "eager" or tensor.dtype == torch.float64:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensor.dtype
    return kernels == "triton" or (tensor.is_cuda and dtype == torch.bfloat16 and has_triton())
