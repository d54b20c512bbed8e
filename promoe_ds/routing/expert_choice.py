"""Expert choice within each sample: ProMoE's variant with prototypes, and EC-DiT's with a linear gate (Sun et al., 2024).

Letters: B images, S tokens per image, D width, E routed experts, C slots per expert and image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from promoe_ds.errors import RoutingError
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.losses import expert_choice_contrastive_loss
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import Router, pool_token_ids
from promoe_ds.routing.scores import activate, cosine_scores, linear_scores
from promoe_ds.routing.two_step import TwoStepSettings


def expert_capacity(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Return C = floor(T * K / E): how many of T tokens an expert takes so that a token has K experts on average."""
    return num_tokens * top_k // num_experts


def choose_tokens(scores_BSE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Let every expert choose the C tokens of each sample that score highest for it.

    Returns: gates_BEC and token places chosen_BEC, int64 in 0 ... S-1.
    """
    return scores_BSE.transpose(1, 2).topk(capacity, dim=-1)


class _PerSampleRouter(Router):
    """What both variants share: scores to plan."""

    def _plan(self, scores_BSE: Tensor, capacity: int, partition: Partition) -> tuple[RoutingPlan, Tensor]:
        """Choose from the routed samples' scores; returns the plan and chosen_BEC."""
        num_samples, tokens_per_image, num_experts = scores_BSE.shape
        gates_BEC, chosen_BEC = choose_tokens(scores_BSE, capacity)
        sample_B = torch.arange(num_samples, device=scores_BSE.device)[:, None, None]
        expert_E = torch.arange(num_experts, device=scores_BSE.device)[None, :, None]
        token_ids_N = pool_token_ids(partition, (sample_B * tokens_per_image + chosen_BEC).flatten(), tokens_per_image)
        assignment, stats = self._plan_pairs(token_ids_N, expert_E.expand_as(chosen_BEC).flatten(), gates_BEC.flatten(), partition,
                                             tokens_per_image)
        return RoutingPlan(assignment=assignment, aux_losses={}, stats=stats), chosen_BEC


class PrototypeExpertChoiceRouter(_PerSampleRouter):
    """ProMoE with expert choice: each prototype takes its nearest tokens of every conditional sample."""

    def __init__(self, width: int, settings: TwoStepSettings) -> None:
        """Create the prototypes, uninitialised.

        Raises: RoutingError if K > E.
        """
        super().__init__(settings.num_experts, settings.top_k)
        self.settings = settings
        self.prototypes = nn.Parameter(torch.empty(settings.num_experts, width))

    def directions_ED(self) -> Tensor:
        """Return the prototypes."""
        return self.prototypes

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Sec. 4.1 with experts choosing; official: at least one token per expert and sample, a softmax runs over the
        tokens; differs: no.
        Returns: RoutingPlan; the contrastive loss, already weighted, only in training mode.
        Gradient: reaches tokens and prototypes.  Sync: none.  Collectives: one in `reduce_sum` where it is global.
        """
        settings, tokens = self.settings, partition.take_routed(tokens_BSD)
        capacity = min(max(1, expert_capacity(tokens.shape[1], self.num_experts, self.top_k)), tokens.shape[1])
        scores_BSE = activate(cosine_scores(tokens, self.prototypes, settings.score_scale), settings.activation, dim=1)
        plan, chosen_BEC = self._plan(scores_BSE, capacity, partition)
        if self.training and settings.rcl_weight > 0:
            plan.aux_losses["rcl"] = settings.rcl_weight * expert_choice_contrastive_loss(
                tokens, chosen_BEC, self.prototypes, settings.rcl_temperature, self.reduce_sum)
        return plan


class LinearExpertChoiceRouter(_PerSampleRouter):
    """EC-DiT: each expert takes a fixed share of every sample's tokens; even by construction, no loss."""

    def __init__(self, width: int, *, num_experts: int, top_k: int) -> None:
        """Create the gate, uninitialised.

        Raises: RoutingError if K > E.
        """
        super().__init__(num_experts, top_k)
        self.gate_weight = nn.Parameter(torch.empty(num_experts, width))

    def directions_ED(self) -> Tensor:
        """Return the gate's rows."""
        return self.gate_weight

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: EC-DiT's expert choice as published for the comparison; differs: no.
        Raises: RoutingError if an expert's share of a sample is less than one token.
        Gradient: reaches tokens and gate.  Sync: none.  Collectives: none.
        """
        tokens = partition.take_routed(tokens_BSD)
        capacity = expert_capacity(tokens.shape[1], self.num_experts, self.top_k)
        if capacity < 1:
            raise RoutingError(f"top_k={self.top_k} of {tokens.shape[1]} tokens gives each of num_experts={self.num_experts} "
                               "experts less than one: raise top_k or lower num_experts")
        plan, _ = self._plan(linear_scores(tokens, self.gate_weight).softmax(dim=-1), capacity, partition)
        return plan
