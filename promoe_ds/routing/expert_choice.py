"""Expert choice within each sample: ProMoE's variant with prototypes, and EC-DiT's with a linear
gate (Sun et al., 2024).

Letters: B images, S tokens per image, D width, E routed experts, C slots per expert and image.
"""

from __future__ import annotations

from torch import Tensor

from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.losses import expert_choice_contrastive_loss
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, GateRouter, expert_capacity
from promoe_ds.routing.scores import activate, cosine_scores, linear_scores
from promoe_ds.routing.two_step import PrototypeRouter


@register(ROUTERS, "expert_choice")
class PrototypeExpertChoiceRouter(PrototypeRouter):
    """ProMoE with expert choice: each prototype takes its nearest tokens of every conditional
    sample.
    """

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Sec. 4.1 with experts choosing; official: at least one token per expert and sample,
        a softmax runs over the tokens; differs: no.
        Returns: RoutingPlan; the contrastive loss, already weighted, only in training mode.
        Gradient: reaches tokens and prototypes.  Sync: none.  Collectives: one in `reduce_sum`
        where it is global.
        """
        settings, tokens = self.settings, partition.take_routed(tokens_BSD)
        capacity = min(
            max(1, expert_capacity(tokens.shape[1], self.num_experts, self.top_k)), tokens.shape[1]
        )
        scores_BSE = activate(
            cosine_scores(tokens, self.prototypes, settings.score_scale, self.kernels),
            settings.activation,
            dim=1,
        )
        assignment, stats, chosen_BEC = self.plan_expert_choice(scores_BSE, capacity, partition)
        aux_losses = {}
        if self.training and settings.rcl_weight > 0:
            aux_losses["rcl"] = settings.rcl_weight * expert_choice_contrastive_loss(
                tokens,
                chosen_BEC,
                self.prototypes,
                settings.rcl_temperature,
                partition.is_routed_B if partition.joins_unconditional else None,
                self.reduce_sum,
            )
        return RoutingPlan(assignment=assignment, aux_losses=aux_losses, stats=stats)


@register(ROUTERS, "ec_dit")
class LinearExpertChoiceRouter(GateRouter):
    """EC-DiT: each expert takes a fixed share of every sample's tokens; even by construction, no
    loss.
    """

    initial_gate = 0.006

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: EC-DiT's expert choice as published for the comparison; differs: no.
        The config refuses shares of a sample of less than one token.
        Gradient: reaches tokens and gate.  Sync: none.  Collectives: none.
        """
        tokens = partition.take_routed(tokens_BSD)
        capacity = self._capacity(tokens.shape[1])
        scores_BSE = linear_scores(tokens, self.gate_weight).softmax(dim=-1)
        assignment, stats, _ = self.plan_expert_choice(scores_BSE, capacity, partition)
        return RoutingPlan(assignment=assignment, aux_losses={}, stats=stats)
