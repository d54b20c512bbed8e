"""Hash layers (Roller et al., 2021): a token's place in the image decides, nothing is learned.

Letters: B images, S tokens per image, D width, E routed experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Self

import torch
from torch import Tensor

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.config.schema import RunConfig
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, Router
from promoe_ds.routing.scores import at_least_fp32


@register(ROUTERS, "hash")
class HashRouter(Router):
    """Sends the token at a position to the K experts that fixed random tables have there."""

    def __init__(
        self,
        width: int,
        settings: RoutingConfig,
        *,
        block: int = 0,
        order: Sequence[int] | None = None,
    ) -> None:
        """Take the block, which has tables of its own.

        Args:
            order: the first numbers of the experts in the order that they have now, where they
                were moved to other ranks; None if they were not.
        """
        super().__init__(width, settings)
        self.width, self.block = width, block
        self.order = list(range(self.num_experts) if order is None else order)
        self._table_SK = torch.empty(0, self.top_k, dtype=torch.int64, device="cpu")

    @classmethod
    def from_config(cls, config: RunConfig, block: int) -> Self:
        """Build the router; moved experts keep the positions that they had."""
        order = None
        if config.parallel.expert_order is not None:
            order = config.expert_order_of(config.moe_block_indices.index(block))
        return cls(config.model.hidden_size, config.routing, block=block, order=order)

    def expert_keys_ED(self) -> Tensor:
        """Return zeros, which are similar to nothing: no token is looked at."""
        return self._table_SK.new_zeros(self.num_experts, self.width, dtype=torch.float32)

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: Roller et al. (2021), random hashing; differs: what is hashed is the position, as
        latents have no vocabulary; K > 1 takes K tables, and the gates are 1 / K.
        Returns: RoutingPlan without losses.
        Gradient: none; the experts have theirs.  Sync: none.  Collectives: none.
        """
        batch, tokens, _ = tokens_BSD.shape
        # The table of a smaller image is the beginning of a larger one's.
        if self._table_SK.shape[0] < tokens or self._table_SK.device != tokens_BSD.device:
            rows = hashed_experts(tokens, self.num_experts, self.top_k, self.block)
            table = [[self.order.index(expert) for expert in row] for row in rows]
            self._table_SK = torch.tensor(table).to(tokens_BSD.device, non_blocking=True)
        expert_ids_BSK = self._table_SK[:tokens].expand(batch, -1, -1)
        gates_BSK = at_least_fp32(tokens_BSD).new_full(expert_ids_BSK.shape, 1 / self.top_k)
        assignment, stats = self.plan_token_choice(tokens_BSD, gates_BSK, expert_ids_BSK, partition)
        return RoutingPlan(assignment=assignment, aux_losses={}, stats=stats)


def hashed_experts(
    tokens_per_image: int, num_experts: int, top_k: int, block: int
) -> list[list[int]]:
    """Return K different experts of each position, (S, K): a function of its arguments alone.

    Python's generator gives the same numbers for a seed in every version. The k-th table is the
    same for every K.
    """
    random = Random(block)
    draws_SE = [[random.random() for _ in range(num_experts)] for _ in range(tokens_per_image)]
    return [sorted(range(num_experts), key=draws_E.__getitem__)[:top_k] for draws_E in draws_SE]
