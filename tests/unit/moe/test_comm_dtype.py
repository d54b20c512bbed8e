"""Rows on their way: what bf16 and FP8 keep of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promoe_ds.moe.comm_dtype import COMM_DTYPES

from ..builders import random_tensor

each_way = pytest.mark.parametrize("is_gradient", [False, True])


def received(kind: str, rows: Tensor, *, is_gradient: bool) -> Tensor:
    """Return the rows as they arrive."""
    comm_dtype = COMM_DTYPES[kind]
    packed = comm_dtype.pack(rows, is_gradient=is_gradient)
    assert packed.shape[1] * packed.element_size() == comm_dtype.row_bytes(
        rows.shape[1], rows.element_size()
    )
    return comm_dtype.unpack(packed, rows.shape[1], rows.dtype, is_gradient=is_gradient)


@each_way
def test_comm_dtype_same_and_bf16_round_as_the_dtype_does(is_gradient: bool) -> None:
    rows = random_tensor(5, 16)
    assert received("same", rows, is_gradient=is_gradient) is rows
    found = received("bf16", rows, is_gradient=is_gradient)
    assert torch.equal(found, rows.bfloat16().float())


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_comm_dtype_fp8_error_is_half_a_step_of_each_number(
    is_gradient: bool, dtype: torch.dtype, size: float
) -> None:
    """Three bits of mantissa forward, two for gradients; numbers far below the row's largest lose
    more, but absolutely little.
    """
    rows = (random_tensor(64, 32) * size).to(dtype)
    found = received("fp8", rows, is_gradient=is_gradient)
    assert found.dtype == dtype
    step = 2**-3 if is_gradient else 2**-4
    floor = rows.float().abs().amax(dim=1, keepdim=True) * (
        2**-9 / 448 if not is_gradient else 2**-16 / 57344
    )
    rounding = 0 if dtype == torch.float32 else size * 2**-8
    assert (
        (found.float() - rows.float()).abs() <= 1.02 * step * rows.float().abs() + floor + rounding
    ).all()


@each_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_comm_dtype_fp8_row_not_finite_arrives_not_finite_and_alone(
    is_gradient: bool, bad: float
) -> None:
    rows = random_tensor(3, 8)
    rows[1, 2] = bad
    found = received("fp8", rows, is_gradient=is_gradient)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


@each_way
def test_comm_dtype_fp8_zero_rows_and_none(is_gradient: bool) -> None:
    assert not received("fp8", torch.zeros(2, 8), is_gradient=is_gradient).any()
    assert received("fp8", torch.zeros(0, 8), is_gradient=is_gradient).shape == (0, 8)
