"""Classifier-free guidance (Ho & Salimans, 2022).

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from promoe_ds.condition import Condition

#: (latents_BZHW, timestep_B, condition) -> prediction (B, channels, H, W)
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def guided(denoiser: Denoiser, latents_BZHW: Tensor, timestep_B: Tensor, condition: Condition, *,
           scale: float, channels: int, two_passes: bool = False) -> Tensor:
    """Return null + scale * (conditional - null) on the first `channels` channels, the conditional others as they are.

    Source: official sampler; differs: both halves share one batch, which changes nothing where
    samples are routed independently of each other, unless `two_passes` asks for one after the other
    as published. Official DiT guides three channels, whatever their number.
    Args:
        scale: 1 needs no null pass and makes none; as published, neither does less than 1.
        channels: those of the velocity or the noise; beyond them a variance may follow, which extrapolation would ruin.
    """
    if scale <= 1.0:
        return denoiser(latents_BZHW, timestep_B, condition)
    null = condition.null_like()
    if two_passes:
        conditional = denoiser(latents_BZHW, timestep_B, condition)
        unconditional = denoiser(latents_BZHW, timestep_B, null)
    else:
        conditional, unconditional = denoiser(
            torch.cat([latents_BZHW, latents_BZHW]), torch.cat([timestep_B, timestep_B]),
            condition.cat([null])).chunk(2)
    unconditional = unconditional[:, :channels]
    result = unconditional + scale * (conditional[:, :channels] - unconditional)
    return torch.cat([result, conditional[:, channels:]], dim=1)
