"""Triton programs that sort token choices by expert; as `promoe_ds.kernels.programs`.

Letters: B images, S tokens per image, K choices per token, C = S*K, T = B*S tokens, E experts, N
rows of the list. BLOCK_E is no less than E and a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _choices(ids_BC, gates_BC, image, choice, is_routed, CHOICES: tl.constexpr, E: tl.constexpr):
    """Return chosen experts and gates of an image, those of an unrouted one for the last expert;
    beyond the last choice expert -1.
    """
    has = choice < CHOICES
    chosen = tl.load(ids_BC + image * CHOICES + choice, mask=has & is_routed, other=E - 1)
    gates = tl.load(gates_BC + image * CHOICES + choice, mask=has & is_routed, other=1.0)
    return tl.where(has, chosen, -1), gates


@triton.jit
def count_choices(
    ids_BC,
    gates_BC,
    is_routed_B,
    counts_BE,
    gate_sums_BE,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    JOINS: tl.constexpr,
):
    """Each image's choices of each expert, and the sums of their gates; for an image that is not
    routed zeros, or with JOINS the last expert with gate 1 for every choice. One program an image
    with CHOICES = S*K of them.
    """
    image = tl.program_id(0).to(tl.int64)
    is_routed = tl.load(is_routed_B + image)
    expert = tl.arange(0, BLOCK_E)
    counts, gate_sums = tl.zeros((BLOCK_E,), tl.int64), tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, tl.where(is_routed | JOINS, CHOICES, 0), ROWS):
        choice = first + tl.arange(0, ROWS)
        chosen, gates = _choices(ids_BC, gates_BC, image, choice, is_routed, CHOICES, E)
        is_chosen = chosen[:, None] == expert[None, :]
        counts += tl.sum(is_chosen.to(tl.int64), 0)
        gate_sums += tl.sum(tl.where(is_chosen, gates[:, None], 0.0), 0)
    tl.store(counts_BE + image * E + expert, counts, mask=expert < E)
    tl.store(gate_sums_BE + image * E + expert, gate_sums, mask=expert < E)


@triton.jit
def place_choices(
    ids_BC,
    gates_BC,
    is_routed_B,
    counts_BE,
    token_ids_N,
    gates_N,
    order_N,
    starts_T,
    counts_E,
    B,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    JOINS: tl.constexpr,
):
    """Sort the choices of routed images by expert, stable: a choice's row is its expert's first,
    plus the expert's rows of earlier images, plus those of earlier choices of its image. order_N
    and starts_T list the rows of each token. One program an image.
    """
    image = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    total, before = tl.zeros((BLOCK_E,), tl.int64), tl.zeros((BLOCK_E,), tl.int64)
    for first in range(0, B, ROWS):
        other = first + tl.arange(0, ROWS)
        at = other[:, None] * E + expert[None, :]
        inside = (other < B)[:, None] & (expert < E)[None, :]
        counts = tl.load(counts_BE + at, mask=inside, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < image)[:, None], counts, 0), 0)
    tl.store(counts_E + expert, total, mask=(expert < E) & (image == 0))
    tl.store(starts_T + B * (CHOICES // K), tl.sum(total, 0), mask=image == B - 1)
    row_E = tl.cumsum(total, 0) - total + before
    in_order, is_routed = tl.sum(before, 0), tl.load(is_routed_B + image)
    has_rows = is_routed | JOINS
    for first in range(0, CHOICES, ROWS):
        choice = first + tl.arange(0, ROWS)
        has = choice < CHOICES
        token = image * (CHOICES // K) + choice // K
        start = in_order + tl.where(has_rows, choice, 0)
        tl.store(starts_T + token, start, mask=has & (choice % K == 0))
        has = has & has_rows
        chosen, gates = _choices(ids_BC, gates_BC, image, choice, is_routed, CHOICES, E)
        is_chosen = (chosen[:, None] == expert[None, :]).to(tl.int64)
        rank = tl.cumsum(is_chosen, 0) - is_chosen
        row = tl.sum(is_chosen * (row_E[None, :] + rank), 1)
        tl.store(token_ids_N + row, token, mask=has)
        tl.store(gates_N + row, gates, mask=has)
        tl.store(order_N + start, row, mask=has)
        row_E += tl.sum(is_chosen, 0)


@triton.jit
def place_choices_backward(
    grad_N,
    order_N,
    starts_T,
    is_routed_B,
    grad_C,
    N_CHOICES,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each choice takes the gradient of its row's gate; 0 where its image is not routed. One
    program a block.
    """
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    has = choice < N_CHOICES
    is_routed = tl.load(is_routed_B + choice // CHOICES, mask=has, other=0) != 0
    start = tl.load(starts_T + choice // K, mask=is_routed, other=0)
    row = tl.load(order_N + start + choice % K, mask=is_routed, other=0)
    tl.store(grad_C + choice, tl.load(grad_N + row, mask=is_routed, other=0.0), mask=has)
