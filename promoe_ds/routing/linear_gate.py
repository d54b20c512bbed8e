"""DiT-MoE's router: a linear gate, softmax over the experts, the token chooses (Fei et al., 2024).

Letters: B images, S tokens per image, D width, E routed experts, K choices per token.
"""

from __future__ import annotations

from torch import Tensor

from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.losses import load_balance_loss
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, GateRouter, choose_top_k
from promoe_ds.routing.scores import linear_scores


@register(ROUTERS, "dit_moe")
class LinearGateRouter(GateRouter):
    """Sends every token to the K experts of highest probability, weighted by it, kept even by a
    loss.
    """

    initial_gate = "linear"

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: DiT-MoE's gate as published for the comparison: probabilities are not renormalised
        over the K chosen.
        Returns: RoutingPlan; the load-balancing loss, already weighted, only in training mode.
        Gradient: reaches tokens and gate.  Sync: none.  Collectives: none.
        """
        settings = self.settings
        scores_BSE = linear_scores(tokens_BSD, self.gate_weight).softmax(dim=-1)
        gates_BSK, expert_ids_BSK = choose_top_k(scores_BSE, self.top_k)
        assignment, stats = self.plan_token_choice(tokens_BSD, gates_BSK, expert_ids_BSK, partition)
        aux_losses = {}
        if self.training and settings.balance_weight > 0:
            aux_losses["balance"] = settings.balance_weight * load_balance_loss(
                scores_BSE,
                stats.tokens_per_expert_BE,
                partition.is_routed_B,
                top_k=self.top_k,
                level=settings.balance_level,
                scores_are_probabilities=True,
            )
        return RoutingPlan(assignment=assignment, aux_losses=aux_losses, stats=stats)
