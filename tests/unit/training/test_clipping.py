"""The gradient norm against torch's own, on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from promoe_ds.training.clipping import global_grad_norm

from ..builders import random_tensor

SHAPES = [(4, 3), (5,), (2, 3, 2)]
#: Squares are added in another order than torch's norm of norms.
FLOAT32 = {"rtol": 1e-6, "atol": 0.0}


def parameters() -> list[nn.Parameter]:
    values = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for seed, parameter in enumerate(values):
        parameter.grad = random_tensor(*parameter.shape, seed=seed)
    return values


@pytest.mark.parametrize("without_gradient", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("experts", [(), (2,), (0, 1, 2)])
def test_norm_without_group_equals_that_of_torch(
    experts: tuple[int, ...], without_gradient: tuple[int, ...]
) -> None:
    values = parameters()
    for i in experts:
        values[i].allreduce = False
    for i in without_gradient:
        values[i].grad = None
    norm = global_grad_norm(values, None)
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(values, 1e9), **FLOAT32)


def test_norm_of_bf16_gradients_is_formed_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    norm = global_grad_norm([parameter], None)
    assert norm.dtype == torch.float32 and norm == 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_of_non_finite_gradient_is_not_finite(bad: float) -> None:
    values = parameters()
    values[2].grad[0, 0, 0] = bad
    assert not global_grad_norm(values, None).isfinite()
