"""The router's cosines as one torch operation.

Letters: T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promoe_ds.kernels.ops import COLUMNS, PARTS, ROWS, fused_op, power_of_two

#: Norms below it count as it: a zero token scores 0 for every expert.
NORM_EPS = 1e-12


def cosine(tokens_TD: Tensor, keys_ED: Tensor) -> Tensor:
    """Return the cosine of every token with every unit key, (T, E) in fp32; the tokens are read
    once, as they are.

    Gradient: reaches tokens and keys.  Sync: none.
    """
    cosines: Tensor = _cosine(tokens_TD.contiguous(), keys_ED.contiguous())[0]
    return cosines


@fused_op("cosine")
def _cosine(tokens_TD: Tensor, keys_ED: Tensor) -> tuple[Tensor, Tensor]:
    from promoe_ds.kernels import programs

    (tokens, width), experts = tokens_TD.shape, len(keys_ED)
    cosines = torch.empty(tokens, experts, device=tokens_TD.device)
    norms = torch.empty(tokens, device=tokens_TD.device)
    programs.cosine[(-(-tokens // ROWS),)](
        tokens_TD,
        keys_ED,
        cosines,
        norms,
        tokens,
        D=width,
        E=experts,
        BLOCK_E=max(16, power_of_two(experts)),
        TOKENS=ROWS,
        BLOCK=COLUMNS,
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
    parts = min(8 * PARTS, -(-tokens // ROWS))
    partial = torch.empty(parts, experts, width, device=tokens_TD.device)
    programs.cosine_backward[(parts, -(-width // COLUMNS))](
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
        TOKENS=ROWS,
        BLOCK=COLUMNS,
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
