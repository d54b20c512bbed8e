"""AdamW with moving averages of the weights in its state; the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from promoe_ds.config.optimizer import OptimizerConfig


class AdamWithEma(torch.optim.AdamW):
    """AdamW that keeps, for every parameter it owns, moving averages of its values, by the names of
    the config's `averages`.

    Under ZeRO the parameters it owns are this rank's fp32 master shards: the averages are sharded
    like the moments, saved and restored with them, and nobody ever holds a second full copy.
    """

    #: Set by the trainer on a non-finite step: nothing is updated. Under ZeRO 0 DeepSpeed reads
    # it, too.
    overflow = False

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Take parameter groups as `parameter_groups` returns them."""
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.averages = config.averages
        #: Updates made so far, which the trainer sets before each one: DeepSpeed calls `step` once
        # for every group. For : averages that began later also after which one; set after a resume.
        self.updates = 0
        self.averages_since: dict[str, int] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights, then every average = decay * average + (1 - decay) * weights.

        An average with a constant decay starts from the weights before the first update, as
        published, a power-function average from those after it.
        """
        if self.overflow:
            return
        owned = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        initial = {
            (p, name): p.detach().clone()
            for p in owned
            for name in self.averages
            if name not in self.state.get(p, {})
        }
        super().step(closure)
        for (parameter, name), value in initial.items():
            self.state[parameter][name] = (
                value if self.averages[name].exponent is None else parameter.detach().clone()
            )
        for name, average in self.averages.items() if owned else ():
            decay = average.decay_at(self.updates + 1 - self.averages_since.get(name, 0))
            get_ema_multi_avg_fn(decay)([self.state[p][name] for p in owned], owned, None)
