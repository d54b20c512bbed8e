"""Queries, keys and values of one product, as a torch operation.

Letters: B images, S tokens per image, T = B*S, A heads, G head width, D = A*G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from promoe_ds.kernels.ops import COLUMNS, PARTS, ROWS, fused_op, launch, sum_of_parts


def split_heads(qkv_BS3AG: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, A, S, G) as views of their product, A heads of width G.

    Gradient: reaches the product, and the bias (3*A*G,) that it includes: where the three gradients
    are put together, they are summed over the tokens.  Sync: none.
    """
    return _SplitHeads.apply(qkv_BS3AG, bias)


class _SplitHeads(Function):
    @staticmethod
    def forward(ctx: Any, qkv_BS3AG: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype = qkv_BS3AG.shape, bias.dtype
        return qkv_BS3AG.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads_BASG: Tensor) -> tuple[Tensor, Tensor]:
        rows = ctx.shape[0] * ctx.shape[1]
        parts_TD = [grad.transpose(1, 2).reshape(rows, -1) for grad in grads_BASG]
        grad_T3D, grad_bias = _join_heads(*parts_TD, ctx.dtype)
        return grad_T3D.view(ctx.shape), grad_bias


@fused_op("join_heads")
def _join_heads(
    queries_TD: Tensor, keys_TD: Tensor, values_TD: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the three side by side, (T, 3D), and their sums in `dtype`, (3D,)."""
    tokens, width = queries_TD.shape
    out = queries_TD.new_empty(tokens, 3 * width)
    parts = min(4 * PARTS, -(-tokens // ROWS))
    partial = torch.empty(1, parts, 3 * width, device=out.device)
    launch(
        "block_programs.join_heads",
        (-(-width // COLUMNS), parts),
        queries_TD,
        keys_TD,
        values_TD,
        out,
        partial,
        tokens,
        parts,
        D=width,
        ROWS=ROWS,
        BLOCK=COLUMNS,
    )
    return out, sum_of_parts(partial, dtype)[0]
