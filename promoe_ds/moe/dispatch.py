"""Dispatchers: move the rows of an assignment to the ranks that hold their experts, and back.

They hold no parameters. Whatever moves the tokens, results and gradients are those of `LocalDispatcher`.
Letters: T tokens of this rank, D width, E routed experts on all ranks, e those on this rank, N rows sent,
R rows received, W ranks of the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.moe.collectives import Exchange, exchange_counts
from promoe_ds.routing.assignment import Assignment
from promoe_ds.routing.scores import at_least_fp32


@dataclass(frozen=True)
class Dispatched:
    """Rows that have arrived: sorted by local expert, ready for the experts, and the way back."""

    rows_RD: Tensor
    tokens_per_expert_e: Tensor
    handle: object


#: Ends a dispatch that is under way. What is computed before calling it overlaps with the exchange.
PendingDispatch = Callable[[], Dispatched]


class Dispatcher(Protocol):
    """Moves rows to experts and back."""

    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Start moving the assignment's rows; calling the result ends it."""

    def combine(self, rows_RD: Tensor, handle: object, base_TD: Tensor) -> Tensor:
        """Return base_TD plus every row, weighted by its gate, at its token. Accumulates in fp32."""

    def rows_leaving(self, assignment: Assignment) -> Tensor:
        """Rows of an assignment that live on other ranks, a scalar int64 on the device.  Sync: none."""


class LocalDispatcher:
    """One rank holds all experts: nothing moves."""

    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Gather the rows, sorted by expert.  Sync: none."""
        rows = tokens_TD.index_select(0, assignment.token_ids_N)
        return lambda: Dispatched(rows, assignment.tokens_per_expert_E, assignment)

    def combine(self, rows_RD: Tensor, handle: object, base_TD: Tensor) -> Tensor:
        """Add the weighted rows at their tokens.  Sync: none."""
        assert isinstance(handle, Assignment)
        return add_weighted_rows(base_TD, rows_RD, handle)

    def rows_leaving(self, assignment: Assignment) -> Tensor:
        """None."""
        return assignment.tokens_per_expert_E.new_zeros(())


@dataclass(frozen=True)
class _ExchangeHandle:
    assignment: Assignment
    exchange: Exchange
    order_R: Tensor | None


class DeepSpeedDispatcher:
    """Dropless, exact-size all-to-all over DeepSpeed's expert-parallel group.

    Rank w of the group holds the experts w*e ... (w+1)*e - 1. The exchange carries exactly the rows that live
    elsewhere, both ways: no padding, no capacity.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Use `group`, whose size must divide the number of experts."""
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Send every row to its expert's rank.

        Sync: one, for the E counts sent and the E counts received.  Collectives: two (counts, rows).
        """
        return self.start(tokens_TD, assignment)

    def start(self, tokens_TD: Tensor, assignment: Assignment, *, sort: bool = True) -> PendingDispatch:
        """As `dispatch`; without `sort` the rows stay in the order of the ranks that sent them, the counts (W * e,) alike."""
        sent_We = assignment.tokens_per_expert_E.view(self.world_size, -1)
        received_We = exchange_counts(sent_We, self.group)
        rows_out, rows_in = torch.stack([sent_We.sum(dim=1), received_We.sum(dim=1)]).tolist()
        exchange = Exchange(rows_out=rows_out, rows_in=rows_in, group=self.group)
        pending = exchange.start(tokens_TD.index_select(0, assignment.token_ids_N))

        def finish() -> Dispatched:
            order_R = _by_local_expert(received_We, sum(rows_in)) if sort else None
            rows = exchange.finish(pending)
            rows = rows if order_R is None else rows.index_select(0, order_R)
            counts = received_We.sum(dim=0) if sort else received_We.flatten()
            return Dispatched(rows, counts, _ExchangeHandle(assignment, exchange, order_R))

        return finish

    def combine(self, rows_RD: Tensor, handle: object, base_TD: Tensor) -> Tensor:
        """Return every row to the rank and token it came from.  Collectives: one."""
        assert isinstance(handle, _ExchangeHandle)
        if handle.order_R is not None:
            rows_RD = torch.zeros_like(rows_RD).index_copy(0, handle.order_R, rows_RD)
        back = Exchange(rows_out=handle.exchange.rows_in, rows_in=handle.exchange.rows_out, group=self.group)
        return add_weighted_rows(base_TD, back.finish(back.start(rows_RD)), handle.assignment)

    def rows_leaving(self, assignment: Assignment) -> Tensor:
        """All but those of this rank's own experts."""
        sent_We = assignment.tokens_per_expert_E.view(self.world_size, -1)
        return sent_We.sum() - sent_We[self.rank].sum()


def add_weighted_rows(base_TD: Tensor, rows_ND: Tensor, assignment: Assignment) -> Tensor:
    """Add gate * row to base at each row's token, accumulated in fp32; base is consumed, the result has its dtype."""
    total_TD = _AddWeightedRows.apply(at_least_fp32(base_TD), rows_ND, assignment.gates_N, assignment.token_ids_N)
    return total_TD.to(base_TD.dtype)


class _AddWeightedRows(torch.autograd.Function):
    """base[token] += gate * row, in place; the backward pass weighs the gathered gradient in place, too."""

    @staticmethod
    def forward(ctx: Any, base_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, gates_N, token_ids_N)
        ctx.mark_dirty(base_TD)
        return base_TD.index_add_(0, token_ids_N, rows_ND.to(base_TD.dtype) * gates_N[:, None].to(base_TD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_N, token_ids_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_ids_N)
        grad_gates = torch.bmm(grad_ND[:, None], rows_ND.to(grad_ND.dtype)[:, :, None]).flatten().to(gates_N.dtype)
        return grad_TD, grad_ND.mul_(gates_N[:, None]).to(rows_ND.dtype), grad_gates, None


def _by_local_expert(received_We: Tensor, num_rows: int) -> Tensor | None:
    """Return the order that sorts arrived rows, grouped by source rank, by local expert; None if they are sorted."""
    world_size, num_local = received_We.shape
    if world_size == 1 or num_local == 1:
        return None
    experts_We = torch.arange(num_local, device=received_We.device).expand(world_size, -1)
    expert_R = torch.repeat_interleave(experts_We.reshape(-1), received_We.reshape(-1), output_size=num_rows)
    return torch.argsort(expert_R, stable=True)
