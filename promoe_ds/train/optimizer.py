"""AdamW with moving averages of the weights in its state, parameter groups, learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from promoe_ds.config.optimizer import OptimizerConfig

#: Numbers of bf16 in 16 bytes.
_ALIGNED = 8


class AdamWithEma(torch.optim.AdamW):
    """AdamW that keeps, for every parameter it owns, moving averages of its values, by the names of the config's `averages`.

    Under ZeRO the parameters it owns are this rank's fp32 master shards: the averages are sharded like the moments, saved
    and restored with them, and nobody ever holds a second full copy.
    """

    #: Set by the trainer on a non-finite step: nothing is updated. Under ZeRO 0 DeepSpeed reads it, too.
    overflow = False

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Take parameter groups as `parameter_groups` returns them."""
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.averages = config.averages
        #: Updates made so far, and for averages that began later, after which one; the trainer sets both after a resume.
        self.updates = 0
        self.averages_since: dict[str, int] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights, then every average = decay * average + (1 - decay) * weights.

        An average with a constant decay starts from the weights before the first update, as published, a power-function
        average from those after it.
        """
        if self.overflow:
            return
        owned = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        initial = {(p, name): p.detach().clone() for p in owned for name in self.averages if name not in self.state.get(p, {})}
        super().step(closure)
        self.updates += 1
        for (parameter, name), value in initial.items():
            self.state[parameter][name] = value if self.averages[name].exponent is None else parameter.detach().clone()
        for name, average in self.averages.items() if owned else ():
            decay = average.decay_at(self.updates - self.averages_since.get(name, 0))
            torch._foreach_lerp_([self.state[p][name] for p in owned], owned, 1.0 - decay)


def parameter_groups(network: nn.Module, config: OptimizerConfig, precision: str = "fp32") -> list[dict[str, Any]]:
    """Split trainable parameters into dense and expert groups, each decayed and not decayed where there is a decay.

    Only matrices are decayed: the stacked biases of experts have two dimensions as well, so names decide.
    ZeRO lays a group into one buffer, in the group's order, and parameters become views of it. In bf16 those whose size is no
    multiple of 16 bytes, as a router's bias of 12 experts, stand last: behind them a matrix would begin where CUDA's grouped
    GEMM refuses it and other kernels are slow.
    Args:
        precision: of the weights, fp32 or bf16.
    Returns: groups with `params`, `param_names`, `weight_decay`, `name` and, for experts, `moe`, which DeepSpeed reads.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        expert_group: str | None = getattr(parameter, "group_name", None)
        decayed = config.weight_decay > 0 and name.endswith(("weight", "up_weight", "down_weight")) and "norm" not in name
        group = groups.setdefault((expert_group or "dense", decayed), {
            "params": [], "param_names": [], "name": expert_group or "dense",
            "weight_decay": config.weight_decay if decayed else 0.0, **({"moe": True} if expert_group else {})})
        group["params"].append(parameter)
        group["param_names"].append(name)
    for group in groups.values() if precision == "bf16" else ():
        pairs = sorted(zip(group["params"], group["param_names"], strict=True), key=lambda pair: pair[0].numel() % _ALIGNED > 0)
        group["params"], group["param_names"] = (list(column) for column in zip(*pairs, strict=True))
    return list(groups.values())


def is_reordered(network: nn.Module, config: OptimizerConfig, precision: str) -> bool:
    """Whether the groups of a network in `precision` hold parameters in another order than the network's own."""
    own, laid = ([group["param_names"] for group in parameter_groups(network, config, kind)] for kind in ("fp32", precision))
    return own != laid


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then the schedule, by step alone."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    remaining = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * remaining
