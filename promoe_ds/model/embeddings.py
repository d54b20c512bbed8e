"""Patches, fixed positions, timestep and label embeddings (Peebles & Xie, 2023).

Letters: B images, S tokens per image, D width, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config.accounting import TIMESTEP_FREQUENCIES
from promoe_ds.config.model import ModelConfig

MAX_PERIOD = 10_000.0


class PatchEmbedding(nn.Module):
    """Cuts latents into square patches and maps each to a token."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents_BZHW: Tensor) -> Tensor:
        """Return tokens (B, S, D), row by row."""
        return self.proj(latents_BZHW).flatten(2).transpose(1, 2)


def sincos_positions(width: int, grid: int, scale: float = 1.0) -> Tensor:
    """Return fixed 2-D positions (grid * grid, width), fp32.

    Source: MAE / DiT; the half of `width` for the column comes first, then that for the row, each
    sin then cos.
    Args:
        width: a multiple of 4.
        grid: patches per side; scale: coordinates are multiplied by it.
    """
    places = np.arange(grid, dtype=np.float64) * scale
    rows, columns = np.meshgrid(places, places, indexing="ij")
    omega = MAX_PERIOD ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * omega
        halves += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def fixed_positions(model: ModelConfig) -> Tensor:
    """Return the position table of a network, (S, D), fp32."""
    grid = model.input_size // model.patch_size
    return sincos_positions(model.hidden_size, grid, model.position_scale)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(TIMESTEP_FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, timestep_B: Tensor) -> Tensor:
        """Return (B, D). The sinusoids are computed in fp32; `timestep` (sigma * 1000) is not
        rounded.
        """
        half = TIMESTEP_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
        frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
        angles = timestep_B.float()[:, None] * frequencies[None]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.down(nn.functional.silu(self.up(sinusoids.to(self.up.weight.dtype))))


class ConditionEmbedding(nn.Module):
    """What the network makes of a condition."""

    def vector(self, condition: Condition) -> Tensor:
        """Return (B, D), which is added to the timestep's embedding."""
        raise NotImplementedError

    def context(self, condition: Condition) -> Tensor | None:
        """Return tokens (B, L, D) for attention's keys and values, or None where the vector is
        all.
        """
        return None


class LabelEmbedding(ConditionEmbedding):
    """One vector for each class and one, the last, for the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def vector(self, condition: Condition) -> Tensor:
        """Return (B, D). Dropout is done where the batch is made."""
        assert isinstance(condition, ClassCondition)
        return self.table(condition.labels_B)
