"""Non-finite losses and gradients: every rank learns of them together, before the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.distributed.context import DistributedContext


def agree(is_bad: Tensor, stop: bool) -> Tensor:
    """Return whether a step was bad, and whether to stop, on any rank: fp32 on the device.

    Sync: none.  Collectives: one.
    """
    values = torch.stack([is_bad, torch.full_like(is_bad, stop)]).float()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class HealthWatch:
    """Sees one number of every gradient before ranks mix theirs, so that the guilty rank and
    parameter are known.

    The number, a sum or a norm, is finite exactly when all terms are (short of overflow).
    """

    def __init__(self, network: nn.Module, *, hooks: bool = True) -> None:
        """Watch the trainable parameters of `network`.

        Args:
            hooks: sum every gradient as it is made; without hooks `see_norms` gets the numbers.
        """
        self._network = network
        self._start()
        for parameter in network.parameters() if hooks else ():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._see_gradient, parameter))

    def see_loss(self, loss: Tensor) -> None:
        """Record one micro-step's loss, before its backward pass."""
        self._losses.append(loss.detach().float())

    def see_norms(self, parameters: Sequence[nn.Parameter], norms: Sequence[Tensor]) -> None:
        """Record fp32 norms of gradients, in the order of the backward pass."""
        self._order += parameters
        self._numbers += norms

    def end_step(self) -> StepHealth:
        """Return what was recorded in the step's micro-steps, and start again.  Sync: none."""
        numbers_N = torch.stack([*self._numbers, *self._losses])
        seen = StepHealth(numbers_N, self._order, self._network)
        self._start()
        return seen

    def _start(self) -> None:
        self._numbers: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._order: list[nn.Parameter] = []

    def _see_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.see_norms([parameter], [gradient.detach().sum(dtype=torch.float32)])


@dataclass(frozen=True)
class StepHealth:
    """A number of each of a step's gradients on this rank, then its losses.

    order: whose gradient each is, as the backward passes made them.
    """

    numbers_N: Tensor
    order: list[nn.Parameter]
    network: nn.Module

    def is_bad(self) -> Tensor:
        """Return whether anything was not finite on this rank: a bool scalar.  Sync: none."""
        return ~torch.isfinite(self.numbers_N).all()

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
        bad = [at for at, fine in enumerate(self.numbers_N.isfinite().tolist()) if not fine]
        if not bad:
            return None
        bad_loss, first = bad[-1] >= len(self.order), bad[0]
        parts = ["the loss"] if bad_loss else []
        if first < len(self.order):
            names = {parameter: name for name, parameter in self.network.named_parameters()}
            parts.append(f"the gradient of {names[self.order[first]]}")
        return (-1 if bad_loss else first, rank, " and ".join(parts))
