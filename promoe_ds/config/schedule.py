"""The learning rate of every step, a function of the step alone."""

from __future__ import annotations

import math

from promoe_ds.config.optimizer import OptimizerConfig


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then the schedule, by step
    alone.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last = config.schedule_steps or max_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    remaining = (
        1.0 - progress
        if config.schedule == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return config.min_lr + (config.lr - config.min_lr) * remaining
