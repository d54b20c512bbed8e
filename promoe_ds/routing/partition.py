"""Step 1, conditional routing: the condition decides, before any arithmetic.

Letters: B images on this rank, S tokens per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_ds.condition import Condition


@dataclass(frozen=True)
class Partition:
    """Which samples of a batch are routed and which go to the unconditional expert; and their
    condition after dropout.

    The index lists have lengths that the host knows: everything after them has static shapes.
    """

    is_routed_B: Tensor
    routed_ids: Tensor
    unconditional_ids: Tensor
    is_null_B: Tensor
    #: Of the condition, for statistics and for routers that are taught by it.
    group_B: Tensor | None
    #: Whether the unconditional expert is one more group, behind the routed ones: then every sample
    #: has rows, no list is cut, and shapes are the same for any number of null samples.
    joins_unconditional: bool = False

    @property
    def all_routed(self) -> bool:
        """Whether every sample has rows in the routers' list, so that gathering can be saved."""
        return self.unconditional_ids.numel() == 0

    def take_routed(self, x_B: Tensor) -> Tensor:
        """Return the entries (samples first) of `x_B` that are routed, without a copy where all
        are.
        """
        return x_B if self.all_routed else x_B.index_select(0, self.routed_ids)

    def unconditional_token_ids(self, tokens_per_image: int) -> Tensor:
        """Return the rows of the flattened tokens (T, D) that belong to unconditional samples."""
        offsets = torch.arange(tokens_per_image, device=self.unconditional_ids.device)
        return (self.unconditional_ids[:, None] * tokens_per_image + offsets).flatten()


def partition_samples(
    condition: Condition,
    *,
    has_unconditional_expert: bool = True,
    joins_unconditional: bool = False,
) -> Partition:
    """Split a batch into conditional samples and those under the null condition.

    Source: Sec. 4.1, Algorithm 1 lines 2-6; differs: the condition says what is null, the published
    code tests 1000.
    Args:
        condition: of every sample, after dropout.
        has_unconditional_expert: without one (N_u = 0) null samples are routed like any other, as
        published.
        joins_unconditional: see `Partition`; only for routers that can (`Router.is_per_sample`).
    Returns: Partition.
    Sync: one, for the number of null samples, where the condition does not know it; once per
        forward pass, not per layer. None where the unconditional expert is joined.
    """
    is_null_B = condition.is_null_B
    if joins_unconditional:
        every_id = torch.arange(is_null_B.numel(), device=is_null_B.device)
        return Partition(
            is_routed_B=~is_null_B,
            routed_ids=every_id,
            unconditional_ids=every_id[:0],
            is_null_B=is_null_B,
            group_B=condition.group_B,
            joins_unconditional=True,
        )
    leaves_B, num_leaving = torch.zeros_like(is_null_B), 0
    if has_unconditional_expert:
        leaves_B, known = is_null_B, condition.num_null
        num_leaving = int(leaves_B.sum()) if known is None else known
    order = torch.argsort(leaves_B, stable=True)
    num_routed = is_null_B.numel() - num_leaving
    return Partition(
        is_routed_B=~leaves_B,
        routed_ids=order[:num_routed],
        unconditional_ids=order[num_routed:],
        is_null_B=is_null_B,
        group_B=condition.group_B,
    )
