"""How latents become what the network sees, and back: one value from the data to the decoder.

Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.data import DataConfig

#: Values that differ by less, relatively, are the same, written with fewer digits.
_TOLERANCE = 1e-6
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class LatentNormalization:
    """(latents - latents_mean) / latents_std * latent_scale: each of one value, or one a channel.

    Its fields are those of the data section; empty ones are 0 and 1. Source: diffusers' pipelines
    (`scaling_factor`, `shift_factor`; `latents_mean`, `latents_std`).
    """

    latent_scale: float = 1.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Return what a data section states."""
        return cls(
            latent_scale=data.latent_scale,
            latents_mean=data.latents_mean,
            latents_std=data.latents_std,
        )

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self == LatentNormalization()

    def normalize(self, latents_BZHW: Tensor) -> Tensor:
        """Return latents as the network sees them."""
        if self.latents_mean:
            latents_BZHW = latents_BZHW - _like(self.latents_mean, latents_BZHW)
        return latents_BZHW * self._factor(latents_BZHW)

    def denormalize(self, latents_BZHW: Tensor) -> Tensor:
        """Return what the autoencoder decodes: the inverse of `normalize`."""
        latents_BZHW = latents_BZHW / self._factor(latents_BZHW)
        if self.latents_mean:
            latents_BZHW = latents_BZHW + _like(self.latents_mean, latents_BZHW)
        return latents_BZHW

    def per_channel(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and factor of each channel, (Z,), float64."""
        mean, std = self.latents_mean or (0.0,), self.latents_std or (1.0,)
        return (
            np.broadcast_to(np.array(mean), channels),
            np.broadcast_to(self.latent_scale / np.array(std), channels),
        )

    def equals(self, other: LatentNormalization, channels: int) -> bool:
        """Whether both do the same to latents of so many channels."""
        pairs = zip(self.per_channel(channels), other.per_channel(channels), strict=True)
        return all(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)

    def __str__(self) -> str:
        """Return it as the end of «latents are»."""
        parts = [
            text.format(_shown(values))
            for text, values in (
                ("less {}", self.latents_mean),
                ("divided by {}", self.latents_std),
            )
            if values
        ]
        return ", ".join([*parts, f"scaled by {self.latent_scale}"])

    def _factor(self, like: Tensor) -> float | Tensor:
        if not self.latents_std:
            return self.latent_scale
        return _like([self.latent_scale / each for each in self.latents_std], like)


def _like(values: tuple[float, ...] | list[float], latents_BZHW: Tensor) -> float | Tensor:
    """Return one value as a number, which keeps the type of what it is applied to, several as
    fp32 (Z, 1, 1).
    """
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float32, device=latents_BZHW.device).view(-1, 1, 1)


def _shown(values: tuple[float, ...]) -> str:
    text = ", ".join(f"{value:.4g}" for value in values[:_SHOWN])
    return text if len(values) == 1 else f"[{text}{', ...' if len(values) > _SHOWN else ''}]"
