"""The fused operations as torch knows them: with shapes for tracing and compiling, and gradients.

Letters: T tokens, D width, N rows sorted by expert, E experts, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LIBRARY = "promoe_ds"
#: Norms below it count as it: a zero token scores 0 for every expert.
NORM_EPS = 1e-12
#: Parts into which sums over tokens are split, so that all of a GPU's processors have work.
_PARTS = 16
_ROWS, _COLUMNS = 16, 128
#: Numbers that one program updates.
_UPDATED = 1024


@dataclass(frozen=True)
class TokenRows:
    """The rows of each token: those of token t are order_N[starts_T[t] : starts_T[t + 1]], (T + 1)
    starts.
    """

    order_N: Tensor
    starts_T: Tensor


def rows_of_tokens(token_ids_N: Tensor, num_tokens: int) -> TokenRows:
    """Return where the rows of each token are.  Sync: none."""
    sorted_N, order_N = token_ids_N.sort(stable=True)
    tokens = torch.arange(num_tokens + 1, device=token_ids_N.device)
    return TokenRows(order_N, torch.searchsorted(sorted_N, tokens))


def combine(
    base_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor, places: TokenRows
) -> Tensor:
    """Return base plus the gate-weighted rows of each token, (T, D) in base's dtype; summed in
    fp32.

    Gradient: reaches base, rows and gates.  Sync: none.
    """
    result: Tensor = _combine(
        base_TD, rows_ND, gates_N, token_ids_N, places.order_N, places.starts_T
    )
    return result


def select_rows(tokens_TD: Tensor, token_ids_N: Tensor, places: TokenRows) -> Tensor:
    """Return each row's token, (N, D).

    Gradient: the sum over a token's rows in fp32, without atomic additions.  Sync: none.
    """
    result: Tensor = _select_rows(tokens_TD, token_ids_N, places.order_N, places.starts_T)
    return result


def sum_by_expert(
    tokens_TD: Tensor, token_ids_N: Tensor, ends_E: Tensor, places: TokenRows
) -> Tensor:
    """Return the sum of every expert's tokens, (E, D) in fp32 (Eq. 6's centroids times counts).

    Gradient: reaches the tokens.  Sync: none.
    """
    result: Tensor = _sum_by_expert(tokens_TD, token_ids_N, ends_E, places.order_N, places.starts_T)
    return result


def cosine(tokens_TD: Tensor, keys_ED: Tensor) -> Tensor:
    """Return the cosine of every token with every unit key, (T, E) in fp32; the tokens are read
    once, as they are.

    Gradient: reaches tokens and keys.  Sync: none.
    """
    cosines: Tensor = _cosine(tokens_TD, keys_ED)[0]
    return cosines


# Each operation: what it computes, its shapes, and its gradient.


def fused_op(name: str, **options: Any) -> Any:
    """Return the decorator of an operation of ours that changes none of its arguments."""
    return torch.library.custom_op(f"{_LIBRARY}::{name}", mutates_args=(), **options)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is no less: a block of columns."""
    return 1 << max(0, number - 1).bit_length()


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // _ROWS), -(-columns // _COLUMNS)


@fused_op("combine")
def _combine(
    base_TD: Tensor,
    rows_ND: Tensor,
    gates_N: Tensor,
    token_ids_N: Tensor,
    order_N: Tensor,
    starts_T: Tensor,
) -> Tensor:
    from promoe_ds.kernels import programs

    out, width = torch.empty_like(base_TD), base_TD.shape[1]
    programs.combine[(len(base_TD),)](
        rows_ND,
        gates_N,
        base_TD,
        order_N,
        starts_T,
        out,
        D=width,
        BLOCK=power_of_two(width),
        HAS_GATES=True,
        HAS_BASE=True,
    )
    return out


@_combine.register_fake
def _(base_TD, rows_ND, gates_N, token_ids_N, order_N, starts_T):
    return torch.empty_like(base_TD)


@fused_op("combine_backward")
def _combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor
) -> tuple[Tensor, Tensor]:
    from promoe_ds.kernels import programs

    grad_rows, grad_gates = torch.empty_like(rows_ND), torch.empty_like(gates_N)
    if len(rows_ND):
        width = rows_ND.shape[1]
        programs.combine_backward[(len(rows_ND),)](
            grad_TD,
            rows_ND,
            gates_N,
            token_ids_N,
            grad_rows,
            grad_gates,
            D=width,
            BLOCK=power_of_two(width),
        )
    return grad_rows, grad_gates


@_combine_backward.register_fake
def _(grad_TD, rows_ND, gates_N, token_ids_N):
    return torch.empty_like(rows_ND), torch.empty_like(gates_N)


def _save_for_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, rows_ND, gates_N, token_ids_N, _, _ = inputs
    ctx.save_for_backward(rows_ND, gates_N, token_ids_N)


def _differentiate_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows, grad_gates = _combine_backward(grad_TD.contiguous(), *ctx.saved_tensors)
    return grad_TD, grad_rows, grad_gates, None, None, None


_combine.register_autograd(_differentiate_combine, setup_context=_save_for_combine)


@fused_op("select_rows")
def _select_rows(
    tokens_TD: Tensor, token_ids_N: Tensor, order_N: Tensor, starts_T: Tensor
) -> Tensor:
    return tokens_TD.index_select(0, token_ids_N)


@_select_rows.register_fake
def _(tokens_TD, token_ids_N, order_N, starts_T):
    return tokens_TD.new_empty(len(token_ids_N), tokens_TD.shape[1])


@fused_op("sum_rows_of_tokens")
def _sum_rows_of_tokens(rows_ND: Tensor, order_N: Tensor, starts_T: Tensor) -> Tensor:
    from promoe_ds.kernels import programs

    width = rows_ND.shape[1]
    out = rows_ND.new_empty(len(starts_T) - 1, width)
    programs.combine[(len(out),)](
        rows_ND,
        rows_ND,
        out,
        order_N,
        starts_T,
        out,
        D=width,
        BLOCK=power_of_two(width),
        HAS_GATES=False,
        HAS_BASE=False,
    )
    return out


@_sum_rows_of_tokens.register_fake
def _(rows_ND, order_N, starts_T):
    return rows_ND.new_empty(len(starts_T) - 1, rows_ND.shape[1])


def _save_for_select(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate_select(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    return _sum_rows_of_tokens(grad_ND.contiguous(), *ctx.saved_tensors), None, None, None


_select_rows.register_autograd(_differentiate_select, setup_context=_save_for_select)


@fused_op("bias_gelu")
def bias_gelu(pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> Tensor:
    """Return gelu_tanh(pre + bias of the row's expert), (R, F); without gradient, see
    `bias_gelu_backward`.
    """
    from promoe_ds.kernels import programs

    out = torch.empty_like(pre_RF)
    rows, width = pre_RF.shape
    if rows:
        programs.bias_gelu[_blocks(rows, width)](
            pre_RF, bias_EF, ends_E, out, rows, F=width, E=len(ends_E), ROWS=_ROWS, BLOCK=_COLUMNS
        )
    return out


@bias_gelu.register_fake
def _(pre_RF, bias_EF, ends_E):
    return torch.empty_like(pre_RF)


@fused_op("bias_gelu_backward")
def bias_gelu_backward(
    grad_RF: Tensor, pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of pre, (R, F), and of the biases, (E, F)."""
    from promoe_ds.kernels import programs

    grad_pre, grad_bias = torch.empty_like(pre_RF), torch.empty_like(bias_EF)
    experts, width = bias_EF.shape
    programs.bias_gelu_backward[(experts, -(-width // _COLUMNS))](
        grad_RF,
        pre_RF,
        bias_EF,
        ends_E,
        grad_pre,
        grad_bias,
        F=width,
        ROWS=_ROWS,
        BLOCK=_COLUMNS,
    )
    return grad_pre, grad_bias


@bias_gelu_backward.register_fake
def _(grad_RF, pre_RF, bias_EF, ends_E):
    return torch.empty_like(pre_RF), torch.empty_like(bias_EF)


@torch.library.custom_op(f"{_LIBRARY}::add_bias", mutates_args=("rows_RF",))
def add_bias(rows_RF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> None:
    """Add to each row the bias of its expert, in place."""
    from promoe_ds.kernels import programs

    rows, width = rows_RF.shape
    if rows:
        programs.add_bias[_blocks(rows, width)](
            rows_RF, bias_EF, ends_E, rows, F=width, E=len(ends_E), ROWS=_ROWS, BLOCK=_COLUMNS
        )


@add_bias.register_fake
def _(rows_RF, bias_EF, ends_E):
    return None


@fused_op("sum_groups")
def sum_groups(rows_ND: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum of each expert's rows, (E, D) in the rows' dtype; a bias's gradient."""
    return _sum_in_parts(rows_ND, None, ends_E).to(rows_ND.dtype)


@sum_groups.register_fake
def _(rows_ND, ends_E):
    return rows_ND.new_empty(len(ends_E), rows_ND.shape[1])


def _sum_in_parts(rows_D: Tensor, ids_N: Tensor | None, ends_E: Tensor) -> Tensor:
    from promoe_ds.kernels import programs

    width, experts = rows_D.shape[1], len(ends_E)
    partial = torch.empty(_PARTS, experts, width, device=rows_D.device)
    programs.sum_rows_by_expert[(experts, -(-width // _COLUMNS), _PARTS)](
        rows_D,
        ids_N if ids_N is not None else ends_E,
        ends_E,
        partial,
        D=width,
        E=experts,
        PARTS=_PARTS,
        ROWS=_ROWS,
        BLOCK=_COLUMNS,
        HAS_IDS=ids_N is not None,
    )
    return partial.sum(dim=0)


@fused_op("sum_by_expert")
def _sum_by_expert(
    tokens_TD: Tensor, token_ids_N: Tensor, ends_E: Tensor, order_N: Tensor, starts_T: Tensor
) -> Tensor:
    return _sum_in_parts(tokens_TD, token_ids_N, ends_E)


@_sum_by_expert.register_fake
def _(tokens_TD, token_ids_N, ends_E, order_N, starts_T):
    return tokens_TD.new_empty(len(ends_E), tokens_TD.shape[1], dtype=torch.float32)


@fused_op("spread_to_tokens")
def _spread_to_tokens(
    values_ED: Tensor, order_N: Tensor, starts_T: Tensor, ends_E: Tensor, like_TD: Tensor
) -> Tensor:
    from promoe_ds.kernels import programs

    out, width = torch.empty_like(like_TD), like_TD.shape[1]
    programs.spread_to_tokens[(len(out),)](
        values_ED,
        order_N,
        starts_T,
        ends_E,
        out,
        D=width,
        E=len(ends_E),
        BLOCK=power_of_two(width),
    )
    return out


@_spread_to_tokens.register_fake
def _(values_ED, order_N, starts_T, ends_E, like_TD):
    return torch.empty_like(like_TD)


def _save_for_sum(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens_TD, _, ends_E, order_N, starts_T = inputs
    ctx.save_for_backward(order_N, starts_T, ends_E, tokens_TD)


def _differentiate_sum(ctx: Any, grad_ED: Tensor) -> tuple[Tensor | None, ...]:
    grad_TD = _spread_to_tokens(grad_ED.contiguous(), *ctx.saved_tensors)
    return grad_TD, None, None, None, None


_sum_by_expert.register_autograd(_differentiate_sum, setup_context=_save_for_sum)


@fused_op("cosine")
def _cosine(tokens_TD: Tensor, keys_ED: Tensor) -> tuple[Tensor, Tensor]:
    from promoe_ds.kernels import programs

    (tokens, width), experts = tokens_TD.shape, len(keys_ED)
    cosines = torch.empty(tokens, experts, device=tokens_TD.device)
    norms = torch.empty(tokens, device=tokens_TD.device)
    programs.cosine[(-(-tokens // _ROWS),)](
        tokens_TD,
        keys_ED,
        cosines,
        norms,
        tokens,
        D=width,
        E=experts,
        BLOCK_E=max(16, power_of_two(experts)),
        TOKENS=_ROWS,
        BLOCK=_COLUMNS,
        EPS=NORM_EPS,
    )
    return cosines, norms


@_cosine.register_fake
def _(tokens_TD, keys_ED):
    cosines = tokens_TD.new_empty(len(tokens_TD), len(keys_ED), dtype=torch.float32)
    return cosines, cosines.new_empty(len(tokens_TD))


@fused_op("cosine_backward")
def _cosine_backward(
    grad_TE: Tensor, tokens_TD: Tensor, keys_ED: Tensor, cosines_TE: Tensor, norms_T: Tensor
) -> tuple[Tensor, Tensor]:
    from promoe_ds.kernels import programs

    (tokens, width), experts = tokens_TD.shape, len(keys_ED)
    grad_tokens = torch.empty_like(tokens_TD)
    parts = min(8 * _PARTS, -(-tokens // _ROWS))
    partial = torch.empty(parts, experts, width, device=tokens_TD.device)
    programs.cosine_backward[(parts, -(-width // _COLUMNS))](
        grad_TE,
        tokens_TD,
        keys_ED,
        cosines_TE,
        norms_T,
        grad_tokens,
        partial,
        tokens,
        D=width,
        E=experts,
        BLOCK_E=max(16, power_of_two(experts)),
        TOKENS=_ROWS,
        BLOCK=_COLUMNS,
        PARTS=parts,
        EPS=NORM_EPS,
    )
    return grad_tokens, partial.sum(dim=0)


@_cosine_backward.register_fake
def _(grad_TE, tokens_TD, keys_ED, cosines_TE, norms_T):
    return torch.empty_like(tokens_TD), torch.empty_like(keys_ED)


def _save_for_cosine(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate_cosine(ctx: Any, grad_TE: Tensor, grad_norms_T: Tensor) -> Any:
    return _cosine_backward(grad_TE.contiguous(), *ctx.saved_tensors)


_cosine.register_autograd(_differentiate_cosine, setup_context=_save_for_cosine)


@torch.library.custom_op(
    f"{_LIBRARY}::adamw",
    mutates_args=("weights_N", "exp_avg_N", "exp_avg_sq_N", "averages", "out_N"),
)
def adamw(
    weights_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    averages: list[Tensor],
    out_N: Tensor,
    grad_N: Tensor,
    scalars: Tensor,
    pulls: list[float],
    lr: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
) -> None:
    """Make one AdamW update of flat fp32 weights, their moving averages, and the weights as the
    network has them, reading each number once.

    Args:
        averages: two at most; each moves by its part of `pulls` towards the new weights.
        out_N: takes the weights; grad_N: in any dtype.
        scalars: fp32 on the device: 1 to change nothing, the divisor of the gradient,
            1 - beta1^t, sqrt(1 - beta2^t).
    """
    from promoe_ds.kernels import programs

    count, first = weights_N.numel(), [*averages, weights_N, weights_N]
    programs.adamw[(-(-count // _UPDATED),)](
        weights_N,
        exp_avg_N,
        exp_avg_sq_N,
        grad_N,
        out_N,
        first[0],
        first[1],
        scalars,
        lr,
        *betas,
        eps,
        weight_decay,
        *[*pulls, 0.0, 0.0][:2],
        count,
        AVERAGES=len(averages),
        BLOCK=_UPDATED,
    )


@adamw.register_fake
def _(*unused, **options):
    return None
