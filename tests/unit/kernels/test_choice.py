"""Which code computes, by setting, dtype and device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from promoe_ds.kernels import choice

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "is_interpreted", "expected"),
    [
        ("auto", "cuda", BF16, False, True),
        ("auto", "cuda", FP32, False, False),
        ("auto", "cpu", BF16, True, False),
        ("triton", "cuda", FP32, False, True),
        ("triton", "cuda", FP64, False, False),
        ("triton", "cpu", FP32, True, True),
        ("triton", "cpu", FP32, False, False),
        ("eager", "cuda", BF16, True, False),
    ],
)
def test_triton_computes_where_it_is_asked_for_and_can_run(
    monkeypatch, kernels, device, dtype, is_interpreted, expected
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(is_interpreted)))
    monkeypatch.setattr(choice, "_is_installed", lambda: True)
    tensor: Any = SimpleNamespace(
        dtype=dtype, is_cuda=device == "cuda", device=torch.device(device)
    )
    assert choice.uses_triton(tensor, kernels) == expected
    monkeypatch.setattr(choice, "_is_installed", lambda: False)
    assert not choice.uses_triton(tensor, kernels)
