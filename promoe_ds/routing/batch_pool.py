"""DiffMoE's router: experts choose from the tokens of the whole batch (Shi et al., 2025).

A predictor learns how many tokens an expert would take, so that evaluation, which has no full
batch, can follow thresholds instead. Letters: B images, S tokens per image, T pooled tokens, D
width, E routed experts, C slots per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, GateRouter, pool_token_ids
from promoe_ds.routing.scores import linear_fp32, linear_scores


class CapacityPredictor(nn.Module):
    """Two layers that guess, from a token, which experts choose it; learns from tokens, never moves
    them.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, num_experts)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Return logits (T, E) in at least fp32; no gradient reaches the tokens."""
        return linear_fp32(F.silu(linear_fp32(tokens_TD.detach(), self.up)), self.down)


@register(ROUTERS, "diff_moe")
class BatchPoolRouter(GateRouter):
    """Each expert takes the C = floor(T * K / E) tokens of the batch that score highest for it.

    Thresholds start at 0, where every expert takes every token. In evaluation it takes as many as
    its predictor says, those with the highest scores: an output then depends on the other samples
    of the batch, by design.
    """

    thresholds: Tensor
    per_expert = ("gate_weight", "thresholds", "predictor.down.weight", "predictor.down.bias")
    initial_gate = 0.006
    is_per_sample = False

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Create gate and predictor, uninitialised."""
        super().__init__(width, settings)
        self.predictor = CapacityPredictor(width, self.num_experts)
        self.register_buffer("thresholds", torch.zeros(self.num_experts))

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: DiffMoE's batch-level pool as published for the comparison; differs: the pool is the
        routed samples' where null samples have their own expert, thresholds are averaged over ranks
        by the trainer, once a step.
        Returns: RoutingPlan; in training with the predictor's loss and the observation of
        `update_running_state`.
        Gradient: reaches tokens and gate through the gates, the predictor through its loss.
        Sync: none in training, one in evaluation (the number of rows).  Collectives: none.
        """
        tokens_per_image = tokens_BSD.shape[1]
        pool_TD = partition.take_routed(tokens_BSD).flatten(0, 1)
        scores_TE = linear_scores(pool_TD, self.gate_weight).softmax(dim=-1)
        logits_TE = self.predictor(pool_TD)
        if self.training:
            pool_ids_EC = scores_TE.topk(self._capacity(len(pool_TD)), dim=0).indices.T
            expert_ids_N = torch.arange(
                self.num_experts, device=pool_ids_EC.device
            ).repeat_interleave(pool_ids_EC.shape[1])
            pool_ids_N = pool_ids_EC.flatten()
        else:
            expert_ids_N, pool_ids_N = self._predicted_choice(scores_TE, logits_TE)
        token_ids_N = pool_token_ids(partition, pool_ids_N, tokens_per_image)
        assignment, stats = self.plan_pairs(
            token_ids_N,
            expert_ids_N,
            scores_TE[pool_ids_N, expert_ids_N],
            partition,
            tokens_per_image,
        )
        if not self.training:
            return RoutingPlan(assignment=assignment, aux_losses={}, stats=stats)
        chosen_TE = torch.zeros_like(scores_TE).index_put_(
            (pool_ids_N, expert_ids_N), scores_TE.new_ones(())
        )
        predicted_TE, capacity = logits_TE.detach().sigmoid(), pool_ids_EC.shape[1]
        lowest_E = predicted_TE.topk(capacity, dim=0).values[-1] if capacity else self.thresholds
        aux_losses = {
            "capacity": self.settings.capacity_weight * capacity_loss(logits_TE, chosen_TE)
        }
        return RoutingPlan(
            assignment=assignment,
            aux_losses=aux_losses,
            stats=stats,
            observation=observe_thresholds(lowest_E, any_chosen=capacity > 0),
        )

    def update_running_state(self, observation: Tensor) -> None:
        """Move the thresholds towards the mean observed one: decay * old + (1 - decay) * mean."""
        move_thresholds(self.thresholds, observation, self.settings.threshold_decay)

    def _predicted_choice(self, scores_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        wanted_E = (logits_TE.sigmoid() > self.thresholds).sum(dim=0)
        rank_TE = scores_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        expert_ids_N, pool_ids_N = (rank_TE < wanted_E).T.nonzero(as_tuple=True)
        return expert_ids_N, pool_ids_N


def capacity_loss(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of the predictor and the choice made; 0 without
    tokens.

    Source: DiffMoE's capacity predictor.
    Args:
        logits_TE: of the predictor.
        chosen_TE: 1 where the expert took the token, else 0.
    """
    total = F.binary_cross_entropy_with_logits(logits_TE, chosen_TE, reduction="sum")
    return total / max(1, logits_TE.numel())


def observe_thresholds(lowest_X: Tensor, *, any_chosen: bool) -> Tensor:
    """Return an additive observation of thresholds: the lowest chosen values and a 1, or zeros
    where nothing was chosen.
    """
    return (
        torch.cat([lowest_X, lowest_X.new_ones(1)])
        if any_chosen
        else lowest_X.new_zeros(lowest_X.numel() + 1)
    )


@torch.no_grad()
def move_thresholds(thresholds_X: Tensor, observation: Tensor, decay: float) -> None:
    """Move running thresholds, in place, towards the mean of summed observations; not at all
    without any.  Sync: none.
    """
    mean = observation[:-1] / observation[-1].clamp_min(1.0)
    moved = torch.lerp(thresholds_X, mean.to(thresholds_X.dtype), 1.0 - decay)
    thresholds_X.copy_(torch.where(observation[-1] > 0, moved, thresholds_X))
