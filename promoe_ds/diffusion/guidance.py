"""Classifier-free guidance (Ho & Salimans, 2022).

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

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
    Raises: ConfigError if the user asks for what is no scale, or for a null condition that training
    never saw.
    """
    scale, trained = (
        config.sampling.cfg_scale if asked is None else asked,
        config.diffusion.trains_null_label,
    )
    why = (
        f"the model was trained with diffusion.label_dropout={config.diffusion.label_dropout:g}: it"
        " never saw images both with their condition and without"
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


def check_interval(asked: Sequence[float] | None, name: str) -> tuple[float, float] | None:
    """Return the noise levels between which there is guidance, which the user asks for under
    `name`; None where it is everywhere.

    Raises: ConfigError if they are no interval.
    """
    if asked is None:
        return None
    if len(asked) != 2 or not 0 <= asked[0] < asked[1] <= 1:
        values = ",".join(f"{value:g}" for value in asked)
        raise ConfigError(
            f"{name}={values}: must be two noise levels, from 0 (data) to 1 (noise), the lower one"
            " first, e.g. 0.2,0.8"
        )
    return asked[0], asked[1]


def check_guided(scale: float, name: str, value: object) -> None:
    """Raise ConfigError if something is given, not None, that has an effect under guidance alone,
    and there is none.
    """
    if value is not None and scale <= 1:
        raise ConfigError(
            f"{name}: has no effect at guidance scale {scale:g}: leave it out, or take a scale"
            " above 1"
        )


class GuidedDenoiser:
    """A denoiser under guidance, for one sampling call: its conditions are joined and prepared
    once.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        *,
        scale: float,
        negative: Condition | None = None,
        two_passes: bool = False,
        prepare: Callable[[Condition], Condition] | None = None,
    ) -> None:
        """Choose what each pass is conditioned on.

        Args:
            condition: of each image.
            scale: 1 needs no second half and makes none; as published, neither does less than 1.
            negative: what to guide away from, of each image; null if left out. A negative prompt
            is a text like any other, and is routed as one.
            two_passes: whether the halves are computed one after the other, as published; in one
            batch they are the same where samples are routed independently of each other.
            prepare: computes what of a condition stays the same from step to step.
        """
        prepare = prepare or (lambda same: same)
        self._denoiser, self._scale = denoiser, scale
        self._halves: tuple[Condition, ...] = ()
        if scale <= 1.0:
            self._alone = prepare(condition)
            return
        against = condition.null_like() if negative is None else negative
        if two_passes:
            self._halves = prepare(condition), prepare(against)
            self._alone = self._halves[0]
        else:
            both = prepare(condition.cat([against]))
            self._halves = (both,)
            self._alone = replace(both.select(slice(len(condition))), num_null=condition.num_null)

    def __call__(
        self, latents_BZHW: Tensor, timestep_B: Tensor, *, channels: int, guide: bool = True
    ) -> Tensor:
        """Return negative + scale * (conditional - negative) on the first `channels` channels, the
        conditional others as they are; without `guide`, the conditional prediction in one pass.

        Source: official sampler; differs: see `two_passes`. Official DiT guides three channels,
        whatever their number.
        Args:
            channels: those of the velocity or the noise; beyond them a variance may follow, which
            extrapolation would ruin.
        """
        if not (self._halves and guide):
            return self._denoiser(latents_BZHW, timestep_B, self._alone)
        if len(self._halves) == 2:
            conditional, negative = (
                self._denoiser(latents_BZHW, timestep_B, half) for half in self._halves
            )
        else:
            conditional, negative = self._denoiser(
                torch.cat([latents_BZHW, latents_BZHW]),
                torch.cat([timestep_B, timestep_B]),
                self._halves[0],
            ).chunk(2)
        negative = negative[:, :channels]
        result = negative + self._scale * (conditional[:, :channels] - negative)
        return torch.cat([result, conditional[:, channels:]], dim=1)
