"""The value in which every router ends: a list of (token, expert, gate), sorted by expert.

Letters: B images, S tokens per image, T = B*S, E routed experts, K choices per token, N rows of the
list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.kernels import ops
from promoe_ds.kernels.ops import TokenRows, rows_of_tokens
from promoe_ds.routing.scores import at_least_fp32


@dataclass(frozen=True)
class Assignment:
    """Which tokens visit which routed experts.

    token_ids_N: int64 rows of the flattened tokens (T, D), sorted by expert, within an expert in
    token order.
    gates_N: fp32 combine weights, differentiable.
    tokens_per_expert_E: int64 counts; their sum is N. Where the unconditional expert is joined, it
        is the last one, E + 1 in all.
    places: where each token's rows are, for fused kernels; None: plain operations move the rows.
    """

    token_ids_N: Tensor
    gates_N: Tensor
    tokens_per_expert_E: Tensor
    places: TokenRows | None = None

    def with_places(self, num_tokens: int) -> Assignment:
        """Return the same assignment, whose rows fused kernels move.  Sync: none."""
        if self.places is not None:
            return self
        return replace(self, places=rows_of_tokens(self.token_ids_N, num_tokens))


@dataclass(frozen=True)
class RoutingStats:
    """What a routing decision leaves for the log; small tensors on the device, never synchronised
    here.

    tokens_per_expert_BE: int64, assignments of each sample to each expert.
    gate_sums_BE: sum of the gates of each sample's assignments to each expert.
    is_routed_B: whether the sample was routed (False: unconditional expert).
    prototype_similarity: scalar, mean cosine between the experts' directions
    (`Router.expert_keys_ED`).
    token_sums_ED: sum of each expert's tokens as they enter the layer, fp32; in training only.
    """

    tokens_per_expert_BE: Tensor
    gate_sums_BE: Tensor
    is_routed_B: Tensor
    prototype_similarity: Tensor
    token_sums_ED: Tensor | None = None


@dataclass(frozen=True)
class RoutingPlan:
    """A router's whole answer for one layer and batch.

    aux_losses: by name, already weighted; empty in evaluation.
    observation: what the router's running state learns from this pass, in training only. The
        trainer sums observations over passes and ranks and hands the total to
        `Router.update_running_state`.
    target_patches_BSP: the router's own prediction of the training target's patches, for a loss
        that needs the target, which the trainer knows (Expert Race's per-layer regularisation).
    tokens_BSD: the tokens for the routed experts and again for the others, where fused kernels add
        the gradients of both to the router's; None: the tokens that were routed.
    """

    assignment: Assignment
    aux_losses: dict[str, Tensor]
    stats: RoutingStats
    observation: Tensor | None = None
    target_patches_BSP: Tensor | None = None
    tokens_BSD: tuple[Tensor, Tensor] | None = None


def assign_token_choice(
    gates_RSK: Tensor,
    expert_ids_RSK: Tensor,
    routed_ids: Tensor | None,
    tokens_per_expert_E: Tensor,
) -> Assignment:
    """Turn each token's K choices into the sorted list.

    Args:
        gates_RSK: gates of the routed samples, (samples, S, K).
        expert_ids_RSK: int64 chosen experts, of the same shape.
        routed_ids: int64 (samples,), their places in the batch; None: they are the batch.
        tokens_per_expert_E: int64 counts of expert_ids_RSK.
    Returns: Assignment of N = samples * S * K rows.
    Gradient: reaches gates_RSK.  Sync: none.
    """
    _, tokens_per_image, top_k = gates_RSK.shape
    order = torch.argsort(expert_ids_RSK.reshape(-1), stable=True)
    token = order if top_k == 1 else order // top_k
    if routed_ids is not None:
        sample = token // tokens_per_image
        token = routed_ids[sample] * tokens_per_image + token % tokens_per_image
    return Assignment(
        token_ids_N=token,
        gates_N=gates_RSK.reshape(-1)[order],
        tokens_per_expert_E=tokens_per_expert_E,
    )


def assign_pairs(
    token_ids_N: Tensor,
    expert_ids_N: Tensor,
    gates_N: Tensor,
    *,
    num_tokens: int,
    tokens_per_expert_E: Tensor,
) -> Assignment:
    """Turn (token, expert) pairs in any order into the sorted list; how methods end in which
    experts choose.

    Args:
        token_ids_N: int64 rows of the flattened tokens.
        expert_ids_N: int64 routed experts, (N,).
        gates_N: combine weights, (N,).
        num_tokens: T.
        tokens_per_expert_E: int64 counts of expert_ids_N.
    Gradient: reaches gates_N.  Sync: none.
    """
    order = torch.argsort(expert_ids_N * num_tokens + token_ids_N)
    return Assignment(
        token_ids_N=token_ids_N[order],
        gates_N=gates_N[order],
        tokens_per_expert_E=tokens_per_expert_E,
    )


def expert_of_rows(assignment: Assignment) -> Tensor:
    """Return the expert of every row of the list, int64 (N,).  Sync: none."""
    counts_E = assignment.tokens_per_expert_E
    experts_E = torch.arange(counts_E.numel(), device=counts_E.device)
    return torch.repeat_interleave(experts_E, counts_E, output_size=assignment.token_ids_N.numel())


def routed_experts_of_rows(assignment: Assignment, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return each row's routed expert, and whether it has one: where the unconditional expert is
    joined, its rows have none, and the last one in its place.
    """
    expert_N = expert_of_rows(assignment)
    return expert_N.clamp(max=num_experts - 1), expert_N < num_experts


@torch.no_grad()
def sum_tokens_by_expert(tokens_TD: Tensor, assignment: Assignment) -> Tensor:
    """Return the sum of every expert's tokens, (E, D) in at least fp32; their mean is Eq. 6's
    centroid.  Sync: none.
    """
    if assignment.places is not None:
        return fused_token_sums(tokens_TD, assignment)[2]
    tokens, counts_E = at_least_fp32(tokens_TD), assignment.tokens_per_expert_E
    if tokens.is_cuda:
        return sum_by_product(tokens, assignment)
    # Experts are bags of rows; on a processor this is several times faster than a product, on a GPU
    # far slower.
    return F.embedding_bag(
        assignment.token_ids_N, tokens, counts_E.cumsum(0) - counts_E, mode="sum"
    )


def fused_token_sums(tokens_TD: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens for two further uses, and the same sum, with its gradient, from an
    assignment with places.
    """
    assert assignment.places is not None
    ends_E = assignment.tokens_per_expert_E.cumsum(0).to(torch.int32)
    return ops.sum_by_expert(tokens_TD, assignment.token_ids_N, ends_E, assignment.places)


def sum_by_product(tokens_TD: Tensor, assignment: Assignment) -> Tensor:
    """Return the same sum as a product with the membership matrix (E, T), without autocast."""
    num_tokens, counts_E = len(tokens_TD), assignment.tokens_per_expert_E
    with torch.autocast(tokens_TD.device.type, enabled=False):
        membership = tokens_TD.new_zeros(counts_E.numel() * num_tokens)
        membership[expert_of_rows(assignment) * num_tokens + assignment.token_ids_N] = 1.0
        return membership.view(-1, num_tokens) @ tokens_TD


def count_pairs(
    sample_ids_N: Tensor, expert_ids_N: Tensor, *, num_samples: int, num_experts: int
) -> Tensor:
    """Return how often each sample meets each expert, int64 (B, E).  Sync: none."""
    counts = torch.zeros(num_samples * num_experts, dtype=torch.int64, device=sample_ids_N.device)
    counts.scatter_add_(0, sample_ids_N * num_experts + expert_ids_N, torch.ones_like(sample_ids_N))
    return counts.view(num_samples, num_experts)
