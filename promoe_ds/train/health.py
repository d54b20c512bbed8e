"""Non-finite losses and gradients: every rank learns of them together, before the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.distributed.context import DistributedContext


def agree(is_bad: Tensor, *flags: bool) -> Tensor:
    """Return for each flag whether it is set on any rank, fp32 on the device.  Sync: none.
    Collectives: one.
    """
    values = torch.stack([is_bad, *(torch.full_like(is_bad, flag) for flag in flags)]).float()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class HealthWatch:
    """Sums every gradient as it is made, before ranks mix theirs, so that the guilty rank and
    parameter are known.

    A sum is finite exactly when all terms are (short of overflow): one read of each gradient, one
    number stored.
    """

    def __init__(self, network: nn.Module) -> None:
        """Hook every trainable parameter of `network`."""
        trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trainable]
        self._start()
        for index, (_, parameter) in enumerate(trainable):
            parameter.register_hook(lambda gradient, i=index: self._see_gradient(i, gradient))

    def see_loss(self, loss: Tensor) -> None:
        """Take note of one micro-step's loss, before its backward pass."""
        self._losses.append(loss.detach().float())
        self._sums.append(torch.zeros(len(self._names), device=loss.device))

    def end_step(self) -> StepHealth:
        """Return what was seen of the step's micro-steps, and start anew.  Sync: none."""
        seen = StepHealth(
            torch.stack(self._sums), torch.stack(self._losses), self._order, self._names
        )
        self._start()
        return seen

    def _start(self) -> None:
        self._sums: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._order: list[tuple[int, int]] = []

    def _see_gradient(self, index: int, gradient: Tensor) -> None:
        self._order.append((len(self._sums) - 1, index))
        every = tuple(range(gradient.dim()))
        torch.sum(gradient.detach(), every, dtype=torch.float32, out=self._sums[-1][index])


@dataclass(frozen=True)
class StepHealth:
    """The sums of a step's gradients, (micro-steps, parameters), and its losses on this rank.

    order: micro-step and parameter of each gradient, as the backward passes made them.
    """

    sums_MP: Tensor
    losses_M: Tensor
    order: list[tuple[int, int]]
    names: list[str]

    def is_bad(self) -> Tensor:
        """Return whether anything was not finite on this rank: a bool scalar.  Sync: none."""
        return ~torch.isfinite(torch.cat([self.sums_MP.flatten(), self.losses_M])).all()

    def describe(self, step: int, context: DistributedContext) -> str:
        """Return which rank and parameter were the first that were not finite; all ranks call this
        together.  Collectives: one.
        """
        # Exchanged rows carry a bad gradient to other ranks' experts: the earliest in the backward
        # pass is the cause.
        found = sorted(each for each in context.gather(self._find(context.rank)) if each)
        (_, rank, text), *others = found
        spread = (
            f", later also on rank{'s' * (len(others) > 1)} {', '.join(str(o[1]) for o in others)}"
            if others
            else ""
        )
        return f"step {step}: rank {rank}: {text} is not finite{spread}"

    def _find(self, rank: int) -> tuple[int, int, str] | None:
        """Return when in the backward pass (-1: before it), on which rank and what went wrong first
        here.
        """
        bad_loss = not bool(self.losses_M.isfinite().all())
        finite = self.sums_MP.isfinite().tolist()
        position, index = next(
            ((at, i) for at, (m, i) in enumerate(self.order) if not finite[m][i]),
            (len(self.order), None),
        )
        parts = ["the loss"] if bad_loss else []
        parts += [f"the gradient of {self.names[index]}"] if index is not None else []
        return (-1 if bad_loss else position, rank, " and ".join(parts)) if parts else None
