"""Rotary positions against a slow rotation in double precision, and what they promise of scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promoe_ds.model.rotary import rotated, rotations

from ..builders import MODERN, random_network, random_tensor

#: Rows and columns that differ, so that one cannot stand for the other.
ROWS, COLUMNS, WIDTH = 3, 5, 8
GRIDS = pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (1, 4), (4, 4)])


def slow_rotation(x_G: Tensor, row: float, column: float) -> Tensor:
    """Turn one head's vector, pair by pair: the first half by the row, the second by the column."""
    turned, half = x_G.double().clone(), len(x_G) // 2
    for start, coordinate in ((0, row), (half, column)):
        for i in range(half // 2):
            angle = coordinate * 10_000 ** (-2 * i / half)
            first, second = start + 2 * i, start + 2 * i + 1
            a, b = x_G[first].item(), x_G[second].item()
            turned[first] = a * math.cos(angle) - b * math.sin(angle)
            turned[second] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def turns(rows: int, columns: int, scale: float = 1.0, width: int = WIDTH) -> Tensor:
    """Return the rotations of a grid in double precision."""
    return rotations(rows, columns, width, scale, like=torch.empty(0, dtype=torch.float64))


def scores(turns_SG: Tensor, q_G: Tensor, k_G: Tensor) -> Tensor:
    """Return the products (S, S) of one query and one key put at every place."""
    q, k = (rotated(x.expand(1, 1, len(turns_SG), -1), turns_SG) for x in (q_G, k_G))
    return (q @ k.transpose(-1, -2))[0, 0]


@GRIDS
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rotary_equals_slow_rotation_by_row_and_column(
    rows: int, columns: int, scale: float
) -> None:
    x = random_tensor(2, 3, rows * columns, WIDTH, dtype=torch.float64)
    found = rotated(x, turns(rows, columns, scale))
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        for image in range(2):
            for head in range(3):
                expected = slow_rotation(x[image, head, place], row * scale, column * scale)
                torch.testing.assert_close(found[image, head, place], expected, rtol=0, atol=1e-12)


@GRIDS
def test_rotary_scores_depend_on_differences_of_coordinates_alone(rows: int, columns: int) -> None:
    q, k = (random_tensor(16, seed=seed, dtype=torch.float64) for seed in (1, 2))
    found = scores(turns(rows, columns, width=16), q, k)
    by_difference: dict[tuple[int, int], list[float]] = {}
    for query in range(rows * columns):
        for key in range(rows * columns):
            (r, c), (other_r, other_c) = divmod(query, columns), divmod(key, columns)
            value = found[query, key].item()
            by_difference.setdefault((r - other_r, c - other_c), []).append(value)
    assert len(by_difference) == (2 * rows - 1) * (2 * columns - 1)
    for values in by_difference.values():
        assert values == pytest.approx([values[0]] * len(values), abs=1e-12)
    means = [values[0] for values in by_difference.values()]
    assert min(abs(a - b) for i, a in enumerate(means) for b in means[:i]) > 1e-4


def test_rotary_scale_of_a_half_keeps_every_second_patch_of_twice_the_grid() -> None:
    small, large = turns(2, 3), turns(4, 6, scale=0.5)
    assert torch.equal(large.view(4, 6, -1)[::2, ::2], small.view(2, 3, -1))


def test_rotary_positions_made_while_sampling_serve_training() -> None:
    network = random_network(**MODERN)
    arguments = random_tensor(2, 1, 4, 4), torch.tensor([0.0, 500.0]), torch.tensor([3, 7])
    with torch.inference_mode():
        found = network(*arguments)
    again = network(*arguments)
    assert torch.equal(again, found)
    again.square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotary_keeps_dtype_and_length_with_angles_of_fp32_at_least(dtype: torch.dtype) -> None:
    x = random_tensor(2, 2, 15, WIDTH, dtype=dtype).requires_grad_()
    found = rotations(ROWS, COLUMNS, WIDTH, 1.0, like=x)
    assert found.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    torch.testing.assert_close(found.to(torch.complex128), turns(ROWS, COLUMNS), rtol=0, atol=1e-6)
    turned = rotated(x, found)
    assert turned.dtype == dtype
    lengths = x.float().norm(dim=-1)
    torch.testing.assert_close(turned.float().norm(dim=-1), lengths, rtol=5e-3, atol=0)
    turned.backward(turned.detach())  # a rotation's transpose is its inverse
    atol = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(x.grad, x.detach(), rtol=0, atol=atol)
