"""Patches, fixed positions, timestep and condition embeddings (Peebles & Xie, 2023).

Letters: B images, S tokens per image, D width, Z latent channels, H, W latent size; L tokens of a
text, C width of its states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.condition import ClassCondition, Condition, TextCondition
from promoe_ds.config.accounting import TIMESTEP_FREQUENCIES
from promoe_ds.config.model import ModelConfig
from promoe_ds.errors import ConfigError
from promoe_ds.model.blocks import Texts

MAX_PERIOD = 10_000.0


class PatchEmbedding(nn.Module):
    """Cuts latents into square patches and maps each to a token."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents_BZHW: Tensor) -> Tensor:
        """Return tokens (B, S, D), row by row."""
        return self.proj(latents_BZHW).flatten(2).transpose(1, 2)


def sincos_positions(width: int, grid: tuple[int, int], scale: float = 1.0) -> Tensor:
    """Return fixed 2-D positions (rows * columns, width), fp32.

    Source: MAE / DiT; the half of `width` for the column comes first, then that for the row, each
    sin then cos.
    Args:
        width: a multiple of 4.
        grid: rows and columns of patches; scale: coordinates are multiplied by it.
    """
    places = (np.arange(count, dtype=np.float64) * scale for count in grid)
    rows, columns = np.meshgrid(*places, indexing="ij")
    omega = MAX_PERIOD ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * omega
        halves += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def fixed_positions(model: ModelConfig, grid: tuple[int, int] | None = None) -> Tensor:
    """Return the position table of a network, (S, D), fp32, for its own grid of patches or
    another.
    """
    return sincos_positions(model.hidden_size, grid or model.patch_grid, model.position_scale)


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

    def texts(self, condition: Condition, tokens_per_image: int) -> Texts | None:
        """Return what every block's attention reads besides the image, None where the vector is
        all.
        """
        return None


class LabelEmbedding(ConditionEmbedding):
    """One vector for each class and, where there is a null label, one, the last, for it."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)

    def vector(self, condition: Condition) -> Tensor:
        """Return (B, D). Dropout is done where the batch is made."""
        if not isinstance(condition, ClassCondition):
            raise ConfigError(
                f"model.condition=class needs labels, not a {type(condition).__name__}"
            )
        return self.table(condition.labels_B)


class TextEmbedding(ConditionEmbedding):
    """A linear map of the vector of a whole text; the encoder's states go to attention as they
    are.
    """

    def __init__(self, pooled_width: int, width: int) -> None:
        super().__init__()
        self.pooled = nn.Linear(pooled_width, width)

    def vector(self, condition: Condition) -> Tensor:
        """Return (B, D)."""
        return self.pooled(_of_text(condition).pooled_BC.to(self.pooled.weight.dtype))

    def texts(self, condition: Condition, tokens_per_image: int) -> Texts:
        """Return the states, and which tokens are keys: those of the image and of the text.

        Sync: one, where the condition was not counted.
        """
        text = _of_text(condition)
        if text.num_null is None:  # nobody on the host has looked: padding could change roundings
            text = text.counted()
        is_key_BK = F.pad(text.mask_BL, (tokens_per_image, 0), value=True)
        return Texts(is_key_BK[:, None, None], text.tokens_BLC.to(self.pooled.weight.dtype))


def _of_text(condition: Condition) -> TextCondition:
    if not isinstance(condition, TextCondition):
        raise ConfigError(
            f"model.condition=text needs a TextCondition, not {type(condition).__name__}: encode"
            " prompts with the model's text encoder"
        )
    return condition


@dataclass(frozen=True)
class PreparedCondition(Condition):
    """A condition and what a network makes of it once for all noise levels, see `DiT.prepare`."""

    original: Condition
    vector_BD: Tensor
    #: One for each block, with its keys and values.
    texts: tuple[Texts, ...]

    @property
    def is_null_B(self) -> Tensor:
        """Which samples of the original are null."""
        return self.original.is_null_B

    @property
    def group_B(self) -> Tensor | None:
        """Return the original's groups."""
        return self.original.group_B

    def __len__(self) -> int:
        return len(self.original)

    def map(self, function: Callable[[Tensor], Tensor]) -> PreparedCondition:
        """Return the samples with a function applied to each tensor of B rows."""
        texts = tuple(each.map(function) for each in self.texts)
        return PreparedCondition(self.original.map(function), function(self.vector_BD), texts)

    def drop(self, mask_B: Tensor) -> PreparedCondition:
        """Raise: what was made of the texts is no longer true of them."""
        raise TypeError("drop and join conditions before DiT.prepare, not after it")

    def _joined(self, others: Sequence[Condition]) -> PreparedCondition:
        raise TypeError("drop and join conditions before DiT.prepare, not after it")
