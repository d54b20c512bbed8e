"""Non-finite losses and gradients: every rank learns of them together, before the update."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.distributed.context import DistributedContext


def agree(flag: Tensor, *flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any rank; the first is a tensor.  Sync: one.
    Collectives: one.
    """
    values = torch.stack([flag, *(flag.new_tensor(each) for each in flags)]).float()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


class HealthWatch:
    """Sums every gradient as it is made, before ranks mix theirs, so that the guilty rank and
    parameter are known.

    A sum is finite exactly when all terms are (short of overflow): one read of each gradient,
    nothing stored.
    """

    def __init__(self, network: nn.Module, context: DistributedContext) -> None:
        """Hook every trainable parameter of `network`."""
        self._context = context
        trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trainable]
        self._sums = torch.zeros(len(trainable), device=context.device)
        self._loss = torch.zeros((), device=context.device)
        self._order: list[int] = []
        for index, (_, parameter) in enumerate(trainable):
            parameter.register_hook(lambda gradient, i=index: self._see_gradient(i, gradient))

    def see_loss(self, loss: Tensor) -> None:
        """Take note of one micro-step's loss."""
        self._loss += loss.detach()

    def is_bad(self) -> Tensor:
        """Return whether anything of this step was not finite on this rank: a bool scalar.  Sync:
        none.
        """
        return self._bad().any()

    def finish(self, step: int, *, is_bad: bool) -> str:
        """End the step and start anew; return "" or, on every rank alike, what is wrong.

        Args:
            is_bad: whether any rank found anything, from `agree`.
        Collectives: one where it is bad.
        """
        problem = ""
        if is_bad:
            # Exchanged rows carry a bad gradient to other ranks' experts: the earliest in the
            # backward pass is the cause.
            (_, rank, text), *others = sorted(
                found for found in self._context.gather(self._find()) if found
            )
            spread = (
                f", later also on rank{'s' * (len(others) > 1)}"
                f" {', '.join(str(o[1]) for o in others)}"
                if others
                else ""
            )
            problem = f"step {step}: rank {rank}: {text} is not finite{spread}"
        self._sums.zero_()
        self._loss.zero_()
        self._order.clear()
        return problem

    def _bad(self) -> Tensor:
        return ~torch.isfinite(torch.cat([self._sums, self._loss[None]]))

    def _see_gradient(self, index: int, gradient: Tensor) -> None:
        self._order.append(index)
        self._sums[index] += gradient.detach().sum(dtype=torch.float32)

    def _find(self) -> tuple[int, int, str] | None:
        """Return when in the backward pass (-1: before it), on which rank and what went wrong first
        here.
        """
        flags = self._bad().tolist()
        position, index = next(
            ((at, i) for at, i in enumerate(self._order) if flags[i]), (len(self._order), None)
        )
        parts = ["the loss"] if flags[-1] else []
        parts += [f"the gradient of {self._names[index]}"] if index is not None else []
        return (
            (-1 if flags[-1] else position, self._context.rank, " and ".join(parts))
            if parts
            else None
        )
