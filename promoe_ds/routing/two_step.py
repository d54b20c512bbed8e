"""ProMoE's two-step router, token choice (Sec. 4.1, Algorithm 1).

Letters: B images, S tokens per image, T = B*S, D width, E routed experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.kernels.choice import uses_triton
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan, fused_token_sums
from promoe_ds.routing.losses import (
    fused_contrastive_loss,
    load_balance_loss,
    routing_contrastive_loss,
)
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, Router, choose_top_k
from promoe_ds.routing.scores import activate, score_and_pass


class PrototypeRouter(Router):
    """A router whose scores are cosines with learned prototypes, one an expert (step 2 of
    ProMoE's).
    """

    per_expert = ("prototypes",)

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Create the prototypes, uninitialised."""
        super().__init__(width, settings)
        self.prototypes = nn.Parameter(torch.empty(settings.num_experts, width))

    def expert_keys_ED(self) -> Tensor:
        """Return the prototypes."""
        return self.prototypes


@register(ROUTERS, "token_choice")
class TwoStepRouter(PrototypeRouter):
    """Sends every conditional token to the K experts whose prototypes are nearest by cosine."""

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Algorithm 1, steps 1, 3 and 5; official: the same; differs: scores in fp32, no loop
        over experts.
        Args:
            tokens_BSD: tokens entering the layer, any float dtype.
            partition: step 1's answer; unconditional samples get no rows and no part in the losses.
        Returns: RoutingPlan; the auxiliary losses, already weighted, only in training mode.
        Gradient: reaches tokens and prototypes through gates and losses, not through the choice.
        Sync: none.  Collectives: one in `reduce_sum` where it is global.
        """
        settings = self.settings
        passed_BSD, scores_BSE = score_and_pass(
            tokens_BSD, self.prototypes, settings.score_scale, self.kernels
        )
        scores_BSE = activate(scores_BSE, settings.activation)
        gates_BSK, expert_ids_BSK = choose_top_k(scores_BSE, settings.top_k)
        assignment, stats = self.plan_token_choice(tokens_BSD, gates_BSK, expert_ids_BSK, partition)
        token_sums_ED, again_BSD = None, passed_BSD
        sums_are_all = settings.top_k == 1 or settings.rcl_assignments == "all"
        if self.training and sums_are_all and uses_triton(tokens_BSD, self.kernels):
            # The loss and the log take the same sums.
            *passed, token_sums_ED = fused_token_sums(passed_BSD.flatten(0, 1), assignment)
            passed_BSD, again_BSD = (each.view_as(tokens_BSD) for each in passed)
            token_sums_ED = token_sums_ED[: self.num_experts]
            stats = replace(stats, token_sums_ED=token_sums_ED.detach())
        plan = RoutingPlan(assignment, {}, stats, tokens_BSD=(passed_BSD, again_BSD))
        if not self.training:
            return plan
        losses = self._aux_losses(
            tokens_BSD, scores_BSE, expert_ids_BSK, plan, partition, token_sums_ED
        )
        return replace(plan, aux_losses=losses)

    def _aux_losses(
        self,
        tokens_BSD: Tensor,
        scores_BSE: Tensor,
        expert_ids_BSK: Tensor,
        plan: RoutingPlan,
        partition: Partition,
        token_sums_ED: Tensor | None,
    ) -> dict[str, Tensor]:
        settings, losses = self.settings, {}
        if settings.rcl_weight > 0 and token_sums_ED is not None:
            losses["rcl"] = fused_contrastive_loss(
                token_sums_ED,
                plan.assignment.tokens_per_expert_E[: self.num_experts],
                self.prototypes,
                settings.rcl_weight,
                settings.rcl_temperature,
                self.reduce_sum,
            )
        elif settings.rcl_weight > 0:
            chosen = (
                expert_ids_BSK if settings.rcl_assignments == "all" else expert_ids_BSK[..., :1]
            )
            membership = torch.zeros_like(scores_BSE).scatter_(-1, chosen, 1.0)
            membership = membership * partition.is_routed_B[:, None, None]
            losses["rcl"] = settings.rcl_weight * routing_contrastive_loss(
                tokens_BSD.flatten(0, 1),
                membership.flatten(0, 1),
                self.prototypes,
                settings.rcl_temperature,
                self.reduce_sum,
            )
        if settings.balance_weight > 0:
            losses["balance"] = settings.balance_weight * load_balance_loss(
                scores_BSE,
                plan.stats.tokens_per_expert_BE,
                partition.is_routed_B,
                top_k=settings.top_k,
                level=settings.balance_level,
                scores_are_probabilities=settings.activation == "softmax",
            )
        return losses
