"""ProMoE's two-step router, token choice (Sec. 4.1, Algorithm 1).

Letters: B images, S tokens per image, T = B*S, D width, E routed experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.errors import RoutingError
from promoe_ds.routing.assignment import RoutingPlan, RoutingStats, assign_token_choice
from promoe_ds.routing.losses import ReduceSum, identity_reduce, load_balance_loss, routing_contrastive_loss
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.scores import NORM_EPS, activate, at_least_fp32, cosine_scores


@dataclass(frozen=True, kw_only=True)
class TwoStepSettings:
    """The router's hyperparameters; fields and units as in `config.schema.RoutingConfig`."""

    num_experts: int
    top_k: int = 1
    activation: str = "identity"
    score_scale: float = 1.0
    rcl_weight: float = 1.0
    rcl_temperature: float = 0.07
    rcl_assignments: str = "all"
    balance_weight: float = 0.0
    balance_level: str = "batch"


class TwoStepRouter(nn.Module):
    """Sends every conditional token to the K experts whose prototypes are nearest by cosine."""

    def __init__(self, width: int, settings: TwoStepSettings) -> None:
        """Create the prototypes, uninitialised (`model.init` fills them).

        Raises: RoutingError if K > E.
        """
        super().__init__()
        if settings.top_k > settings.num_experts:
            raise RoutingError(f"top_k={settings.top_k} exceeds num_experts={settings.num_experts}")
        self.settings = settings
        self.prototypes = nn.Parameter(torch.empty(settings.num_experts, width))
        self.reduce_sum: ReduceSum = identity_reduce

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Algorithm 1, steps 1, 3 and 5; official: the same; differs: scores in fp32, no loop over experts.
        Args:
            tokens_BSD: tokens entering the layer, any float dtype.
            partition: step 1's answer; unconditional samples get no rows and no part in the losses.
        Returns: RoutingPlan; the auxiliary losses, already weighted, only in training mode.
        Gradient: reaches tokens and prototypes through gates and losses, not through the choice.
        Sync: none.  Collectives: one in `reduce_sum` where it is global.
        """
        settings = self.settings
        scores_BSE = activate(cosine_scores(tokens_BSD, self.prototypes, settings.score_scale), settings.activation)
        gates_BSK, expert_ids_BSK = _top_k(scores_BSE, settings.top_k)
        counts_BE = _count(expert_ids_BSK, settings.num_experts) * partition.is_routed_B[:, None]
        if partition.all_routed:
            routed_gates, routed_experts = gates_BSK, expert_ids_BSK
        else:
            routed_gates, routed_experts = gates_BSK[partition.routed_ids], expert_ids_BSK[partition.routed_ids]
        assignment = assign_token_choice(routed_gates, routed_experts, partition.routed_ids, counts_BE.sum(dim=0))
        aux_losses = self._aux_losses(tokens_BSD, scores_BSE, expert_ids_BSK, counts_BE, partition) if self.training else {}
        stats = RoutingStats(
            tokens_per_expert_BE=counts_BE, is_routed_B=partition.is_routed_B,
            gate_sums_B=gates_BSK.detach().sum(dim=(1, 2)) * partition.is_routed_B,
            prototype_similarity=mean_prototype_similarity(self.prototypes.detach()))
        return RoutingPlan(assignment=assignment, aux_losses=aux_losses, stats=stats)

    def _aux_losses(self, tokens_BSD: Tensor, scores_BSE: Tensor, expert_ids_BSK: Tensor, counts_BE: Tensor,
                    partition: Partition) -> dict[str, Tensor]:
        settings, losses = self.settings, {}
        if settings.rcl_weight > 0:
            chosen = expert_ids_BSK if settings.rcl_assignments == "all" else expert_ids_BSK[..., :1]
            membership = torch.zeros_like(scores_BSE).scatter_(-1, chosen, 1.0)
            membership = membership * partition.is_routed_B[:, None, None]
            losses["rcl"] = settings.rcl_weight * routing_contrastive_loss(
                tokens_BSD.flatten(0, 1), membership.flatten(0, 1), self.prototypes, settings.rcl_temperature, self.reduce_sum)
        if settings.balance_weight > 0:
            losses["balance"] = settings.balance_weight * load_balance_loss(
                scores_BSE, counts_BE, partition.is_routed_B, top_k=settings.top_k, level=settings.balance_level,
                scores_are_probabilities=settings.activation == "softmax")
        return losses


def mean_prototype_similarity(prototypes_ED: Tensor) -> Tensor:
    """Return the mean cosine between different prototypes, a scalar; 0 for a single one."""
    num_experts = prototypes_ED.shape[0]
    directions = F.normalize(at_least_fp32(prototypes_ED), dim=-1, eps=NORM_EPS)
    # The sum of all cosines is the squared length of the summed directions; E of them are each with itself.
    total = directions.sum(dim=0).square().sum() - directions.square().sum()
    return total / max(1, num_experts * (num_experts - 1))


def _top_k(scores_BSE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if top_k == 1:
        values, indices = scores_BSE.max(dim=-1, keepdim=True)
        return values, indices
    return scores_BSE.topk(top_k, dim=-1)


def _count(expert_ids_BSK: Tensor, num_experts: int) -> Tensor:
    ids_BN = expert_ids_BSK.flatten(1)
    counts = torch.zeros(ids_BN.shape[0], num_experts, dtype=torch.int64, device=ids_BN.device)
    return counts.scatter_add_(1, ids_BN, torch.ones_like(ids_BN))
