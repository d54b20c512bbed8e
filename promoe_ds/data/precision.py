"""Frozen networks compute in the precision of their type: cuDNN would round fp32 convolutions to TF32, without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Whether figures and pixels are computed with TF32, for the files that state how they came about.
TF32 = False


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolve and multiply fp32 in fp32; what the process had set holds again afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = TF32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
