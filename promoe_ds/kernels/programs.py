"""Triton programs of `promoe_ds.kernels.ops`; they read and write bf16 and compute in fp32.

Letters: T tokens, D width, N rows sorted by expert, E experts, F hidden width, K rows of a token.
`ends_E` are the running sums of rows per expert. `order_N` and `starts_T` list the rows of token t:
order_N[starts_T[t] : starts_T[t + 1]]. A block of columns is a power of two; those beyond the width
are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expert_of(row, ends_E, E: tl.constexpr):
    """Return the expert of a row, or of each of a block of rows, by its place among the ends."""
    expert = row * 0
    for index in tl.static_range(E):
        expert += (row >= tl.load(ends_E + index)).to(expert.dtype)
    return expert


@triton.jit
def _gelu_tanh(x):
    """Return gelu_tanh(x) and its derivative."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope


@triton.jit
def combine(
    rows_ND,
    gates_N,
    base_TD,
    order_N,
    starts_T,
    out_TD,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    """out[t] = base[t] + sum over t's rows of gate * row. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        total += tl.load(base_TD + token * D + column, mask=inside, other=0.0).to(tl.float32)
    for index in range(tl.load(starts_T + token), tl.load(starts_T + token + 1)):
        place = tl.load(order_N + index)
        row = tl.load(rows_ND + place * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATES:
            row *= tl.load(gates_N + place)
        total += row
    tl.store(out_TD + token * D + column, total.to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward(
    grad_TD,
    rows_ND,
    gates_N,
    token_ids_N,
    grad_rows_ND,
    grad_gates_N,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_row = gate * grad[token], grad_gate = <grad[token], row>. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    token = tl.load(token_ids_N + row)
    grad = tl.load(grad_TD + token * D + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(rows_ND + row * D + column, mask=inside, other=0.0).to(tl.float32)
    grad_row = (grad * tl.load(gates_N + row)).to(grad_rows_ND.dtype.element_ty)
    tl.store(grad_rows_ND + row * D + column, grad_row, mask=inside)
    tl.store(grad_gates_N + row, tl.sum(grad * value, 0))


@triton.jit
def add_bias(
    pre_RF,
    bias_EF,
    ends_E,
    out_RF,
    R,
    F: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GELU: tl.constexpr,
    HAS_ENDS: tl.constexpr,
):
    """out = pre + bias of the row's expert, or gelu_tanh of it; out may be pre. Without ends all
    rows are of one expert. One program a block of rows and columns.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = row * 0
    if HAS_ENDS:
        expert = _expert_of(row, ends_E, E)
    inside = (row < R)[:, None] & (column < F)[None, :]
    at = row[:, None] * F + column[None, :]
    value = tl.load(pre_RF + at, mask=inside, other=0.0).to(tl.float32)
    bias_at = bias_EF + expert[:, None] * F + column[None, :]
    value += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_GELU:
        value, _ = _gelu_tanh(value)
    tl.store(out_RF + at, value.to(out_RF.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward(
    grad_RF,
    pre_RF,
    bias_EF,
    ends_E,
    grad_pre_RF,
    partial_PEF,
    R,
    F: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ENDS: tl.constexpr,
):
    """grad_pre = grad * gelu'(pre + bias), and for each part of the expert's rows its sum, the
    bias's gradient. One program an expert, a block of columns and a part; as `add_bias`.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    within = column < F
    bias = tl.load(bias_EF + expert * F + column, mask=within, other=0.0).to(tl.float32)
    begin, end = 0, R
    if HAS_ENDS:
        begin = tl.load(ends_E + tl.maximum(expert - 1, 0)) * (expert > 0)
        end = tl.load(ends_E + expert)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin + part * ROWS, end, PARTS * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < end)[:, None] & within[None, :]
        at = row[:, None] * F + column[None, :]
        value = tl.load(pre_RF + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        _, slope = _gelu_tanh(value)
        grad = tl.load(grad_RF + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(grad_pre_RF + at, grad.to(grad_pre_RF.dtype.element_ty), mask=inside)
        total += tl.sum(tl.where(inside, grad, 0.0), 0)
    tl.store(partial_PEF + (part * E + expert) * F + column, total, mask=within)


@triton.jit
def sum_rows_by_expert(
    rows_D,
    ids_N,
    ends_E,
    partial_PED,
    D: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Sum each expert's rows, given themselves or by their ids among rows_D. One program an expert,
    a block of columns and a part of the rows; the parts are summed afterwards.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    within = column < D
    begin = tl.load(ends_E + tl.maximum(expert - 1, 0)) * (expert > 0)
    end = tl.load(ends_E + expert)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin + part * ROWS, end, PARTS * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        has = row < end
        if HAS_IDS:
            row = tl.load(ids_N + row, mask=has, other=0)
        at = row[:, None] * D + column[None, :]
        inside = has[:, None] & within[None, :]
        total += tl.sum(tl.load(rows_D + at, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(partial_PED + (part * E + expert) * D + column, total, mask=within)


@triton.jit
def spread_to_tokens(
    values_ED,
    order_N,
    starts_T,
    ends_E,
    base_TD,
    more_TD,
    out_TD,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BASES: tl.constexpr,
):
    """out[t] = sum of the values of the experts of t's rows, plus base[t] and more[t], of which
    there are BASES; rows behind the last expert's have no values. One program a token.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    if BASES > 0:
        total += tl.load(base_TD + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if BASES > 1:
        total += tl.load(more_TD + token * D + column, mask=inside, other=0.0).to(tl.float32)
    for index in range(tl.load(starts_T + token), tl.load(starts_T + token + 1)):
        expert = _expert_of(tl.load(order_N + index), ends_E, E)
        total += tl.load(values_ED + expert * D + column, mask=inside & (expert < E), other=0.0)
    tl.store(out_TD + token * D + column, total.to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts(partial_QPN, out_QN, PARTS, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of the parts. One program a block of numbers and a quantity."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    quantity = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, PARTS, ROWS):
        part = first + tl.arange(0, ROWS)
        at = (quantity * PARTS + part)[:, None] * N + number[None, :]
        inside = (part < PARTS)[:, None] & (number < N)[None, :]
        total += tl.sum(tl.load(partial_QPN + at, mask=inside, other=0.0), 0)
    tl.store(out_QN + quantity * N + number, total.to(out_QN.dtype.element_ty), mask=number < N)
