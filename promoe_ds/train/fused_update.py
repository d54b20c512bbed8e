"""The update as one kernel on a GPU: gradient in, AdamW, moving averages, weights out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from promoe_ds.kernels import ops
from promoe_ds.train.ema import Ema

#: Averages that the kernel moves.
_MOST_AVERAGES = 2


class FusedUpdate:
    """Updates flat fp32 weights in place of torch's AdamW and `Ema`, with the same state."""

    def __init__(self, optimizer: Optimizer, ema: Ema) -> None:
        """Keep the state where `optimizer`, torch's AdamW, and `ema` keep it."""
        self._optimizer, self._ema = optimizer, ema

    def is_ready(self) -> bool:
        """Return whether all state exists: torch's own first step makes it."""
        names = {"exp_avg", "exp_avg_sq", "step", *self._ema.averages}
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return len(self._ema.averages) <= _MOST_AVERAGES and all(
            names <= self._optimizer.state.get(p, {}).keys() for p in parameters
        )

    @torch.no_grad()
    def __call__(
        self, group: int, grad_N: Tensor, out_N: Tensor, is_bad: Tensor, divisor: Tensor
    ) -> None:
        """Update a parameter group of one flat tensor.

        Args:
            out_N: takes the new weights in its own dtype.
            is_bad: 1 to change nothing; divisor: of the gradient; fp32 scalars on the device.
        """
        values: dict[str, Any] = self._optimizer.param_groups[group]
        (weights_N,) = values["params"]
        state = self._optimizer.state[weights_N]
        state["step"] += 1.0 - is_bad
        beta1, beta2 = values["betas"]
        step = state["step"].double().clamp(min=1.0)
        scalars = torch.stack(
            [is_bad.double(), divisor.double(), 1 - beta1**step, (1 - beta2**step).sqrt()]
        )
        ops.adamw(
            weights_N,
            state["exp_avg"],
            state["exp_avg_sq"],
            [state[name] for name in self._ema.averages],
            out_N,
            grad_N,
            scalars.float(),
            [1.0 - decay for decay in self._ema.decays().values()],
            values["lr"],
            [beta1, beta2],
            values["eps"],
            values["weight_decay"],
        )
