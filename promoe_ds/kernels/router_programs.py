"""Triton programs of the router; as `promoe_ds.kernels.programs`.

Letters: T tokens, D width, E experts, whose keys are prototypes. BLOCK_E is no less than E and a
power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cosine(
    tokens_TD,
    keys_ED,
    cosines_TE,
    norms_T,
    key_norms_E,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """cosines = tokens . keys / (max(|token|, EPS) * max(|key|, EPS)), and the norms. One program a
    block of tokens.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK_E)
    has = token < T
    dots = tl.zeros((TOKENS, BLOCK_E), tl.float32)
    squares, key_squares = tl.zeros((TOKENS,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        within = column < D
        at = token[:, None] * D + column[None, :]
        inside = has[:, None] & within[None, :]
        values = tl.load(tokens_TD + at, mask=inside, other=0.0).to(tl.float32)
        key_at = expert[None, :] * D + column[:, None]
        key_inside = (expert < E)[None, :] & within[:, None]
        keys = tl.load(keys_ED + key_at, mask=key_inside, other=0.0).to(tl.float32)
        dots += tl.dot(values, keys, input_precision="ieee")
        squares += tl.sum(values * values, 1)
        key_squares += tl.sum(keys * keys, 0)
    norms, key_norms = tl.sqrt(squares), tl.sqrt(key_squares)
    dots /= tl.maximum(norms, EPS)[:, None] * tl.maximum(key_norms, EPS)[None, :]
    out_at = cosines_TE + token[:, None] * E + expert[None, :]
    tl.store(out_at, dots, mask=has[:, None] & (expert < E)[None, :])
    tl.store(norms_T + token, norms, mask=has)
    tl.store(key_norms_E + expert, key_norms, mask=(expert < E) & (tl.program_id(0) == 0))


@triton.jit
def cosine_backward(
    grad_TE,
    tokens_TD,
    keys_ED,
    cosines_TE,
    norms_T,
    key_norms_E,
    base_TD,
    grad_tokens_TD,
    partial_PED,
    along_PE,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    """grad_token = base + (sum_e g_e unit_key_e - (sum_e g_e cos_e) token / |token|) / |token|, and
    for each part of the tokens the sums of g_e token / |token| and g_e cos_e. One program a part
    and a block of columns; it walks through its tokens. Below EPS a norm is a constant.
    """
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BLOCK_E)
    within, exists = column < D, expert < E
    key_at = expert[:, None] * D + column[None, :]
    key_inside = exists[:, None] & within[None, :]
    keys = tl.load(keys_ED + key_at, mask=key_inside, other=0.0).to(tl.float32)
    key_norms = tl.load(key_norms_E + expert, mask=exists, other=1.0)
    keys /= tl.maximum(key_norms, EPS)[:, None]
    total = tl.zeros((BLOCK_E, BLOCK), tl.float32)
    total_along = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(part * TOKENS, T, PARTS * TOKENS):
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        has = token < T
        pair_at = token[:, None] * E + expert[None, :]
        pair_inside = has[:, None] & exists[None, :]
        norms = tl.load(norms_T + token, mask=has, other=1.0)
        inverse = 1.0 / tl.maximum(norms, EPS)
        grad = tl.load(grad_TE + pair_at, mask=pair_inside, other=0.0)
        along = grad * tl.load(cosines_TE + pair_at, mask=pair_inside, other=0.0)
        total_along += tl.sum(along, 0)
        grad *= inverse[:, None]
        own = tl.sum(along, 1) * inverse * tl.where(norms >= EPS, inverse, 0.0)
        at = token[:, None] * D + column[None, :]
        inside = has[:, None] & within[None, :]
        values = tl.load(tokens_TD + at, mask=inside, other=0.0).to(tl.float32)
        grad_tokens = tl.dot(grad, keys, input_precision="ieee") - own[:, None] * values
        if HAS_BASE:
            grad_tokens += tl.load(base_TD + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_tokens_TD + at, grad_tokens.to(grad_tokens_TD.dtype.element_ty), mask=inside)
        total += tl.dot(tl.trans(grad), values, input_precision="ieee")
    tl.store(partial_PED + part * E * D + key_at, total, mask=key_inside)
    tl.store(along_PE + part * E + expert, total_along, mask=exists & (tl.program_id(1) == 0))


@triton.jit
def cosine_backward_keys(
    partial_PED,
    along_PE,
    keys_ED,
    key_norms_E,
    grad_keys_ED,
    PARTS,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """grad_key = (sum of the parts - sum of g cos * unit_key) / |key|. One program a key and block
    of columns.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < D
    total, along = tl.zeros((BLOCK,), tl.float32), 0.0
    for first in range(0, PARTS, ROWS):
        part = first + tl.arange(0, ROWS)
        has = part < PARTS
        at = (part * E + expert)[:, None] * D + column[None, :]
        inside = has[:, None] & within[None, :]
        total += tl.sum(tl.load(partial_PED + at, mask=inside, other=0.0), 0)
        along += tl.sum(tl.load(along_PE + part * E + expert, mask=has, other=0.0), 0)
    norm = tl.load(key_norms_E + expert)
    inverse = 1.0 / tl.maximum(norm, EPS)
    keys = tl.load(keys_ED + expert * D + column, mask=within, other=0.0).to(tl.float32)
    grad = (total - keys * tl.where(norm >= EPS, along * inverse, 0.0)) * inverse
    grad = grad.to(grad_keys_ED.dtype.element_ty)
    tl.store(grad_keys_ED + expert * D + column, grad, mask=within)


@triton.jit
def mean_similarity(
    keys_ED,
    out,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """out = mean cosine between different keys: the squared length of the summed unit keys, less
    their own, by the number of pairs. One program.
    """
    expert = tl.arange(0, BLOCK_E)
    squares = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (expert < E)[:, None] & (column < D)[None, :]
        at = keys_ED + expert[:, None] * D + column[None, :]
        keys = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(keys * keys, 1)
    inverse = 1.0 / tl.maximum(tl.sqrt(squares), EPS)
    total = -tl.sum(squares * inverse * inverse, 0)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (expert < E)[:, None] & (column < D)[None, :]
        at = keys_ED + expert[:, None] * D + column[None, :]
        keys = tl.load(at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        summed = tl.sum(keys, 0)
        total += tl.sum(summed * summed, 0)
    tl.store(out, total / max(1, E * (E - 1)))


@triton.jit
def contrast(
    sums_ED,
    counts_E,
    keys_ED,
    loss,
    slopes_EE,
    vectors_4E,
    weight,
    temperature,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """loss = weight * mean over experts with tokens of -log softmax of the cosines of key and
    centroids / temperature at the own one; slopes = its derivatives by the cosines. vectors: one
    over the norms of keys and of sums, sums of slope * cosine along both. One program.
    """
    expert = tl.arange(0, BLOCK_E)
    exists = expert < E
    dots = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    key_squares, squares = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at = expert[:, None] * D + column[None, :]
        inside = exists[:, None] & (column < D)[None, :]
        keys = tl.load(keys_ED + at, mask=inside, other=0.0).to(tl.float32)
        sums = tl.load(sums_ED + at, mask=inside, other=0.0)
        dots += tl.dot(keys, tl.trans(sums), input_precision="ieee")
        key_squares += tl.sum(keys * keys, 1)
        squares += tl.sum(sums * sums, 1)
    counts = tl.load(counts_E + expert, mask=exists, other=0).to(tl.float32)
    is_active, counts = counts > 0, tl.maximum(counts, 1.0)
    key_norms, norms = tl.sqrt(key_squares), tl.sqrt(squares)
    inverse_key = 1.0 / tl.maximum(key_norms, EPS)
    inverse = 1.0 / (tl.maximum(norms / counts, EPS) * counts)
    cosines = dots * inverse_key[:, None] * inverse[None, :]
    is_pair = is_active[:, None] & is_active[None, :]
    logits = tl.where(is_pair, cosines / temperature, -1e30)
    largest = tl.max(logits, 1)
    powers = tl.where(is_pair, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.where(is_active, tl.sum(powers, 1), 1.0)
    is_own = (expert[:, None] == expert[None, :]) & is_pair
    losses = tl.log(total) + largest - tl.sum(tl.where(is_own, logits, 0.0), 1)
    share = weight / tl.maximum(tl.sum(is_active.to(tl.float32), 0), 1.0)
    tl.store(loss, tl.sum(tl.where(is_active, losses, 0.0), 0) * share)
    slopes = (powers / total[:, None] - is_own.to(tl.float32)) * share / temperature
    at = expert[:, None] * E + expert[None, :]
    tl.store(slopes_EE + at, slopes, mask=exists[:, None] & exists[None, :])
    along_key = tl.where(key_norms >= EPS, tl.sum(slopes * cosines, 1), 0.0)
    along = tl.where(norms / counts >= EPS, tl.sum(slopes * cosines, 0), 0.0)
    tl.store(vectors_4E + expert, inverse_key, mask=exists)
    tl.store(vectors_4E + E + expert, inverse, mask=exists)
    tl.store(vectors_4E + 2 * E + expert, along_key, mask=exists)
    tl.store(vectors_4E + 3 * E + expert, along, mask=exists)


@triton.jit
def contrast_backward(
    grad,
    sums_ED,
    keys_ED,
    slopes_EE,
    vectors_4E,
    grad_sums_ED,
    grad_keys_ED,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of sums and keys from `contrast`'s slopes. One program a block of columns."""
    expert = tl.arange(0, BLOCK_E)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = expert < E
    at, inside = expert[:, None] * D + column[None, :], exists[:, None] & (column < D)[None, :]
    inverse_key = tl.load(vectors_4E + expert, mask=exists, other=0.0)
    inverse = tl.load(vectors_4E + E + expert, mask=exists, other=0.0)
    along_key = tl.load(vectors_4E + 2 * E + expert, mask=exists, other=0.0)
    along = tl.load(vectors_4E + 3 * E + expert, mask=exists, other=0.0)
    keys = tl.load(keys_ED + at, mask=inside, other=0.0).to(tl.float32) * inverse_key[:, None]
    sums = tl.load(sums_ED + at, mask=inside, other=0.0) * inverse[:, None]
    slope_at = slopes_EE + expert[:, None] * E + expert[None, :]
    slopes = tl.load(slope_at, mask=exists[:, None] & exists[None, :], other=0.0) * tl.load(grad)
    of_keys = tl.dot(slopes, sums, input_precision="ieee")
    of_sums = tl.dot(tl.trans(slopes), keys, input_precision="ieee")
    of_keys = (of_keys - keys * (along_key * tl.load(grad))[:, None]) * inverse_key[:, None]
    of_sums = (of_sums - sums * (along * tl.load(grad))[:, None]) * inverse[:, None]
    tl.store(grad_keys_ED + at, of_keys.to(grad_keys_ED.dtype.element_ty), mask=inside)
    tl.store(grad_sums_ED + at, of_sums, mask=inside)
