"""The router's cosines, its contrastive loss and the keys' similarity as torch operations.

Letters: T tokens, D width, E experts, whose keys are prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from promoe_ds.kernels.ops import COLUMNS, PARTS, ROWS, fused_op, launch, power_of_two

#: Norms below it count as it: a zero token scores 0 for every expert.
NORM_EPS = 1e-12


def cosine(tokens_TD: Tensor, keys_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens and the cosine of every token with every key, (T, E) in fp32; tokens and
    keys are read once, as they are.

    Gradient: reaches tokens and keys. What is computed from the tokens returned adds its gradient
    in the kernel of the cosines'.  Sync: none.
    """
    return _CosineAndTokens.apply(tokens_TD.contiguous(), keys_ED.contiguous())


def contrast(
    token_sums_ED: Tensor, counts_E: Tensor, keys_ED: Tensor, weight: float, temperature: float
) -> Tensor:
    """Return `routing.losses.contrast_centroids` of one rank's sums times `weight`, fp32.

    Gradient: reaches sums and keys.  Sync: none.
    """
    return _contrast(
        token_sums_ED.contiguous(), counts_E.contiguous(), keys_ED.contiguous(), weight, temperature
    )[0]


@fused_op("mean_similarity")
def mean_similarity(keys_ED: Tensor) -> Tensor:
    """Return the mean cosine between different keys, a scalar in fp32; 0 for a single one. Without
    gradient.
    """
    out = torch.empty((), device=keys_ED.device)
    launch("router_programs.mean_similarity", (1,), keys_ED.contiguous(), out, **_shape(keys_ED))
    return out


def _shape(keys_ED: Tensor) -> dict[str, Any]:
    experts, width = keys_ED.shape
    block_e = max(16, power_of_two(experts))
    return {"D": width, "E": experts, "BLOCK_E": block_e, "BLOCK": COLUMNS, "EPS": NORM_EPS}


class _CosineAndTokens(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, keys_ED: Tensor) -> tuple[Tensor, Tensor]:
        cosines_TE, *norms = _cosine(tokens_TD, keys_ED)
        ctx.save_for_backward(tokens_TD, keys_ED, cosines_TE, *norms)
        ctx.set_materialize_grads(False)
        return tokens_TD, cosines_TE

    @staticmethod
    def backward(ctx: Any, base_TD: Tensor | None, grad_TE: Tensor | None) -> Any:
        if grad_TE is None:
            return base_TD, None
        base_TD = None if base_TD is None else base_TD.contiguous()
        return _cosine_backward(grad_TE.contiguous(), *ctx.saved_tensors, base_TD)


@fused_op("cosine")
def _cosine(tokens_TD: Tensor, keys_ED: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines, the tokens' norms and the keys' norms."""
    tokens, experts = tokens_TD.shape[0], keys_ED.shape[0]
    cosines_TE = tokens_TD.new_empty(tokens, experts, dtype=torch.float32)
    found = cosines_TE, cosines_TE.new_empty(tokens), cosines_TE.new_empty(experts)
    launch(
        "router_programs.cosine",
        (-(-tokens // ROWS),),
        tokens_TD,
        keys_ED,
        *found,
        tokens,
        TOKENS=ROWS,
        **_shape(keys_ED),
    )
    return found


@fused_op("cosine_backward")
def _cosine_backward(
    grad_TE: Tensor,
    tokens_TD: Tensor,
    keys_ED: Tensor,
    cosines_TE: Tensor,
    norms_T: Tensor,
    key_norms_E: Tensor,
    base_TD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (tokens, width), experts, shape = tokens_TD.shape, keys_ED.shape[0], _shape(keys_ED)
    grad_tokens, grad_keys = torch.empty_like(tokens_TD), torch.empty_like(keys_ED)
    parts, blocks = min(8 * PARTS, -(-tokens // ROWS)), -(-width // COLUMNS)
    partial = torch.empty(parts, experts, width, device=tokens_TD.device)
    along = partial.new_empty(parts, experts)
    launch(
        "router_programs.cosine_backward",
        (parts, blocks),
        grad_TE,
        tokens_TD,
        keys_ED,
        cosines_TE,
        norms_T,
        key_norms_E,
        grad_tokens if base_TD is None else base_TD,
        grad_tokens,
        partial,
        along,
        tokens,
        TOKENS=ROWS,
        PARTS=parts,
        HAS_BASE=base_TD is not None,
        **shape,
    )
    del shape["BLOCK_E"]
    launch(
        "router_programs.cosine_backward_keys",
        (experts, blocks),
        partial,
        along,
        keys_ED,
        key_norms_E,
        grad_keys,
        parts,
        ROWS=ROWS,
        **shape,
    )
    return grad_tokens, grad_keys


@fused_op("contrast")
def _contrast(
    token_sums_ED: Tensor, counts_E: Tensor, keys_ED: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, its slopes, and what `router_programs.contrast` calls vectors."""
    new, experts = token_sums_ED.new_empty, token_sums_ED.shape[0]
    found = new(()), new(experts, experts), new(4, experts)
    launch(
        "router_programs.contrast",
        (1,),
        token_sums_ED,
        counts_E,
        keys_ED,
        *found,
        weight,
        temperature,
        **_shape(keys_ED),
    )
    return found


@fused_op("contrast_backward")
def _contrast_backward(
    grad: Tensor, token_sums_ED: Tensor, keys_ED: Tensor, slopes_EE: Tensor, vectors_4E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_sums, grad_keys = torch.empty_like(token_sums_ED), torch.empty_like(keys_ED)
    shape = _shape(keys_ED)
    del shape["EPS"]
    launch(
        "router_programs.contrast_backward",
        (-(-keys_ED.shape[1] // COLUMNS),),
        grad,
        token_sums_ED,
        keys_ED,
        slopes_EE,
        vectors_4E,
        grad_sums,
        grad_keys,
        **shape,
    )
    return grad_sums, grad_keys


def _save_for_contrast(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_sums_ED, _, keys_ED, _, _ = inputs
    ctx.save_for_backward(token_sums_ED, keys_ED, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_contrast(ctx: Any, grad: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
    grad_sums, grad_keys = _contrast_backward(grad, *ctx.saved_tensors)
    return grad_sums, None, grad_keys, None, None


_contrast.register_autograd(_differentiate_contrast, setup_context=_save_for_contrast)
