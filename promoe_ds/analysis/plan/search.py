"""The fastest layout that fits: expert parallelism, micro-batch and checkpointing, by predicted time."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

from promoe_ds.analysis.plan.cluster import Cluster, Layout
from promoe_ds.analysis.plan.planner import RESERVE, StepPlan, plan_step
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.errors import ConfigError

#: Depths of the two short networks from which memory and time of a deep one are extrapolated.
_SHORT = (4, 6)
#: How many of the best estimates are planned at full depth before giving up.
_FULL_PLANS = 4


@dataclass(frozen=True)
class Choice:
    """One layout tried: estimated bytes of a rank and seconds of a step, and whether the memory suffices."""

    ep_size: int
    micro_batch: int
    activation_checkpointing: str
    bytes: float
    seconds: float
    fits: bool


def best_layout(config: RunConfig, layout: Layout, cluster: Cluster) -> tuple[StepPlan, list[Choice]]:
    """Search, and plan the winner at full depth; call inside `fake_world(layout.world_size)`.

    Args:
        layout: of the config as it stands; its ZeRO stage, precision and buckets are kept.
    Returns: the plan and all choices tried, fastest first.
    Raises: ConfigError if nothing fits, with the smallest need.
    """
    if config.train.global_batch_size % layout.world_size:
        raise ConfigError(f"train.global_batch_size={config.train.global_batch_size} cannot be cut over {layout.world_size} ranks")
    tried: list[Choice] = []
    for ep_size in _expert_parallel_sizes(config, layout.world_size):
        for mode in _checkpointing_modes(config):
            tried += _largest_that_fit(config, layout, cluster, ep_size, mode)
    capacity = (1 - RESERVE) * cluster.device.memory
    ranked = sorted(tried, key=lambda choice: choice.seconds)
    for choice in [choice for choice in ranked if choice.fits][:_FULL_PLANS]:
        chosen, placed = _with(config, layout, choice.ep_size, choice.micro_batch, choice.activation_checkpointing)
        plan = plan_step(chosen, placed, cluster)
        if plan.fits:
            return plan, ranked
    least = min(tried, key=lambda choice: choice.bytes)
    raise ConfigError(
        f"{config.name} on {layout.world_size} x {cluster.device.name}: no layout fits into {capacity / 1e9:.1f} GB a device; the "
        f"smallest need is {least.bytes / 1e9:.1f} GB (ep_size={least.ep_size}, micro_batch_size={least.micro_batch}, "
        f"activation_checkpointing={least.activation_checkpointing}). Use more or larger devices, or a smaller recipe")


def _largest_that_fit(config: RunConfig, layout: Layout, cluster: Cluster, ep_size: int, mode: str) -> list[Choice]:
    """Try micro-batches from the largest on until one fits: fewer, larger passes reduce gradients less often."""
    share = config.train.global_batch_size // layout.world_size
    tried = []
    for micro in [n for n in range(share, 0, -1) if share % n == 0]:
        chosen, placed = _with(config, layout, ep_size, micro, mode)
        needed, seconds = _estimate(chosen, placed, cluster)
        tried.append(Choice(ep_size, micro, mode, needed, seconds, fits=needed <= (1 - RESERVE) * cluster.device.memory))
        if tried[-1].fits:
            break
    return tried


def _with(config: RunConfig, layout: Layout, ep_size: int, micro_batch: int, mode: str) -> tuple[RunConfig, Layout]:
    values = config.model_dump(mode="json")
    dispatch = "auto" if ep_size == 1 or config.parallel.resolved_dispatch == "local" else config.parallel.dispatch
    values["parallel"] |= {"ep_size": ep_size, "activation_checkpointing": mode, "dispatch": dispatch}
    values["train"] |= {"micro_batch_size": micro_batch}
    accumulation = config.train.global_batch_size // (layout.world_size * micro_batch)
    return (config_from_dict(values, source=config.name),
            replace(layout, micro_batch=micro_batch, accumulation=accumulation))


def _estimate(config: RunConfig, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Return bytes and seconds, extrapolated from two short networks: all blocks but the parity are alike."""
    depth = config.model.depth
    if depth <= _SHORT[1]:
        plan = plan_step(config, layout, cluster)
        return plan.memory.total, plan.time.total
    short = [plan_step(_of_depth(config, d), layout, cluster) for d in _SHORT]
    weight = (depth - _SHORT[0]) / (_SHORT[1] - _SHORT[0])
    (bytes_a, bytes_b), (time_a, time_b) = ([p.memory.total for p in short], [p.time.total for p in short])
    return bytes_a + weight * (bytes_b - bytes_a), time_a + weight * (time_b - time_a)


def _of_depth(config: RunConfig, depth: int) -> RunConfig:
    values = config.model_dump(mode="json")
    values["model"] |= {"depth": depth}
    return config_from_dict(values, source=config.name)


def _expert_parallel_sizes(config: RunConfig, world_size: int) -> list[int]:
    if not config.moe_block_indices:
        return [1]
    return [n for n in range(1, config.routing.num_experts + 1) if config.routing.num_experts % n == 0 and world_size % n == 0]


def _checkpointing_modes(config: RunConfig) -> tuple[str, ...]:
    return typing.get_args(type(config.parallel).model_fields["activation_checkpointing"].annotation)
