"""Patches, positions and timestep embeddings against direct formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promoe_ds.model.embeddings import PatchEmbedding, TimestepEmbedding, sincos_positions

from ..builders import random_tensor


def wave(coordinate: float, width: int) -> list[float]:
    """Sines, then cosines, of one coordinate; frequencies 10000 ** (-i / (width / 2))."""
    angles = [coordinate / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


@pytest.mark.parametrize(
    ("width", "rows", "columns"), [(4, 1, 1), (8, 2, 2), (16, 3, 5), (16, 4, 2), (384, 16, 16)]
)
def test_positions_equal_direct_formula(width: int, rows: int, columns: int) -> None:
    # Token s is in row s // columns, column s % columns; the column's half comes first.
    expected = [
        wave(s % columns, width // 2) + wave(s // columns, width // 2)
        for s in range(rows * columns)
    ]
    positions = sincos_positions(width, (rows, columns))
    assert positions.dtype == torch.float32
    # Computed in fp64 and rounded once; the direct formula's power may differ in the last bit of
    # fp64.
    torch.testing.assert_close(positions, torch.tensor(expected), rtol=0, atol=1e-7)


def sinusoids(timestep_B: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what enters the first linear layer of the timestep embedding."""
    embedding, seen = TimestepEmbedding(8).to(dtype), []
    embedding.up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedding(timestep_B)
    return seen[0]


@pytest.mark.parametrize("timestep", [0.0, 0.37, 1.0, 12.5, 999.9, 1000.0])
def test_timestep_embedding_equals_direct_formula_cosine_first(timestep: float) -> None:
    angles = [timestep * 10_000 ** (-i / 128) for i in range(128)]
    expected = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]])
    # fp32 angles: a relative 1e-7 of up to 1000.
    torch.testing.assert_close(
        sinusoids(torch.tensor([timestep])), expected, rtol=0, atol=2e-6 + 2e-7 * timestep
    )


def test_timestep_embedding_bf16_rounds_sinusoids_not_angles() -> None:
    timestep = torch.tensor([777.7])
    assert torch.equal(sinusoids(timestep, torch.bfloat16), sinusoids(timestep).bfloat16())


def test_timestep_embedding_is_linear_silu_linear() -> None:
    embedding = TimestepEmbedding(8)
    timestep = torch.tensor([3.0, 400.0])
    hidden = embedding.up(sinusoids(timestep))
    torch.testing.assert_close(embedding(timestep), embedding.down(hidden * torch.sigmoid(hidden)))


def test_patch_embedding_takes_patches_row_by_row() -> None:
    embedding = PatchEmbedding(patch_size=2, in_channels=3, width=4)
    latents = random_tensor(2, 3, 4, 6)
    weight, bias = embedding.proj.weight.flatten(1), embedding.proj.bias
    tokens = [
        latents[:, :, y : y + 2, x : x + 2].flatten(1) @ weight.T + bias
        for y in (0, 2)
        for x in (0, 2, 4)
    ]
    # Convolution and product may add in another order.
    torch.testing.assert_close(embedding(latents), torch.stack(tokens, dim=1), rtol=1e-5, atol=1e-5)
