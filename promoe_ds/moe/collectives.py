"""The collectives that a forward pass needs, with gradients. The one place of the model that knows
process groups.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.moe.comm_dtype import SAME, CommDtype


def all_reduce_sum(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    """Return a differentiable sum over the ranks of `group` (None: all ranks).

    Gradient: the all-reduced sum of the ranks' gradients, so that a loss which every rank computes
    from the sum and which the ranks then average has its true gradient.
    """
    return lambda tensor: _AllReduceSum.apply(tensor, group)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


#: What a layer waits for in a training pass, in order. The last two move the gradients.
EXCHANGES = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")


class WaitClock:
    """Sums up the time for which a rank's computation waited for its exchanges, by name.

    Transfers that hide behind computation take none. On a GPU it is the time that the compute
    stream waits, measured by events. Those that have happened are read and used again, so that
    nothing is synchronised and only the passes under way hold any.
    """

    def __init__(self, *, counts: bool = True) -> None:
        """Start at zero; without `counts` it never counts, for passes whose waiting nobody asks
        for.
        """
        self._seconds = dict.fromkeys(EXCHANGES, 0.0)
        self._events: deque[tuple[str, Any, Any]] = deque()
        self._spare_events: list[tuple[Any, Any]] = []
        self._is_paused = not counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside: passes that train nothing, in an evaluation or when routers start,
        wait, too.
        """
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was_paused

    @contextmanager
    def waiting(self, name: str, device: torch.device) -> Iterator[None]:
        """Count what is done inside as waiting for `name`."""
        if self._is_paused:
            yield
            return
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        self._read_events(only_past=True)
        begin, end = (
            self._spare_events.pop()
            if self._spare_events
            else (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        )
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def take(self) -> dict[str, float]:
        """Return the seconds by name and start at zero again.  Sync: one, on a GPU."""
        if self._events:
            torch.cuda.synchronize()
        self._read_events(only_past=False)
        seconds, self._seconds = self._seconds, dict.fromkeys(EXCHANGES, 0.0)
        return seconds

    def _read_events(self, *, only_past: bool) -> None:
        while self._events and (not only_past or self._events[0][2].query()):
            name, begin, end = self._events.popleft()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
            self._spare_events.append((begin, end))


@dataclass
class AllToAll:
    """One all-to-all of rows, startable and finishable apart so that other work can run in between.

    rows_out[w]: rows sent to rank w; rows_in[w]: rows received from it; comm_dtype: how a row
    travels. `clock` counts the waiting for it under `name`, and under `name`_backward for that of
    the gradients. `start` and `finish` are one differentiable pair: the backward pass starts the
    reverse exchange at `finish` and ends it at `start`, and whatever was computed between them in
    the forward pass is differentiated while the gradients travel.
    """

    rows_out: list[int]
    rows_in: list[int]
    group: dist.ProcessGroup
    name: str
    clock: WaitClock
    comm_dtype: CommDtype = SAME
    #: The work, what is sent (kept alive until it ends), what arrives, an empty tensor like it.
    _under_way: tuple[Any, Tensor, Tensor, Tensor] | None = field(
        default=None, init=False, repr=False
    )

    def start(self, rows: Tensor) -> Tensor:
        """Begin sending (sum(rows_out), width) rows; the result is a ticket without values, for
        `finish`.
        """
        return _StartExchange.apply(rows, self)

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for the rows that `start` promised: (sum(rows_in), width) in the dtype of those
        sent.
        """
        return _FinishExchange.apply(ticket, self)

    def launch(self, rows: Tensor, *, reverse: bool) -> Tensor:
        """Start moving `rows`, in the other direction where `reverse`; return a ticket with as many
        rows as will arrive.
        """
        sizes_out, sizes_in = (
            (self.rows_in, self.rows_out) if reverse else (self.rows_out, self.rows_in)
        )
        sent = self.comm_dtype.pack(rows, is_gradient=reverse).contiguous()
        received = sent.new_empty(sum(sizes_in), sent.shape[1])
        work = dist.all_to_all_single(
            received, sent, sizes_in, sizes_out, group=self.group, async_op=True
        )
        self._under_way = work, sent, received, rows.new_empty(0, rows.shape[1])
        return rows.new_empty(sum(sizes_in), 0)

    def wait(self, *, reverse: bool) -> Tensor:
        """End the transfer under way and return the rows."""
        assert self._under_way is not None
        work, _, received, like = self._under_way
        with self.clock.waiting(f"{self.name}_backward" if reverse else self.name, received.device):
            work.wait()
        self._under_way = None
        return self.comm_dtype.unpack(received, like.shape[1], like.dtype, is_gradient=reverse)


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, reverse=False)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(reverse=True), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait(reverse=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Autograd wants a gradient of the ticket's shape here; the real one is under way inside the
        # exchange.
        ctx.exchange.launch(gradient, reverse=True)
        return gradient.new_empty(gradient.shape[0], 0), None
