"""Classifier-free guidance (Ho & Salimans, 2022).

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError

#: (latents_BZHW, timestep_B, condition) -> prediction (B, channels, H, W)
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def choose_scale(config: RunConfig, asked: float | None, name: str) -> tuple[float, str]:
    """Return the guidance scale to sample a model with, and why it is not the recipe's ("" if it
    is).

    Args:
        asked: what the user asks for under `name`; None takes the recipe's, without guidance where
        that cannot be.
    Raises: ConfigError if the user asks for what is no scale, or for a label that training never
    saw.
    """
    scale, trained = (
        config.sampling.cfg_scale if asked is None else asked,
        config.diffusion.trains_null_label,
    )
    why = (
        f"the model was trained with diffusion.label_dropout={config.diffusion.label_dropout:g}: it"
        " never saw images both with their labels and without"
    )
    if asked is None:
        return (
            (scale, "")
            if trained or scale <= 1
            else (1.0, f"no guidance (sampling.cfg_scale={scale:g}): {why}")
        )
    if not 1 <= asked < math.inf:
        raise ConfigError(
            f"{name}={asked:g}: must be a number from 1 on: 1 is no guidance, more is a"
            " stronger one"
        )
    if asked > 1 and not trained:
        raise ConfigError(f"{name}={asked:g}: {why}; use 1, which is no guidance")
    return scale, ""


def guided(
    denoiser: Denoiser,
    latents_BZHW: Tensor,
    timestep_B: Tensor,
    condition: Condition,
    *,
    scale: float,
    channels: int,
    two_passes: bool = False,
) -> Tensor:
    """Return null + scale * (conditional - null) on the first `channels` channels, the conditional
    others as they are.

    Source: official sampler; differs: both halves share one batch, which changes nothing where
    samples are routed independently of each other, unless `two_passes` asks for one after the other
    as published. Official DiT guides three channels, whatever their number.
    Args:
        scale: 1 needs no null pass and makes none; as published, neither does less than 1.
        channels: those of the velocity or the noise; beyond them a variance may follow, which
        extrapolation would ruin.
    """
    if scale <= 1.0:
        return denoiser(latents_BZHW, timestep_B, condition)
    null = condition.null_like()
    if two_passes:
        conditional = denoiser(latents_BZHW, timestep_B, condition)
        unconditional = denoiser(latents_BZHW, timestep_B, null)
    else:
        conditional, unconditional = denoiser(
            torch.cat([latents_BZHW, latents_BZHW]),
            torch.cat([timestep_B, timestep_B]),
            condition.cat([null]),
        ).chunk(2)
    unconditional = unconditional[:, :channels]
    result = unconditional + scale * (conditional[:, :channels] - unconditional)
    return torch.cat([result, conditional[:, channels:]], dim=1)
