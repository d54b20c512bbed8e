"""Rotary positions of patches (Su et al., 2021), axial: half of a head turns with the row, half
with the column.

Letters: B images, A heads, S tokens per image, G head width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0


def rotations(rows: int, columns: int, head_width: int, scale: float, like: Tensor) -> Tensor:
    """Return the rotation of each pair of a head's numbers at each patch, complex (S, G / 2).

    Source: LightningDiT's (EVA-02's) `VisionRotaryEmbeddingFast`: the pairs (0, 1), (2, 3) ... of a
    head turn by coordinate * 10000^(-4 i / G), i from 0 for the row, then again for the column.
    Args:
        head_width: a multiple of 4; scale: coordinates are multiplied by it.
        like: gives the device; in fp64 the result is that precise, else as fp32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = partial(torch.arange, device=like.device, dtype=dtype)
    frequencies = MAX_PERIOD ** -(numbers(0, head_width, 4) / head_width)
    grid = torch.meshgrid(numbers(rows), numbers(columns), indexing="ij")
    places_S2 = torch.stack(grid, dim=-1).flatten(0, 1) * scale
    angles_SG = (places_S2[..., None] * frequencies).flatten(1)
    return torch.polar(torch.ones_like(angles_SG), angles_SG)


def rotated(x_BASG: Tensor, turns_SG: Tensor) -> Tensor:
    """Return queries or keys turned by `rotations`, in their dtype: products of the two then depend
    on how far the patches are apart.
    """
    precise = x_BASG.to(turns_SG.real.dtype)
    turned = torch.view_as_complex(precise.unflatten(-1, (-1, 2))) * turns_SG
    return torch.view_as_real(turned).flatten(-2).to(x_BASG.dtype)
