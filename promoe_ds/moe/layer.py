"""The MoE layer: route, dispatch, compute, combine (Eq. 5).

Letters: B images, S tokens per image, T = B*S, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from promoe_ds.kernels.choice import uses_triton
from promoe_ds.moe.dispatch import ExpertPath, LocalDispatcher
from promoe_ds.moe.experts import StackedExperts, at_autocast_dtype
from promoe_ds.moe.recompute import Recompute, recomputed
from promoe_ds.routing.assignment import RoutingPlan, sum_tokens_by_expert
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import Router
from promoe_ds.routing.scores import at_least_fp32


class MoELayer(nn.Module):
    """Shared expert + routed experts for conditional tokens + unconditional expert for the others.

    Rank-blind: which experts are here and what moves the tokens is given from outside (`routed`,
    `dispatcher`).
    """

    def __init__(
        self,
        router: Router,
        routed: StackedExperts,
        shared: nn.Module | None,
        unconditional: nn.Module | None,
        kernels: str = "eager",
    ) -> None:
        super().__init__()
        self.router = router
        self.routed = routed
        self.shared = shared
        self.unconditional = unconditional
        self.dispatcher: ExpertPath = LocalDispatcher()
        #: See `kernels.choice`; for the router and the rows' way. Experts have their own.
        self.kernels = kernels
        router.kernels = kernels
        self.recompute_hidden = False
        self.checkpoint: Recompute = recomputed

    def route(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Decide where the tokens go. Call once per pass; `apply_experts` may be recomputed, this
        never is.
        """
        plan: RoutingPlan = self.router(tokens_BSD, partition)
        if uses_triton(tokens_BSD, self.kernels):
            num_tokens = tokens_BSD.shape[:2].numel()
            plan = replace(plan, assignment=plan.assignment.with_places(num_tokens))
        if not self.training or plan.stats.token_sums_ED is not None:
            return plan
        sums_ED = sum_tokens_by_expert(tokens_BSD.detach().flatten(0, 1), plan.assignment)
        sums_ED = sums_ED[: self.router.num_experts]
        return replace(plan, stats=replace(plan.stats, token_sums_ED=sums_ED))

    def can_join_unconditional(self) -> bool:
        """Whether the unconditional expert can be one more group of the routed experts' product
        without a copy, see `moe.joining`.
        """
        return (
            self.unconditional is not None
            and self.router.is_per_sample
            and isinstance(self.dispatcher, LocalDispatcher)
            and self.routed.is_followed_by(self.unconditional)
        )

    def apply_experts(self, tokens_BSD: Tensor, partition: Partition, plan: RoutingPlan) -> Tensor:
        """Compute Eq. 5 for a plan already made.

        Source: Eq. 5 and Algorithm 1, steps 2, 4 and 6; official: the same; differs: combines in
        fp32.
        Args:
            tokens_BSD: tokens entering the layer.
        Returns: (B, S, D) in the dtype of the tokens.
        Gradient: reaches tokens, every expert and, through the gates, the router.
        """
        routed_TD, tokens_TD = (
            at_autocast_dtype(tokens.flatten(0, 1))
            for tokens in plan.tokens_BSD or (tokens_BSD, tokens_BSD)
        )
        routed: Callable[..., Tensor] = self.routed
        if partition.joins_unconditional:
            routed = partial(self.routed, last=self.unconditional)
        add_routed = self.dispatcher.begin(partial(self._run, routed), routed_TD, plan.assignment)
        # Replicated experts need no exchange: they compute while the routed rows travel.
        output_TD = self._replicated(
            tokens_TD,
            partition,
            tokens_per_image=tokens_BSD.shape[1],
            dtype=tokens_BSD.dtype if plan.assignment.places is not None else None,
        )
        output_TD = add_routed(output_TD)
        return output_TD.to(tokens_BSD.dtype).view_as(tokens_BSD)

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> tuple[Tensor, RoutingPlan]:
        """Route and compute; returns the output (B, S, D) and the plan with its losses and
        statistics.
        """
        plan = self.route(tokens_BSD, partition)
        return self.apply_experts(tokens_BSD, partition, plan), plan

    def _replicated(
        self,
        tokens_TD: Tensor,
        partition: Partition,
        *,
        tokens_per_image: int,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Return what shared and, unless joined, unconditional experts add to each token, in
        `dtype`; None: at least fp32.
        """
        output_TD = (
            torch.zeros_like(tokens_TD)
            if self.shared is None
            else self._run(self.shared, tokens_TD)
        )
        # A token has a row of the unconditional expert or rows of routed ones, never both: summed
        # in fp32 by the fused combine, it is rounded once in either dtype.
        output_TD = at_least_fp32(output_TD) if dtype is None else output_TD.to(dtype)
        if self.unconditional is None or partition.joins_unconditional:
            return output_TD
        # Always run, on no tokens if need be: a parameter without gradient on one rank would break
        # the reduction.
        token_ids = partition.unconditional_token_ids(tokens_per_image)
        rows = self._run(self.unconditional, tokens_TD.index_select(0, token_ids))
        return output_TD.index_add_(0, token_ids, rows.to(output_TD.dtype))

    def _run(self, experts: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Run experts; with `recompute_hidden` their hidden layer is recomputed in the backward
        pass, after the exchange.
        """
        return (
            self.checkpoint(experts, *args)
            if self.recompute_hidden and self.training
            else experts(*args)
        )
