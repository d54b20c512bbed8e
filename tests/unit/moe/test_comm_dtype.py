"""Rows on their way: what bf16 and FP8 keep of them."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.moe.comm_dtype import COMM_DTYPES, SAME

from ..builders import random_tensor

each_way = pytest.mark.parametrize("is_gradient", [False, True])


@each_way
def test_wire_same_and_bf16_round_as_the_dtype_does(is_gradient: bool) -> None:
    rows = random_tensor(5, 16)
    assert (
        SAME.unpack(
            SAME.pack(rows, is_gradient=is_gradient), 16, rows.dtype, is_gradient=is_gradient
        )
        is rows
    )
    wire = COMM_DTYPES["bf16"]
    found = wire.unpack(
        wire.pack(rows, is_gradient=is_gradient), 16, torch.float32, is_gradient=is_gradient
    )
    assert torch.equal(found, rows.bfloat16().float())


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_wire_fp8_error_is_half_a_step_of_each_number(
    is_gradient: bool, dtype: torch.dtype, size: float
) -> None:
    """Three bits of mantissa forward, two for gradients; numbers far below the row's largest lose
    more, but absolutely little.
    """
    rows = (random_tensor(64, 32) * size).to(dtype)
    packed = COMM_DTYPES["fp8"].pack(rows, is_gradient=is_gradient)
    assert (packed.dtype, packed.shape) == (torch.uint8, (64, COMM_DTYPES["fp8"].row_bytes(32, 4)))
    found = COMM_DTYPES["fp8"].unpack(packed, 32, dtype, is_gradient=is_gradient)
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
def test_wire_fp8_row_not_finite_arrives_not_finite_and_alone(
    is_gradient: bool, bad: float
) -> None:
    rows = random_tensor(3, 8)
    rows[1, 2] = bad
    found = COMM_DTYPES["fp8"].unpack(
        COMM_DTYPES["fp8"].pack(rows, is_gradient=is_gradient),
        8,
        rows.dtype,
        is_gradient=is_gradient,
    )
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


@each_way
def test_wire_fp8_zero_rows_and_none(is_gradient: bool) -> None:
    wire = COMM_DTYPES["fp8"]
    assert not wire.unpack(
        wire.pack(torch.zeros(2, 8), is_gradient=is_gradient),
        8,
        torch.float32,
        is_gradient=is_gradient,
    ).any()
    empty = wire.pack(torch.zeros(0, 8), is_gradient=is_gradient)
    assert wire.unpack(empty, 8, torch.float32, is_gradient=is_gradient).shape == (0, 8)
