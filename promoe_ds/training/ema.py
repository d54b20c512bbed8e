"""Moving averages of the weights beside any optimizer, and their update on a GPU as one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from promoe_ds.config.optimizer import EMA, Average
from promoe_ds.kernels import update_ops

#: Averages that the kernel moves.
_MOST_AVERAGES = 2


class Ema:
    """Keeps moving averages of all parameters that an optimizer updates, by name in its state.

    Under ZeRO these parameters are this rank's fp32 master shards: the averages are sharded like
    the moments, saved and restored with them, and nobody ever holds a second full copy. The
    optimizer stays the plain object that DeepSpeed knows.
    """

    def __init__(self, optimizer: Optimizer, averages: Mapping[str, Average]) -> None:
        """Watch the steps of `optimizer` from now on."""
        self.averages = averages
        #: Updates made so far, which the trainer sets before each one: DeepSpeed calls `step` once
        # for every group. For averages that began later also after which one; set after a resume.
        self.updates = 0
        self.averages_since: dict[str, int] = {}
        self._optimizer = optimizer
        self._initial: dict[tuple[Tensor, str], Tensor] = {}
        optimizer.register_step_pre_hook(self._keep_initial_weights)
        optimizer.register_step_post_hook(self._update)

    @torch.no_grad()
    def swap(self) -> None:
        """Let the weights and their first average change places, in place: one tensor's worth of
        memory is needed beside them.

        Before the first update there is no average, and nothing changes.
        """
        for parameter in self.owned():
            average = self._optimizer.state.get(parameter, {}).get(EMA)
            if average is not None:
                weights = parameter.clone()
                parameter.copy_(average)
                average.copy_(weights)

    def owned(self) -> list[Tensor]:
        """Return the parameters that the optimizer updates."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _keep_initial_weights(self, *unused: Any) -> None:
        self._initial = {
            (p, name): p.clone()
            for p in self.owned()
            for name, average in self.averages.items()
            if p.grad is not None
            and average.exponent is None
            and name not in self._optimizer.state.get(p, {})
        }

    @torch.no_grad()
    def _update(self, *unused: Any) -> None:
        """Set every average to decay * average + (1 - decay) * weights.

        An average with a constant decay starts from the weights before the first update, as
        published, a power-function average from those after it.
        """
        owned = [p for p in self.owned() if p.grad is not None]
        state = self._optimizer.state
        for name, decay in self.decays().items() if owned else ():
            for p in owned:
                if name not in state[p]:
                    before = self._initial.pop((p, name), None)
                    state[p][name] = p.clone() if before is None else before
            skipped = getattr(self._optimizer, "found_inf", None)
            if skipped is None:
                get_ema_multi_avg_fn(decay)([state[p][name] for p in owned], owned, None)
                continue
            for p in owned:  # the device decided: no average moves in a step that was left out
                state[p][name].lerp_(p, (1.0 - decay) * (1.0 - skipped))

    def decays(self) -> dict[str, float]:
        """Return by how much each average keeps its value in the next update."""
        return {
            name: average.decay_at(self.updates + 1 - self.averages_since.get(name, 0))
            for name, average in self.averages.items()
        }


class FusedUpdate:
    """Updates flat fp32 weights in place of torch's AdamW and `Ema`, with the same state."""

    def __init__(self, optimizer: Optimizer, ema: Ema) -> None:
        """Keep the state where `optimizer`, torch's AdamW, and `ema` keep it."""
        self._optimizer, self._ema = optimizer, ema

    def is_ready(self) -> bool:
        """Return whether all state exists: torch's own first step makes it."""
        names = {"exp_avg", "exp_avg_sq", "step", *self._ema.averages}
        return len(self._ema.averages) <= _MOST_AVERAGES and all(
            names <= self._optimizer.state.get(p, {}).keys() for p in self._ema.owned()
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
        update_ops.adamw(
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
