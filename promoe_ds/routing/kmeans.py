"""Implicit routing guidance (Sec. 4.2): online k-means over the tokens.

Letters: B images, S tokens per image, T = B*S, D width, E routed experts = clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, Router, choose_top_k
from promoe_ds.routing.scores import at_least_fp32


@register(ROUTERS, "kmeans")
class KMeansRouter(Router):
    """Sends every token to the expert of its nearest centroid. Nothing is learned by gradient."""

    centroids: Tensor
    per_expert = ("centroids",)

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Create the centroids at 0; `seed` starts them."""
        super().__init__(width, settings)
        self.register_buffer("centroids", torch.zeros(self.num_experts, width))

    def expert_keys_ED(self) -> Tensor:
        """Return the centroids."""
        return self.centroids

    @torch.no_grad()
    def seed(
        self, tokens_BSD: Tensor, partition: Partition, permutation: Callable[[int], Tensor]
    ) -> None:
        """Start the centroids at E tokens of routed samples, without replacement where there are
        enough.

        Source: Sec. 4.2, centroids initialised "by randomly sampling tokens".
        Args:
            permutation: from a number to so many distinct indices in random order.
        """
        pool_TD = tokens_BSD[partition.is_routed_B].flatten(0, 1)
        if len(pool_TD):
            order_T = permutation(len(pool_TD)).to(pool_TD.device)
            places_E = torch.arange(self.num_experts, device=pool_TD.device) % len(pool_TD)
            self.centroids.copy_(pool_TD[order_T[places_E]])

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Sec. 4.2, implicit routing guidance: affinities are negative Euclidean distances;
        the paper does not state their activation: the gate is their softmax, nearly 1 where
        clusters are apart.
        Returns: RoutingPlan, in training with the observation of `update_running_state`.
        Gradient: reaches tokens through the gates.  Sync: none.  Collectives: none.
        """
        scores_BSE = (-euclidean_distances(tokens_BSD, self.centroids)).softmax(dim=-1)
        gates_BS1, expert_ids_BS1 = choose_top_k(scores_BSE, 1)
        assignment, stats = self.plan_token_choice(tokens_BSD, gates_BS1, expert_ids_BS1, partition)
        observation = (
            self._observe(tokens_BSD.detach(), expert_ids_BS1, partition) if self.training else None
        )
        return RoutingPlan(
            assignment=assignment, aux_losses={}, stats=stats, observation=observation
        )

    @torch.no_grad()
    def update_running_state(self, observation: Tensor) -> None:
        """Replace each centroid by the mean of its tokens; one without tokens stays.

        Args:
            observation: (E, D + 1), sums of tokens and their counts.
        """
        sums_ED, counts_E1 = observation[:, :-1], observation[:, -1:]
        means_ED = (sums_ED / counts_E1.clamp_min(1.0)).to(self.centroids.dtype)
        self.centroids.copy_(torch.where(counts_E1 > 0, means_ED, self.centroids))

    def _observe(self, tokens_BSD: Tensor, expert_ids_BS1: Tensor, partition: Partition) -> Tensor:
        membership_BSE = (
            F.one_hot(expert_ids_BS1[..., 0], self.num_experts)
            * partition.is_routed_B[:, None, None]
        )
        tokens_TD = at_least_fp32(tokens_BSD.flatten(0, 1))
        membership_TE = membership_BSE.flatten(0, 1).to(tokens_TD.dtype)
        with torch.autocast(tokens_BSD.device.type, enabled=False):
            sums_ED = membership_TE.T @ tokens_TD
        return torch.cat([sums_ED, membership_TE.sum(dim=0)[:, None]], dim=1)


def euclidean_distances(tokens_D: Tensor, centroids_ED: Tensor) -> Tensor:
    """Return |token - centroid| in at least fp32, (..., E).  Gradient: reaches tokens, zero at
    distance 0.
    """
    with torch.autocast(tokens_D.device.type, enabled=False):
        tokens = at_least_fp32(tokens_D)
        # Never through a matrix product, as torch does above 25 rows: a token at its centroid would
        # not be at distance 0.
        distances = torch.cdist(
            tokens.reshape(-1, tokens.shape[-1]),
            centroids_ED.to(tokens.dtype),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return distances.view(*tokens.shape[:-1], len(centroids_ED))
