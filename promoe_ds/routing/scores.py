"""Scores of tokens for experts, cosine (step 2, prototypical routing) and linear, and their
activation.

Letters: B images, S tokens per image, D width, E routed experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.kernels import router_ops
from promoe_ds.kernels.choice import uses_triton

NORM_EPS = router_ops.NORM_EPS


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32, or in fp64 where it already is: routing never runs in half
    precision.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def cosine_scores(
    tokens_D: Tensor, prototypes_ED: Tensor, scale: float = 1.0, kernels: str = "eager"
) -> Tensor:
    """Return the pre-activation scores Z = scale * cos(token, prototype).

    Source: Eq. 4; official: the same without scale; differs: fp32 under any autocast.
    Args:
        tokens_D: (..., D), any float dtype.
        prototypes_ED: (E, D).
        scale: alpha of Eq. 4, > 0.
        kernels: see `kernels.choice`.
    Returns: (..., E) in fp32 (fp64 for fp64 tokens). A zero token scores 0 for every expert.
    Gradient: reaches tokens and prototypes.  Sync: none.  Collectives: none.
    """
    return score_and_pass(tokens_D, prototypes_ED, scale, kernels)[1]


def score_and_pass(
    tokens_D: Tensor, prototypes_ED: Tensor, scale: float, kernels: str
) -> tuple[Tensor, Tensor]:
    """Return the tokens for further use, and `cosine_scores`: fused, the gradient of that use is
    added in the kernel of the scores'.
    """
    with torch.autocast(tokens_D.device.type, enabled=False):
        if uses_triton(tokens_D, kernels):
            tokens, cosines = router_ops.cosine(tokens_D.flatten(0, -2), prototypes_ED)
            cosines, tokens_D = cosines.unflatten(0, tokens_D.shape[:-1]), tokens.view_as(tokens_D)
        else:
            prototypes = F.normalize(at_least_fp32(prototypes_ED), dim=-1, eps=NORM_EPS)
            tokens = at_least_fp32(tokens_D)
            cosines = _Cosine.apply(tokens, prototypes.to(tokens.dtype))
        return tokens_D, cosines if scale == 1.0 else cosines * scale


def linear_scores(tokens_D: Tensor, gate_weight_ED: Tensor) -> Tensor:
    """Return the logits of a linear gate, token . weight_e, in fp32 under any autocast.

    Source: the gates of DiT-MoE, EC-DiT and DiffMoE.
    Args:
        tokens_D: (..., D), any float dtype.
        gate_weight_ED: (E, D).
    Returns: (..., E) in fp32 (fp64 for fp64 tokens).
    Gradient: reaches tokens and weight.  Sync: none.  Collectives: none.
    """
    with torch.autocast(tokens_D.device.type, enabled=False):
        tokens = at_least_fp32(tokens_D)
        return F.linear(tokens, gate_weight_ED.to(tokens.dtype))


def linear_fp32(tokens_D: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a router's layer in fp32 whatever its weights' type and the autocast (fp64 for fp64
    tokens).

    Args:
        tokens_D: (..., in), any float dtype.
    Returns: (..., out).
    Gradient: reaches tokens, weight and bias.  Sync: none.  Collectives: none.
    """
    with torch.autocast(tokens_D.device.type, enabled=False):
        tokens = at_least_fp32(tokens_D)
        return F.linear(tokens, layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype))


class _Cosine(torch.autograd.Function):
    """Cosines of tokens with unit directions, without a normalised copy of the tokens in either
    pass.
    """

    @staticmethod
    def forward(ctx: Any, tokens_D: Tensor, expert_keys_ED: Tensor) -> Tensor:
        norms = tokens_D.norm(dim=-1, keepdim=True)
        inverse_norms = norms.clamp_min(NORM_EPS).reciprocal()
        cosines_E = (tokens_D @ expert_keys_ED.T).mul_(inverse_norms)
        # Below the floor the norm is a constant and has no gradient.
        ctx.save_for_backward(
            tokens_D, expert_keys_ED, cosines_E, inverse_norms, inverse_norms * (norms >= NORM_EPS)
        )
        return cosines_E

    @staticmethod
    def backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor, Tensor]:
        tokens_D, expert_keys_ED, cosines_E, inverse_norms, norm_slopes = ctx.saved_tensors
        grad_E = grad_E * inverse_norms
        grad_tokens = grad_E @ expert_keys_ED
        grad_tokens.addcmul_(
            tokens_D, (grad_E * cosines_E).sum(dim=-1, keepdim=True) * norm_slopes, value=-1.0
        )
        return grad_tokens, grad_E.flatten(0, -2).T @ tokens_D.flatten(0, -2)


def activate(scores_E: Tensor, activation: str, *, dim: int = -1) -> Tensor:
    """Apply the score activation A; a softmax runs over `dim`: the experts (last) where tokens
    choose.

    Source: Eq. 2 and Table 7.
    Args:
        activation: identity, sigmoid or softmax.
    """
    if activation == "identity":
        return scores_E
    if activation == "sigmoid":
        return scores_E.sigmoid()
    return scores_E.softmax(dim=dim)
