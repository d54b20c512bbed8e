"""Triton programs of a block's dense lines and of the update; as `promoe_ds.kernels.programs`.

Letters: B images, S tokens per image, T = B*S, D width, N numbers of a flat tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw(
    weights_N,
    exp_avg_N,
    exp_avg_sq_N,
    grad_N,
    out_N,
    averages_N,
    more_averages_N,
    scalars,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    pull,
    more_pull,
    N,
    AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One AdamW update of fp32 weights from a gradient of any dtype; up to two moving averages
    follow, and the weights are written in the dtype of `out`. scalars: whether to skip, the divisor
    of the gradient, 1 - beta1^t, sqrt(1 - beta2^t). One program a block.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(scalars) == 0.0, N, 0)
    grad = tl.load(grad_N + at, mask=inside, other=0.0).to(tl.float32) / tl.load(scalars + 1)
    weights = tl.load(weights_N + at, mask=inside, other=0.0) * (1.0 - lr * weight_decay)
    exp_avg = tl.load(exp_avg_N + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_N + at, mask=inside, other=0.0)
    exp_avg += (grad - exp_avg) * (1.0 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1.0 - beta2)
    denominator = tl.sqrt(exp_avg_sq) / tl.load(scalars + 3) + eps
    weights -= lr / tl.load(scalars + 2) * exp_avg / denominator
    tl.store(exp_avg_N + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_N + at, exp_avg_sq, mask=inside)
    tl.store(weights_N + at, weights, mask=inside)
    tl.store(out_N + at, weights.to(out_N.dtype.element_ty), mask=inside)
    if AVERAGES > 0:
        average = tl.load(averages_N + at, mask=inside, other=0.0)
        tl.store(averages_N + at, average + (weights - average) * pull, mask=inside)
    if AVERAGES > 1:
        average = tl.load(more_averages_N + at, mask=inside, other=0.0)
        tl.store(more_averages_N + at, average + (weights - average) * more_pull, mask=inside)


@triton.jit
def _normalised(x, inside, D: tl.constexpr, EPS: tl.constexpr, IS_CENTRED: tl.constexpr):
    """Return a row, without its mean if centred, divided by the root of its mean square, and one
    over that root.
    """
    centred = x
    if IS_CENTRED:
        centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * inverse, inverse


@triton.jit
def modulated_norm(
    x_TD,
    gate_BD,
    y_TD,
    shift_BD,
    scale_BD,
    sum_TD,
    out_TD,
    stride,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """out = normalised x * (1 + scale of the image) + shift; with a residual line, x is first x +
    gate * y, which is written to `sum`. One program a token; `stride` is that of the images of
    gate, shift and scale.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at, in_image = token * D + column, token // S * stride + column
    x = tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_BD + in_image, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_BD + in_image, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        gate = tl.load(gate_BD + in_image, mask=inside, other=0.0).to(tl.float32)
        x += gate * tl.load(y_TD + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_TD.dtype.element_ty)
        tl.store(sum_TD + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normalised, _ = _normalised(x, inside, D, EPS, IS_CENTRED)
    result = normalised * (1.0 + scale) + shift
    tl.store(out_TD + at, result.to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def modulated_norm_backward(
    grad_TD,
    base_TD,
    x_TD,
    gate_BD,
    y_TD,
    scale_BD,
    grad_x_TD,
    grad_y_TD,
    partial_QPBD,
    stride,
    S,
    B,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """grad_x = base + the norm's gradient, grad_y = gate * grad_x, and for each part of an image's
    tokens the sums of those of shift, scale and gate. One program an image and part: it walks
    through its tokens. x is what was normalised.
    """
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    in_image = image * stride + column
    scale = tl.load(scale_BD + in_image, mask=inside, other=0.0).to(tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    if HAS_RESIDUAL:
        gate = tl.load(gate_BD + in_image, mask=inside, other=0.0).to(tl.float32)
        of_gate = tl.zeros((BLOCK,), tl.float32)
    for place in range(part, S, PARTS):
        at = (image * S + place) * D + column
        x = tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_TD + at, mask=inside, other=0.0).to(tl.float32)
        normalised, inverse = _normalised(x, inside, D, EPS, IS_CENTRED)
        of_shift += grad
        of_scale += grad * normalised
        inner = grad * (1.0 + scale)
        along = tl.sum(inner * normalised, 0) / D
        if IS_CENTRED:
            inner -= tl.sum(inner, 0) / D
        total = (inner - normalised * along) * inverse
        if HAS_BASE:
            total += tl.load(base_TD + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(grad_x_TD.dtype.element_ty)
        tl.store(grad_x_TD + at, rounded, mask=inside)
        if HAS_RESIDUAL:
            total = rounded.to(tl.float32)
            of_gate += total * tl.load(y_TD + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_y_TD + at, (total * gate).to(grad_y_TD.dtype.element_ty), mask=inside)
    first = (part * B + image) * D + column
    tl.store(partial_QPBD + first, of_shift, mask=inside)
    tl.store(partial_QPBD + PARTS * B * D + first, of_scale, mask=inside)
    if HAS_RESIDUAL:
        tl.store(partial_QPBD + 2 * PARTS * B * D + first, of_gate, mask=inside)


@triton.jit
def gated_residual(x_TD, gate_BD, y_TD, out_TD, stride, S, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + gate of the image * y. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = token * D + column
    gate = tl.load(gate_BD + token // S * stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_TD + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_TD + at, (x + gate * y).to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_backward(
    grad_TD,
    gate_BD,
    y_TD,
    grad_y_TD,
    partial_PBD,
    stride,
    S,
    B,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_y = gate * grad, and for each part of an image's tokens the sum of grad * y. One program
    an image and part.
    """
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    gate = tl.load(gate_BD + image * stride + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(part, S, PARTS):
        at = (image * S + place) * D + column
        y = tl.load(y_TD + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_TD + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * y
        tl.store(grad_y_TD + at, (grad * gate).to(grad_y_TD.dtype.element_ty), mask=inside)
    tl.store(partial_PBD + (part * B + image) * D + column, total, mask=inside)


@triton.jit
def join_heads(
    queries_TD,
    keys_TD,
    values_TD,
    out_TW,
    partial_PW,
    T,
    PARTS,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the three side by side, W = 3D; for each part of the tokens its sums. One program a
    block of columns and a part: it walks through its tokens.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    within = column < D
    of_queries = tl.zeros((BLOCK,), tl.float32)
    of_keys = tl.zeros((BLOCK,), tl.float32)
    of_values = tl.zeros((BLOCK,), tl.float32)
    for first in range(part * ROWS, T, PARTS * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (token < T)[:, None] & within[None, :]
        at = token[:, None] * D + column[None, :]
        queries = tl.load(queries_TD + at, mask=inside, other=0.0)
        keys = tl.load(keys_TD + at, mask=inside, other=0.0)
        values = tl.load(values_TD + at, mask=inside, other=0.0)
        at = token[:, None] * (3 * D) + column[None, :]
        tl.store(out_TW + at, queries, mask=inside)
        tl.store(out_TW + at + D, keys, mask=inside)
        tl.store(out_TW + at + 2 * D, values, mask=inside)
        of_queries += tl.sum(queries.to(tl.float32), 0)
        of_keys += tl.sum(keys.to(tl.float32), 0)
        of_values += tl.sum(values.to(tl.float32), 0)
    first = part * 3 * D + column
    tl.store(partial_PW + first, of_queries, mask=within)
    tl.store(partial_PW + first + D, of_keys, mask=within)
    tl.store(partial_PW + first + 2 * D, of_values, mask=within)
