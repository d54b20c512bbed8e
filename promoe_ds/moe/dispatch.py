"""Dispatchers: move the rows of an assignment to the ranks that hold their experts, and back.

They hold no parameters. Whatever moves the tokens, results and gradients are those of
`LocalDispatcher`.
Letters: T tokens of this rank, D width, E routed experts on all ranks, e those on this rank, N rows
sent, R rows received, W ranks of the expert-parallel group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.config.parallel import ResolvedDispatch
from promoe_ds.config.schema import RunConfig
from promoe_ds.kernels import ops
from promoe_ds.moe.collectives import AllToAll, WaitClock
from promoe_ds.moe.comm_dtype import COMM_DTYPES, SAME, CommDtype
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.registry import register
from promoe_ds.routing.assignment import Assignment
from promoe_ds.routing.scores import at_least_fp32

#: A row's crossings in a training pass: out and back, forward and backward.
ALL_TO_ALLS_PER_STEP = 4


@dataclass(frozen=True)
class Dispatched:
    """Rows that have arrived: sorted by local expert, ready for the experts, and the way back.

    combine: takes what the experts' results are added to, (T, D), and these rows; returns the sum,
        every row weighted by its gate at its token. Accumulates in fp32.
    """

    rows_RD: Tensor
    tokens_per_expert_e: Tensor
    combine: Callable[[Tensor, Tensor], Tensor]


#: Ends a dispatch that is under way. What is computed before calling it overlaps with the exchange.
PendingDispatch = Callable[[], Dispatched]
#: Routed experts: rows sorted by local expert and their counts in, rows out.
ExpertFunction = Callable[[Tensor, Tensor], Tensor]
#: Ends the routed experts' work: takes what their weighted rows are added to, (T, D), and returns
# the sum.
PendingOutput = Callable[[Tensor], Tensor]


class ExpertPath(Protocol):
    """The way of tokens through the routed experts and back; what a layer asks for, whoever moves
    the rows.
    """

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share one set of experts, None where each has all."""

    @property
    def clock(self) -> WaitClock | None:
        """Of the waiting for exchanges, if any."""

    def begin(
        self, experts: ExpertFunction, tokens_TD: Tensor, assignment: Assignment
    ) -> PendingOutput:
        """Start; calling the result ends it. What is computed in between may overlap with the
        exchange.
        """

    def bytes_exchanged(self, assignment: Assignment, width: int, element_size: int) -> Tensor:
        """Bytes that this rank's rows take between ranks in a pass, forward and backward, a scalar
        int64.  Sync: none.
        """


#: Makes the path to the experts of one layer: this rank's share of those that a group holds.
PathFactory = Callable[[RunConfig, StackedExperts, dist.ProcessGroup, torch.device], ExpertPath]
#: By `parallel.dispatch`, for experts on several ranks; other libraries' are in `backends`.
DISPATCHERS: dict[ResolvedDispatch, PathFactory] = {}


class Dispatcher(ABC):
    """An expert path in three steps: move rows to their experts, compute, move them back."""

    def begin(
        self, experts: ExpertFunction, tokens_TD: Tensor, assignment: Assignment
    ) -> PendingOutput:
        """Start moving rows; the result waits for them, computes and combines."""
        pending = self.dispatch(tokens_TD, assignment)

        def finish(base_TD: Tensor) -> Tensor:
            arrived = pending()
            return arrived.combine(base_TD, experts(arrived.rows_RD, arrived.tokens_per_expert_e))

        return finish

    @abstractmethod
    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Start moving the assignment's rows; calling the result ends it."""


class LocalDispatcher(Dispatcher):
    """One rank holds all experts: nothing moves."""

    group = None
    clock = None

    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Gather the rows, sorted by expert.  Sync: none."""
        rows = select_rows(tokens_TD, assignment)
        combine = partial(add_weighted_rows, assignment=assignment)
        return lambda: Dispatched(rows, assignment.tokens_per_expert_E, combine)

    def bytes_exchanged(self, assignment: Assignment, width: int, element_size: int) -> Tensor:
        """None."""
        return assignment.tokens_per_expert_E.new_zeros(())


class AllToAllDispatcher(Dispatcher):
    """Dropless, exact-size all-to-all over DeepSpeed's expert-parallel group.

    Rank w of the group holds the experts w*e ... (w+1)*e - 1. The exchange carries exactly the rows
    of experts elsewhere, both ways: no padding, no capacity. Where it does not `sort`, they stay in
    the order of the ranks that sent them, and the counts are (W * e,).
    """

    sort = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        comm_dtype: CommDtype = SAME,
        *,
        counts_waiting: bool = True,
    ) -> None:
        """Use `group`, whose size divides the number of experts; rows travel in `comm_dtype`.

        Args:
            counts_waiting: whether `clock` counts, for someone who takes what it counted.
        """
        self.group, self.comm_dtype = group, comm_dtype
        self.clock = WaitClock(counts=counts_waiting)
        self._counted: tuple[Assignment, Tensor, list[int], list[int]] | None = None
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def dispatch(self, tokens_TD: Tensor, assignment: Assignment) -> PendingDispatch:
        """Send every row to its expert's rank.

        Sync: one, for the E counts sent and the E counts received.  Collectives: two (counts,
        rows). The recomputation of a pass knows its counts: then no sync and one collective.
        """
        if self._counted is None or self._counted[0] is not assignment:
            self._counted = (assignment, *self._exchange_counts(assignment))
        _, received_We, rows_out, rows_in = self._counted
        exchange = AllToAll(
            rows_out=rows_out,
            rows_in=rows_in,
            group=self.group,
            name="dispatch",
            clock=self.clock,
            comm_dtype=self.comm_dtype,
        )
        pending = exchange.start(select_rows(tokens_TD, assignment))

        def finish() -> Dispatched:
            order_R = _by_local_expert(received_We, sum(rows_in)) if self.sort else None
            rows = exchange.finish(pending)
            rows = rows if order_R is None else rows.index_select(0, order_R)
            counts = received_We.sum(dim=0) if self.sort else received_We.flatten()
            return Dispatched(rows, counts, partial(self._return, assignment, exchange, order_R))

        return finish

    def _exchange_counts(self, assignment: Assignment) -> tuple[Tensor, list[int], list[int]]:
        """Return the rows that arrive for each expert here, and how many go to and come from each
        rank.
        """
        sent_We = assignment.tokens_per_expert_E.view(self.world_size, -1)
        with self.clock.waiting("counts", sent_We.device):
            received_We = torch.empty_like(sent_We)
            dist.all_to_all_single(received_We, sent_We.contiguous(), group=self.group)
        rows_out, rows_in = torch.stack([sent_We.sum(dim=1), received_We.sum(dim=1)]).tolist()
        return received_We, rows_out, rows_in

    def _return(
        self,
        assignment: Assignment,
        exchange: AllToAll,
        order_R: Tensor | None,
        base_TD: Tensor,
        rows_RD: Tensor,
    ) -> Tensor:
        """Return every row to the rank and token it came from, and add it.  Collectives: one."""
        if order_R is not None:
            rows_RD = torch.zeros_like(rows_RD).index_copy(0, order_R, rows_RD)
        back = replace(
            exchange, rows_out=exchange.rows_in, rows_in=exchange.rows_out, name="combine"
        )
        return add_weighted_rows(base_TD, back.finish(back.start(rows_RD)), assignment)

    def rows_leaving(self, assignment: Assignment) -> Tensor:
        """Return the rows of other ranks' experts, a scalar int64 on the device.  Sync: none."""
        sent_We = assignment.tokens_per_expert_E.view(self.world_size, -1)
        return sent_We.sum() - sent_We[self.rank].sum()

    def bytes_exchanged(self, assignment: Assignment, width: int, element_size: int) -> Tensor:
        """Return four crossings of each row, as it travels."""
        return (
            ALL_TO_ALLS_PER_STEP
            * self.comm_dtype.row_bytes(width, element_size)
            * self.rows_leaving(assignment)
        )


@register(DISPATCHERS, "alltoall")
def _all_to_all(
    config: RunConfig, experts: StackedExperts, group: dist.ProcessGroup, device: torch.device
) -> AllToAllDispatcher:
    return AllToAllDispatcher(group, COMM_DTYPES[config.parallel.comm_dtype])


def select_rows(tokens_TD: Tensor, assignment: Assignment) -> Tensor:
    """Return each row's token, (N, D).

    Gradient: the sum over a token's rows, accumulated in fp32 whatever the dtype.  Sync: none.
    """
    token_ids_N, places = assignment.token_ids_N, assignment.places
    if places is not None:
        return ops.select_rows(tokens_TD, token_ids_N, places)
    if tokens_TD.dtype == at_least_fp32(tokens_TD).dtype:
        return tokens_TD.index_select(0, token_ids_N)
    return _SelectRows.apply(tokens_TD, token_ids_N)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, token_ids_N: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids_N)
        ctx.num_tokens = len(tokens_TD)
        return tokens_TD.index_select(0, token_ids_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (token_ids_N,) = ctx.saved_tensors
        rows_ND = at_least_fp32(grad_ND)
        total_TD = rows_ND.new_zeros(ctx.num_tokens, grad_ND.shape[1])
        return total_TD.index_add_(0, token_ids_N, rows_ND).to(grad_ND.dtype), None


def add_weighted_rows(base_TD: Tensor, rows_ND: Tensor, assignment: Assignment) -> Tensor:
    """Add gate * row to base at each row's token, accumulated in fp32; base is consumed, the result
    has its dtype.
    """
    if assignment.places is not None:
        return ops.combine(
            base_TD, rows_ND, assignment.gates_N, assignment.token_ids_N, assignment.places
        )
    total_TD = _AddWeightedRows.apply(
        at_least_fp32(base_TD), rows_ND, assignment.gates_N, assignment.token_ids_N
    )
    return total_TD.to(base_TD.dtype)


class _AddWeightedRows(torch.autograd.Function):
    """base[token] += gate * row, in place; the backward pass weighs the gathered gradient in place,
    too.
    """

    @staticmethod
    def forward(
        ctx: Any, base_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, gates_N, token_ids_N)
        ctx.mark_dirty(base_TD)
        return base_TD.index_add_(
            0, token_ids_N, rows_ND.to(base_TD.dtype) * gates_N[:, None].to(base_TD.dtype)
        )

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gates_N, token_ids_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_ids_N)
        grad_gates = (
            torch.bmm(grad_ND[:, None], rows_ND.to(grad_ND.dtype)[:, :, None])
            .flatten()
            .to(gates_N.dtype)
        )
        return grad_TD, grad_ND.mul_(gates_N[:, None]).to(rows_ND.dtype), grad_gates, None


def _by_local_expert(received_We: Tensor, num_rows: int) -> Tensor | None:
    """Return the order that sorts arrived rows, grouped by source rank, by local expert; None if
    they are sorted.
    """
    world_size, num_local = received_We.shape
    if world_size == 1 or num_local == 1:
        return None
    experts_We = torch.arange(num_local, device=received_We.device).expand(world_size, -1)
    expert_R = torch.repeat_interleave(
        experts_We.reshape(-1), received_We.reshape(-1), output_size=num_rows
    )
    return torch.argsort(expert_R, stable=True)
