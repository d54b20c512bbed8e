"""The MoE layer: route, dispatch, compute, combine (Eq. 5).

Letters: B images, S tokens per image, T = B*S, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from promoe_ds.moe.dispatch import Dispatcher, LocalDispatcher
from promoe_ds.moe.experts import FeedForward, StackedExperts
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition


class MoELayer(nn.Module):
    """Shared expert + routed experts for conditional tokens + unconditional expert for the others.

    Rank-blind: which experts are here and what moves the tokens is given from outside (`routed`, `dispatcher`).
    """

    def __init__(self, router: nn.Module, routed: StackedExperts, shared: FeedForward | None,
                 unconditional: FeedForward | None) -> None:
        super().__init__()
        self.router = router
        self.routed = routed
        self.shared = shared
        self.unconditional = unconditional
        self.dispatcher: Dispatcher = LocalDispatcher()

    def route(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Decide where the tokens go. Call once per pass; `apply_experts` may be recomputed, this never is."""
        return self.router(tokens_BSD, partition)

    def apply_experts(self, tokens_BSD: Tensor, partition: Partition, plan: RoutingPlan) -> Tensor:
        """Compute Eq. 5 for a plan already made.

        Source: Eq. 5 and Algorithm 1, steps 2, 4 and 6; official: the same; differs: combines in fp32.
        Args:
            tokens_BSD: tokens entering the layer.
        Returns: (B, S, D) in the dtype of the tokens.
        Gradient: reaches tokens, every expert and, through the gates, the router.
        """
        tokens_TD = tokens_BSD.flatten(0, 1)
        pending = self.dispatcher.dispatch(tokens_TD, plan.assignment)
        # Replicated experts need no exchange: they compute while the routed rows travel.
        output = self._replicated(tokens_BSD, partition)
        arrived = pending()
        rows_RD = self.routed(arrived.rows_RD, arrived.tokens_per_expert_e)
        output_TD = self.dispatcher.combine(rows_RD, arrived.handle, output.flatten(0, 1))
        return output_TD.view_as(tokens_BSD)

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> tuple[Tensor, RoutingPlan]:
        """Route and compute; returns the output (B, S, D) and the plan with its losses and statistics."""
        plan = self.route(tokens_BSD, partition)
        return self.apply_experts(tokens_BSD, partition, plan), plan

    def _replicated(self, tokens_BSD: Tensor, partition: Partition) -> Tensor:
        output = self.shared(tokens_BSD) if self.shared is not None else tokens_BSD.new_zeros(tokens_BSD.shape)
        if self.unconditional is None:
            return output
        # Always run, on no tokens if need be: a parameter without gradient on one rank would break the reduction.
        rows = self.unconditional(tokens_BSD.index_select(0, partition.unconditional_ids))
        return output.index_add_(0, partition.unconditional_ids, rows.to(output.dtype))
