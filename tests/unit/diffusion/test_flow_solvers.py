"""Heun, UniPC and DPM-Solver++ for the flow: exact where they must be, better than Euler where the
answer is known.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.sampler import SamplingPlan, sample_latents, shifted_sigmas

from ..builders import random_tensor

SECOND_ORDER = ("heun", "unipc", "dpmpp")
MEAN, DEVIATION = 0.7, 0.4


def make_plan(**values: Any) -> SamplingPlan:
    return SamplingPlan(**{"steps": 10, "cfg_scale": 1.0, **values})


def velocity_of_a_normal(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """The flow between N(MEAN, DEVIATION^2) and N(0, 1); it carries z to MEAN + DEVIATION * z."""
    sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    distance = (latents.double() - (1 - sigma) * MEAN) / variance
    return (sigma * distance - MEAN - (1 - sigma) * DEVIATION**2 * distance).float()


def error_of(solver: str, steps: int, shift: float = 1.0) -> float:
    noise = random_tensor(4, 1, 2, 2)
    result = sample_latents(
        velocity_of_a_normal,
        noise,
        ClassCondition(torch.zeros(4, dtype=torch.int64), 10),
        make_plan(steps=steps, solver=solver, shift=shift),
    )
    return (result - (MEAN + DEVIATION * noise)).abs().max().item()


def test_heun_error_falls_with_the_square_of_the_step() -> None:
    assert math.log2(error_of("heun", 20) / error_of("heun", 40)) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_second_order_solver_beats_euler_and_converges(solver: str, shift: float) -> None:
    euler, errors = (
        error_of("euler", 40, shift),
        [error_of(solver, steps, shift) for steps in (10, 20, 40)],
    )
    assert errors[2] < euler / 4
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_second_order_solver_towards_a_point_arrives_there(solver: str, steps: int) -> None:
    target = random_tensor(2, 1, 2, 2)

    def denoiser(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return (latents - target) / (timestep / 1000).view(-1, 1, 1, 1)

    result = sample_latents(
        denoiser,
        random_tensor(2, 1, 2, 2, seed=1),
        ClassCondition(torch.tensor([0, 1]), 10),
        make_plan(steps=steps, solver=solver, shift=3.0),
    )
    torch.testing.assert_close(
        result, target, rtol=2e-5, atol=2e-5
    )  # fp32, and a start 1e-6 below noise level 1


@pytest.mark.parametrize(("solver", "calls_a_step"), [("heun", 2), ("unipc", 1), ("dpmpp", 1)])
def test_second_order_solver_asks_at_the_shifted_noise_levels(
    solver: str, calls_a_step: int
) -> None:
    seen: list[float] = []

    def denoiser(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        assert timestep.unique().numel() == 1
        seen.append(timestep[0].item())
        return torch.zeros_like(latents)

    sample_latents(
        denoiser,
        random_tensor(2, 1, 2, 2),
        ClassCondition(torch.tensor([0, 1]), 10),
        make_plan(steps=6, solver=solver, shift=3.0),
    )
    levels = (1000 * shifted_sigmas(6, 3.0)).tolist()
    # Heun corrects each step where the next begins, and not the last.
    expected = (
        levels
        if calls_a_step == 1
        else [levels[0], *(level for level in levels[1:] for _ in range(2))]
    )
    assert seen == pytest.approx(expected, rel=1e-6)  # fp32, not rounded to whole timesteps


def test_second_order_solvers_hand_labels_and_guidance_on() -> None:
    # v = label: guided velocity is null + scale * (label - null).
    for solver in SECOND_ORDER:
        result = sample_latents(
            lambda x, t, y: y.labels_B.float().view(-1, 1, 1, 1).expand_as(x),
            torch.zeros(2, 1, 1, 1),
            ClassCondition(torch.tensor([4, 10]), 10),
            make_plan(steps=4, cfg_scale=2.0, solver=solver),
        )
        torch.testing.assert_close(
            result.flatten(), torch.tensor([2.0, -10.0]), rtol=1e-5, atol=2e-5
        )
