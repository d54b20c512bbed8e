"""The stock DeepSpeed path (`parallel.dispatch=deepspeed_moe`): our router as the gate of an
unmodified `MOELayer`.

DeepSpeed's layer sends C slots to every expert from every rank, filled or not. Without
`parallel.capacity_factor`, C is the fullest expert's count over all ranks of the group (dropless by
padding); with it, C is fixed and rows beyond it are dropped, lowest gates first.
Letters: T tokens of this rank, D width, E routed experts, e those on this rank, K choices per
token, N rows, C slots per expert and rank, W ranks of the expert-parallel group.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import MOELayer, check_gate, expert_group_name
from promoe_ds.backends.external import token_choices
from promoe_ds.config import RunConfig
from promoe_ds.moe.dispatch import (
    ALL_TO_ALLS_PER_STEP,
    DISPATCHERS,
    ExpertFunction,
    PendingOutput,
)
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.registry import register
from promoe_ds.routing.assignment import Assignment

#: The route of a token that has none, in DeepSpeed's tuple.
_NO_EXPERT = -1


class PlanGate(nn.Module):
    """A gate that gives DeepSpeed's layer the decision that our router has made, labels
    included.
    """

    def __init__(
        self, num_experts: int, top_k: int, capacity_factor: float | None, group: dist.ProcessGroup
    ) -> None:
        """Take E, K and the slots over an even share (None: as many as needed)."""
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor, self.group = (
            num_experts,
            top_k,
            capacity_factor,
            group,
        )
        self.assignment: Assignment | None = None
        self.capacity: Tensor | None = None

    def forward(
        self,
        tokens_TD: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]:
        """Return DeepSpeed's tuple: loss, C, E, experts_KT (-1: none), slots_KT, gates_KT,
        counts_E.

        The losses of our router are added elsewhere, in the open: the loss here is 0. Tokens of
        unconditional samples have no route, so `used_token` has nothing to add.
        """
        assignment, num_tokens = self.assignment, tokens_TD.shape[0]
        choices = token_choices(assignment, self.top_k)
        self.capacity = self._find_capacity(assignment.tokens_per_expert_E, num_tokens)
        slot_N = self._slots(assignment, choices.expert_N)
        expert_N = torch.where(slot_N < self.capacity, choices.expert_N, _NO_EXPERT)
        experts_KT = tokens_TD.new_full((self.top_k, num_tokens), _NO_EXPERT, dtype=torch.int64)
        experts_KT[:, choices.token_ids_S] = expert_N[choices.rows_SK].T
        slots_KT = torch.zeros_like(experts_KT)
        slots_KT[:, choices.token_ids_S] = slot_N[choices.rows_SK].T
        gates_KT = assignment.gates_N.new_zeros(experts_KT.shape)
        gates_KT = gates_KT.index_copy(
            1, choices.token_ids_S, assignment.gates_N[choices.rows_SK].T
        )
        loss = gates_KT.new_zeros(())
        return (
            loss,
            self.capacity,
            self.num_experts,
            experts_KT,
            slots_KT,
            gates_KT,
            assignment.tokens_per_expert_E,
        )

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        """Nothing to do: the group is known."""

    def _find_capacity(self, counts_E: Tensor, num_tokens: int) -> Tensor:
        """Return C, the same on all ranks of the group; without a factor this is a collective."""
        if self.capacity_factor is not None:
            slots = max(
                1, math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)
            )
            return counts_E.new_tensor(slots)
        largest = counts_E.max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.clamp_min(1)

    def _slots(self, assignment: Assignment, expert_N: Tensor) -> Tensor:
        """Number each expert's rows: in their order, or by falling gate where some may be
        dropped.
        """
        counts_E = assignment.tokens_per_expert_E
        first_N = (counts_E.cumsum(0) - counts_E)[expert_N]
        places_N = torch.arange(expert_N.numel(), device=expert_N.device)
        if self.capacity_factor is not None:
            by_gate_N = assignment.gates_N.detach().argsort(descending=True, stable=True)
            order_N = by_gate_N[expert_N[by_gate_N].argsort(stable=True)]
            places_N = torch.empty_like(places_N).index_copy(0, order_N, places_N)
        return places_N - first_N


class SlotExperts(nn.Module):
    """Our experts as DeepSpeed's layer calls them: on W * C slots each, empty ones included, whose
    results nobody reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.function: ExpertFunction | None = None

    def forward(self, slots_WeCD: Tensor) -> Tensor:
        """Map (W, e, C, D) to (W, e, C, D)."""
        ranks, num_local, capacity, width = slots_WeCD.shape
        rows_RD = slots_WeCD.transpose(0, 1).reshape(-1, width)
        counts_e = torch.full(
            (num_local,), ranks * capacity, dtype=torch.int64, device=rows_RD.device
        )
        return (
            self.function(rows_RD, counts_e).view(num_local, ranks, capacity, width).transpose(0, 1)
        )


@register(DISPATCHERS, "deepspeed_moe")
class DeepSpeedMoEPath:
    """Takes tokens through DeepSpeed's own `MOELayer`. Its exchange is synchronous: nothing
    overlaps with it.
    """

    clock = None

    def __init__(
        self,
        config: RunConfig,
        experts: StackedExperts,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Build the layer over DeepSpeed's expert-parallel group.

        Raises: ConfigError if the layer asks its gate for something else.
        """
        check_gate(PlanGate)
        routing = config.routing
        self.gate = PlanGate(
            routing.num_experts, routing.top_k, config.parallel.capacity_factor, group
        )
        self.experts = SlotExperts()
        self.group, self.world_size = group, dist.get_world_size(group)
        self.layer = MOELayer(
            self.gate,
            self.experts,
            expert_group_name(self.world_size),
            self.world_size,
            experts.num_local_experts,
        )
        self.layer._set_ep_group(group)

    def begin(
        self, experts: ExpertFunction, tokens_TD: Tensor, assignment: Assignment
    ) -> PendingOutput:
        """Run the layer when the result is called.

        Sync: one, for C.  Collectives: three (C, slots out, slots back).
        """

        def finish(base_TD: Tensor) -> Tensor:
            self.gate.assignment, self.experts.function = assignment, experts
            output_TD = self.layer(tokens_TD, None)
            self.gate.assignment = self.experts.function = None  # they hold the pass's graph
            return base_TD + output_TD.to(base_TD.dtype)

        return finish

    def bytes_exchanged(self, assignment: Assignment, width: int, element_size: int) -> Tensor:
        """All slots of the experts elsewhere, filled or not, in the pass that ran last."""
        elsewhere = self.gate.num_experts - self.gate.num_experts // self.world_size
        return ALL_TO_ALLS_PER_STEP * width * element_size * elsewhere * self.gate.capacity
