"""The fastest layout that fits: expert parallelism, micro-batch, checkpointing, by estimate."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

from promoe_ds.config import RunConfig, change_config
from promoe_ds.config.parallel import ParallelConfig
from promoe_ds.errors import ConfigError
from promoe_ds.planning.cluster import Cluster, ClusterLayout
from promoe_ds.planning.planner import RESERVE, StepPlan, plan_step

_CHECKPOINTING = typing.get_args(ParallelConfig.model_fields["activation_checkpointing"].annotation)
#: Depths of the two short networks from which memory and time of a deep one are extrapolated.
_SHORT = (4, 6)
#: How many of the best estimates are planned at full depth before giving up.
_FULL_PLANS = 4


@dataclass(frozen=True)
class Choice:
    """One layout tried: estimated bytes of a rank, seconds of a step, and whether it fits."""

    ep_size: int
    micro_batch: int
    activation_checkpointing: str
    bytes: float
    seconds: float
    fits: bool


def best_layout(
    config: RunConfig, layout: ClusterLayout, cluster: Cluster
) -> tuple[StepPlan, list[Choice]]:
    """Search, and plan the winner at full depth; call inside `fake_world(layout.world_size)`.

    Args:
        layout: of the config as it is; its ZeRO stage, precision and buckets are kept.
    Returns: the plan and all choices tried, fastest first.
    Raises: ConfigError if nothing fits, with the smallest need.
    """
    ranks = layout.world_size
    experts = config.routing.num_experts if config.moe_block_indices else 1
    sizes = [n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0]
    tried = [
        choice
        for ep_size in sizes
        for mode in _CHECKPOINTING
        for choice in _largest_that_fit(config, layout, cluster, ep_size, mode)
    ]
    ranked = sorted(tried, key=lambda choice: choice.seconds)
    for choice in [choice for choice in ranked if choice.fits][:_FULL_PLANS]:
        plan = plan_step(
            *_with(
                config, layout, choice.ep_size, choice.micro_batch, choice.activation_checkpointing
            ),
            cluster,
        )
        if plan.fits:
            return plan, ranked
    least = min(tried, key=lambda choice: choice.bytes)
    raise ConfigError(
        f"{config.name} on {ranks} x {cluster.device.name}: no layout fits into"
        f" {(1 - RESERVE) * cluster.device.memory / 1e9:.1f} GB a device; the smallest need is"
        f" {least.bytes / 1e9:.1f} GB (ep_size={least.ep_size},"
        f" micro_batch_size={least.micro_batch},"
        f" activation_checkpointing={least.activation_checkpointing}). Use more or larger devices,"
        " or a smaller recipe"
    )


def choice_lines(choices: list[Choice], *, limit: int = 8) -> list[str]:
    """Return the table of the layouts tried, fastest first."""
    return [
        (
            f"{'ep':>4}{'micro-batch':>13}{'checkpointing':>15}{'GB a rank':>11}{'ms a step':>11}"
            "   (estimates, fastest first)"
        ),
        *(
            f"{choice.ep_size:>4}{choice.micro_batch:>13}"
            f"{choice.activation_checkpointing:>15}{choice.bytes / 1e9:>11.1f}"
            f"{1e3 * choice.seconds:>11.1f}{'' if choice.fits else '   does not fit'}"
            for choice in choices[:limit]
        ),
    ]


def _largest_that_fit(
    config: RunConfig, layout: ClusterLayout, cluster: Cluster, ep_size: int, mode: str
) -> list[Choice]:
    """Try micro-batches from the largest on until one fits.

    Fewer, larger passes reduce gradients less often.
    """
    share, tried = config.train.global_batch_size // layout.world_size, []
    for micro in [n for n in range(share, 0, -1) if share % n == 0]:
        needed, seconds = _estimate(*_with(config, layout, ep_size, micro, mode), cluster)
        fits = needed <= (1 - RESERVE) * cluster.device.memory
        tried.append(Choice(ep_size, micro, mode, needed, seconds, fits))
        if fits:
            break
    return tried


def _with(
    config: RunConfig, layout: ClusterLayout, ep_size: int, micro_batch: int, mode: str
) -> tuple[RunConfig, ClusterLayout]:
    stays_local = ep_size == 1 or config.parallel.resolved_dispatch == "local"
    chosen = change_config(
        config,
        train={"micro_batch_size": micro_batch},
        parallel={
            "ep_size": ep_size,
            "activation_checkpointing": mode,
            "dispatch": "auto" if stays_local else config.parallel.dispatch,
        },
    )
    accumulation = config.train.global_batch_size // (layout.world_size * micro_batch)
    return chosen, replace(layout, micro_batch=micro_batch, accumulation=accumulation)


def _estimate(config: RunConfig, layout: ClusterLayout, cluster: Cluster) -> tuple[float, float]:
    """Return bytes and seconds, extrapolated from two short networks.

    All blocks but the parity are alike.
    """
    depth, (low, high) = config.model.depth, _SHORT
    plans = [
        plan_step(change_config(config, model={"depth": d}), layout, cluster)
        for d in (_SHORT if depth > high else (depth,))
    ]
    first, second = plans[0], plans[-1]
    weight = (depth - low) / (high - low)
    return (
        first.total_memory + weight * (second.total_memory - first.total_memory),
        first.total_seconds + weight * (second.total_seconds - first.total_seconds),
    )
