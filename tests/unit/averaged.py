"""An optimizer and its averages, driven as the trainer drives them under ZeRO."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from promoe_ds.config.optimizer import EMA, OptimizerConfig
from promoe_ds.training.ema import Ema

from .builders import random_tensor


class AveragedOptimizer:
    """Three weights in two groups: `step` is called once a group, `updates` grows by one an update;
    gradients are functions of the number of updates.
    """

    def __init__(
        self, build: Callable[[list[dict[str, Any]]], Optimizer], settings: OptimizerConfig
    ) -> None:
        shapes = enumerate([(4, 3), (5,), (2, 3, 2)])
        self.weights = [nn.Parameter(random_tensor(*shape, seed=seed)) for seed, shape in shapes]
        self.optimizer = build(
            [
                {"params": self.weights[:1], "weight_decay": 0.1},
                {"params": self.weights[1:], "weight_decay": 0.0},
            ]
        )
        self.ema, self.step = Ema(self.optimizer, settings.averages), 0

    def update(self, *, has_gradients: bool = True) -> None:
        for seed, weight in enumerate(self.weights):
            gradient = random_tensor(*weight.shape, seed=100 * self.step + seed)
            weight.grad = gradient if has_gradients else None
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        self.step += 1
        self.ema.updates += has_gradients

    def values(self) -> list[Tensor]:
        return [weight.detach().double() for weight in self.weights]

    def averages(self, name: str = EMA) -> list[Tensor]:
        return [self.optimizer.state[weight][name].clone() for weight in self.weights]

    def continue_from(self, other: AveragedOptimizer) -> None:
        """Take weights and state, as a resume does; the groups stay this optimizer's own."""
        for mine, theirs in zip(self.weights, other.weights, strict=True):
            mine.data.copy_(theirs)
            self.optimizer.state[mine] = copy.deepcopy(other.optimizer.state[theirs])
        self.step, self.ema.updates = other.step, other.ema.updates
