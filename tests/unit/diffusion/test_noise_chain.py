"""DDPM's chain against loops in Python floats, and its respacing."""

from __future__ import annotations

import pytest

from promoe_ds.diffusion.noise_chain import (
    betas_of,
    linear_alpha_bar,
    respaced_timesteps,
)


def chain_by_loop(length: int) -> tuple[list[float], list[float]]:
    """Return betas and alpha_bar of the linear schedule."""
    first, last = 1000 / length * 1e-4, 1000 / length * 0.02
    betas = [first + (last - first) * i / (length - 1) for i in range(length)]
    alpha_bar, left = [], 1.0
    for beta in betas:
        left *= 1 - beta
        alpha_bar.append(left)
    return betas, alpha_bar


def timesteps_by_loop(length: int, steps: int) -> list[int]:
    """Return DiT's choice: a running position, rounded to even at exact halves."""
    position, chosen = 0.0, []
    for _ in range(steps):
        chosen.append(round(position))
        position += (length - 1) / (steps - 1)
    return chosen


@pytest.mark.parametrize("length", [1000, 21, 250, 4000])
def test_linear_schedule_equals_loop(length: int) -> None:
    betas, alpha_bar = chain_by_loop(length)
    assert linear_alpha_bar(length).tolist() == pytest.approx(
        alpha_bar, rel=1e-12
    )  # order of the products
    # betas come back from a ratio near 1: absolute digits of doubles.
    assert betas_of(linear_alpha_bar(length)).tolist() == pytest.approx(betas, rel=1e-9)


@pytest.mark.parametrize("length", [21, 100, 1000])
def test_respaced_timesteps_equal_loop_and_include_both_ends(length: int) -> None:
    for steps in range(2, length + 1):
        timesteps = respaced_timesteps(length, steps).tolist()
        assert timesteps == timesteps_by_loop(length, steps)
        assert (timesteps[0], timesteps[-1]) == (0, length - 1)
        assert len(set(timesteps)) == steps
