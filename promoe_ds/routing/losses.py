"""Losses of the router: routing contrastive loss (Eq. 6) and load balancing.

Letters: B images, S tokens per image, T = B*S, D width, E routed experts, K choices per token.
Sums over tokens pass through `reduce_sum`, the identity on one rank and a differentiable all-reduce
over the data-parallel ranks for `scope: global`, so the formulas are the same for any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.kernels import router_ops
from promoe_ds.routing.scores import NORM_EPS, at_least_fp32

ReduceSum = Callable[[Tensor], Tensor]


def identity_reduce(tensor: Tensor) -> Tensor:
    """Sum over one rank: the tensor itself."""
    return tensor


def routing_contrastive_loss(
    tokens_TD: Tensor,
    membership_TE: Tensor,
    prototypes_ED: Tensor,
    temperature: float,
    reduce_sum: ReduceSum = identity_reduce,
) -> Tensor:
    """Pull each prototype to the centroid of its tokens and push it from the centroids of the
    others.

    Source: Eq. 6; official: the same over one rank's batch; differs: centroids of all ranks through
    `reduce_sum`.
    Args:
        tokens_TD: tokens entering the layer.
        membership_TE: 1 where the token forms the expert's centroid, else 0 (also for unconditional
        tokens).
        prototypes_ED: learned expert centres.
        temperature: tau > 0.
        reduce_sum: sums a tensor over the ranks, differentiably.
    Returns: scalar, fp32 or fp64; exactly 0 with fewer than two active experts.
    Gradient: reaches tokens and prototypes.  Sync: none.  Collectives: one, in `reduce_sum`.
    """
    with torch.autocast(tokens_TD.device.type, enabled=False):
        tokens = at_least_fp32(tokens_TD)
        membership = membership_TE.to(tokens.dtype)
        return contrast_centroids(
            membership.T @ tokens, membership.sum(dim=0), prototypes_ED, temperature, reduce_sum
        )


def contrast_centroids(
    token_sums_ED: Tensor,
    counts_E: Tensor,
    prototypes_ED: Tensor,
    temperature: float,
    reduce_sum: ReduceSum = identity_reduce,
) -> Tensor:
    """Return the routing contrastive loss from the sum of each expert's tokens and their number.

    Gradient: reaches sums and prototypes.  Sync: none.  Collectives: one, in `reduce_sum`.
    """
    with torch.autocast(token_sums_ED.device.type, enabled=False):
        token_sums_ED, counts_E = _reduced(token_sums_ED, counts_E, reduce_sum)
        centroids_ED = token_sums_ED / counts_E.clamp_min(1.0)[:, None]
        prototypes = F.normalize(
            at_least_fp32(prototypes_ED).to(centroids_ED.dtype), dim=-1, eps=NORM_EPS
        )
        logits_EE = prototypes @ F.normalize(centroids_ED, dim=-1, eps=NORM_EPS).T / temperature
        is_active_E = counts_E > 0
        log_probabilities = logits_EE.masked_fill(
            ~is_active_E[None, :], torch.finfo(logits_EE.dtype).min
        ).log_softmax(dim=-1)
        loss_E = torch.where(is_active_E, -log_probabilities.diagonal(), 0.0)
        # With one active expert the only logit is its own: the loss is log 1 = 0, as published.
        return loss_E.sum() / is_active_E.sum().clamp_min(1)


def fused_contrastive_loss(
    token_sums_ED: Tensor,
    counts_E: Tensor,
    prototypes_ED: Tensor,
    weight: float,
    temperature: float,
    reduce_sum: ReduceSum,
) -> Tensor:
    """Return `weight` times `contrast_centroids`, computed by a fused kernel."""
    if reduce_sum is not identity_reduce:
        token_sums_ED, counts_E = _reduced(token_sums_ED, counts_E, reduce_sum)
    return router_ops.contrast(token_sums_ED, counts_E, prototypes_ED, weight, temperature)


def _reduced(
    token_sums_ED: Tensor, counts_E: Tensor, reduce_sum: ReduceSum
) -> tuple[Tensor, Tensor]:
    """Return sums and counts over all ranks: one exchange of E * (D + 1) numbers."""
    both = torch.cat([token_sums_ED, counts_E.to(token_sums_ED.dtype)[:, None]], dim=1)
    both = reduce_sum(both)
    return both[:, :-1], both[:, -1].detach()


def expert_choice_contrastive_loss(
    tokens_BSD: Tensor,
    chosen_BEC: Tensor,
    prototypes_ED: Tensor,
    temperature: float,
    is_routed_B: Tensor | None = None,
    reduce_sum: ReduceSum = identity_reduce,
) -> Tensor:
    """Contrast prototypes with the centroids of each sample, where experts choose and every expert
    has tokens.

    Source: Eq. 6 applied to each sample's centroids, as the published expert-choice code does: a
    row of logits per sample and expert; differs: the mean is over the rows of all ranks through
    `reduce_sum`.
    Args:
        tokens_BSD: tokens of the routed samples, or of all with `is_routed_B`.
        chosen_BEC: int64 places (0 ... S-1) of the C tokens that each expert chose from each
        sample.
        prototypes_ED: learned expert centres.
        temperature: tau > 0.
        is_routed_B: which samples count; None: all.
    Returns: scalar, fp32 or fp64; exactly 0 without samples.
    Gradient: reaches tokens and prototypes.  Sync: none.  Collectives: one, in `reduce_sum`.
    """
    with torch.autocast(tokens_BSD.device.type, enabled=False):
        tokens = at_least_fp32(tokens_BSD)
        num_samples, num_experts, capacity = chosen_BEC.shape
        flat_ids = chosen_BEC.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
        chosen_BECD = tokens.gather(1, flat_ids).view(
            num_samples, num_experts, capacity, tokens.shape[-1]
        )
        centroids_BED = F.normalize(chosen_BECD.mean(dim=2), dim=-1, eps=NORM_EPS)
        prototypes = F.normalize(
            at_least_fp32(prototypes_ED).to(tokens.dtype), dim=-1, eps=NORM_EPS
        )
        logits_BEE = prototypes @ centroids_BED.transpose(1, 2) / temperature
        log_probabilities_BE = logits_BEE.log_softmax(dim=-1).diagonal(dim1=1, dim2=2)
        if is_routed_B is None:
            rows = log_probabilities_BE.new_full((), float(num_samples * num_experts))
        else:
            log_probabilities_BE = log_probabilities_BE * is_routed_B[:, None]
            rows = (is_routed_B.sum() * num_experts).to(log_probabilities_BE.dtype)
        total_and_rows = reduce_sum(torch.stack([-log_probabilities_BE.sum(), rows]))
        return total_and_rows[0] / total_and_rows[1].detach().clamp_min(1.0)


def load_balance_loss(
    scores_BSE: Tensor,
    counts_BE: Tensor,
    is_routed_B: Tensor,
    *,
    top_k: int,
    level: str,
    scores_are_probabilities: bool,
) -> Tensor:
    """Return E * sum_e fraction_e * probability_e over the routed tokens.

    Source: Shazeer et al. (2017) / Switch, as the published code states it; differs: 0 instead of a
    crash on a batch without routed samples.
    Args:
        scores_BSE: activated scores.
        counts_BE: assignments of each sample to each expert (0 for unrouted samples).
        is_routed_B: bool.
        level: "batch" takes fractions and probabilities over the batch, "sample" over each sample
        and averages.
        scores_are_probabilities: softmax scores are reused as they are; others pass through a
        softmax here.
    Returns: scalar; 1 at perfect balance.
    Gradient: reaches scores.  Sync: none.  Collectives: none.
    """
    _, tokens_per_image, num_experts = scores_BSE.shape
    probabilities_BE = (
        scores_BSE if scores_are_probabilities else scores_BSE.softmax(dim=-1)
    ).mean(dim=1)
    routed_B1 = is_routed_B[:, None].to(probabilities_BE.dtype)
    num_routed = routed_B1.sum().clamp_min(1.0)
    fractions_BE = counts_BE.to(probabilities_BE.dtype) * (num_experts / (tokens_per_image * top_k))
    if level == "sample":
        return (fractions_BE * probabilities_BE * routed_B1).sum() / num_routed
    fractions_E = fractions_BE.sum(dim=0) / num_routed
    return (fractions_E * (probabilities_BE * routed_B1).sum(dim=0) / num_routed).sum()
