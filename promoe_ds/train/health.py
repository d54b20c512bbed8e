"""Non-finite losses and gradients: every rank learns of them together, before the update."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.distributed.context import Ranks, gather_objects


class HealthWatch:
    """Sums every gradient as it is made, before ranks mix theirs, so that the guilty rank and parameter are known.

    A sum is finite exactly when all terms are (short of overflow): one read of each gradient, nothing stored, no sync
    until `verdict`.
    """

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        """Hook every trainable parameter of `network`."""
        self._ranks = ranks
        trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trainable]
        self._sums = torch.zeros(len(trainable), device=ranks.device)
        self._loss = torch.zeros((), device=ranks.device)
        self._order: list[int] = []
        self._stop_agreed = False
        #: Asked once a step; who wants to stop makes all ranks stop together.
        self.wants_to_stop: Callable[[], bool] = lambda: False
        for index, (_, parameter) in enumerate(trainable):
            parameter.register_hook(lambda gradient, i=index: self._see_gradient(i, gradient))

    @property
    def stop_agreed(self) -> bool:
        """Whether some rank wished to stop at the last verdict: the same on every rank."""
        return self._stop_agreed

    def see_loss(self, loss: Tensor) -> None:
        """Take note of one micro-step's loss."""
        self._loss += loss.detach()

    def verdict(self, step: int) -> str:
        """Judge the step and start anew; return "" or, on every rank alike, what is wrong.

        Sync: one.  Collectives: one, two for a bad step.
        """
        bad = ~torch.isfinite(torch.cat([self._sums, self._loss[None]]))
        flags = torch.stack([bad.any(), bad.new_tensor(self.wants_to_stop())]).float()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        any_bad, self._stop_agreed = (bool(flag) for flag in flags.tolist())
        problem = ""
        if any_bad:
            # Exchanged rows carry a bad gradient to other ranks' experts: the earliest in the backward pass is the cause.
            (_, rank, text), *others = sorted(found for found in gather_objects(self._find(bad)) if found)
            spread = f", later also on rank{'s' * (len(others) > 1)} {', '.join(str(o[1]) for o in others)}" if others else ""
            problem = f"step {step}: rank {rank}: {text} is not finite{spread}"
        self._sums.zero_()
        self._loss.zero_()
        self._order.clear()
        return problem

    def _see_gradient(self, index: int, gradient: Tensor) -> None:
        self._order.append(index)
        self._sums[index] += gradient.detach().sum(dtype=torch.float32)

    def _find(self, bad: Tensor) -> tuple[int, int, str] | None:
        """Return when in the backward pass (-1: before it), on which rank and what went wrong first here; None: nothing."""
        flags = bad.tolist()
        position, index = next(((at, i) for at, i in enumerate(self._order) if flags[i]), (len(self._order), None))
        parts = ["the loss"] if flags[-1] else []
        parts += [f"the gradient of {self._names[index]}"] if index is not None else []
        return (-1 if flags[-1] else position, self._ranks.rank, " and ".join(parts)) if parts else None
