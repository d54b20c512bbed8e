"""Solvers of the flow: their noise levels in closed form, exact where they must be, better than
Euler where the answer is known; the noise that images start from.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.sampler import SamplingPlan, initial_noise, sample_latents

from ..builders import random_tensor

SECOND_ORDER = ("heun", "unipc", "dpmpp")
SOLVERS = ("euler", *SECOND_ORDER)
MEAN, DEVIATION = 0.7, 0.4


def sample(denoiser: Any, noise: Tensor, *, labels: Tensor | None = None, **plan: Any) -> Tensor:
    condition = ClassCondition(torch.arange(len(noise)) if labels is None else labels, 10)
    plan = {"steps": 4, "cfg_scale": 1.0, **plan}
    return sample_latents(denoiser, noise, condition, SamplingPlan(**plan))


def levels(steps: int, shift: float) -> list[float]:
    even = (1 - step / steps for step in range(steps))
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_ask_at_the_levels_with_the_shift_applied_once(
    solver: str, steps: int, shift: float, num_train_timesteps: int
) -> None:
    seen = []

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        assert timestep.shape == condition.labels_B.shape == latents.shape[:1]
        seen.extend(timestep.unique().tolist())
        return torch.zeros_like(latents)

    noise, plan = random_tensor(2, 1, 2, 2), {"steps": steps, "shift": shift, "solver": solver}
    sample(denoiser, noise, num_train_timesteps=num_train_timesteps, **plan)
    first, *others = (num_train_timesteps * sigma for sigma in levels(steps, shift))
    # Heun corrects each step where the next begins, and not the last.
    twice = 2 if solver == "heun" else 1
    expected = [first, *(level for level in others for _ in range(twice))]
    assert seen == pytest.approx(expected, rel=1e-6)  # fp32, not rounded to whole timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_equal_closed_form_with_the_shift_applied_once(shift: float) -> None:
    # On v = t the steps add up to minus the sum of t * (width of the step), which pins every sigma.
    expected = sum((b - a) * a for a, b in pairwise([*levels(8, shift), 0.0]))

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        return (timestep / 1000).view(-1, 1, 1, 1).expand_as(latents)

    result = sample(denoiser, torch.zeros(1, 1, 1, 1), steps=8, shift=shift)
    assert result.item() == pytest.approx(expected, rel=1e-5)  # fp32


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_towards_a_point_arrives_there(solver: str, steps: int) -> None:
    # v = (x - target) / sigma is the straight path's velocity: any steps end in the target.
    noise, target = random_tensor(2, 1, 2, 2, seed=1), random_tensor(2, 1, 2, 2)

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        return (latents - target) / (timestep / 1000).view(-1, 1, 1, 1)

    result = sample(denoiser, noise, steps=steps, solver=solver, shift=3.0)
    # fp32, and a start 1e-6 below noise level 1.
    torch.testing.assert_close(result, target, rtol=2e-5, atol=2e-5)


def error_of(solver: str, steps: int, shift: float = 1.0) -> float:
    """Of the flow between N(MEAN, DEVIATION^2) and N(0, 1): it carries z to MEAN + DEVIATION z."""

    def velocity(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
        variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
        distance = (latents.double() - (1 - sigma) * MEAN) / variance
        return (sigma * distance - MEAN - (1 - sigma) * DEVIATION**2 * distance).float()

    noise = random_tensor(4, 1, 2, 2)
    result = sample(velocity, noise, steps=steps, solver=solver, shift=shift)
    return (result - (MEAN + DEVIATION * noise)).abs().max().item()


def test_heun_error_falls_with_the_square_of_the_step() -> None:
    assert math.log2(error_of("heun", 20) / error_of("heun", 40)) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_second_order_solver_beats_euler_and_converges(solver: str, shift: float) -> None:
    coarse, middle, fine = (error_of(solver, steps, shift) for steps in (10, 20, 40))
    assert coarse > middle > fine and fine < error_of("euler", 40, shift) / 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampler_hands_labels_and_guidance_on_and_takes_the_first_channels(solver: str) -> None:
    # v = label: guided velocity is null + scale * (label - null).
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        velocity = condition.labels_B.bfloat16().view(-1, 1, 1, 1).expand_as(latents) * weight
        return torch.cat([velocity, torch.full_like(velocity, torch.nan)], dim=1)

    labels = torch.tensor([4, 10])
    result = sample(denoiser, torch.zeros(2, 1, 1, 1), labels=labels, cfg_scale=2.0, solver=solver)
    expected = torch.tensor([2.0, -10.0])
    torch.testing.assert_close(result.flatten(), expected, rtol=1e-5, atol=2e-5)
    assert result.dtype == torch.float32 and not result.requires_grad


@pytest.mark.parametrize(
    ("interval", "guided"),
    [(None, "11111"), ((0.4, 0.8), "01110"), ((0.41, 0.79), "00100"), ((0.9, 1.0), "10000")],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_acts_between_two_noise_levels_and_at_both(
    solver: str, interval: tuple[float, float] | None, guided: str
) -> None:
    passes: dict[int, int] = {}

    def denoiser(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        passes[round(timestep[0].item())] = len(latents)
        return torch.zeros_like(latents)

    noise = random_tensor(1, 1, 2, 2)
    sample(denoiser, noise, steps=5, cfg_scale=2.0, cfg_interval=interval, solver=solver)
    assert passes == {1000 - 200 * step: 1 + int(on) for step, on in enumerate(guided)}


def test_sampler_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="'magic' is none of euler"):
        sample(lambda x, t, y: x, torch.zeros(1, 1, 2, 2), solver="magic")


def test_initial_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    whole = initial_noise((1, 4, 4), seed=3, indices=range(10))
    for part in ([0, 1, 2], range(3, 10), [7, 2]):
        assert torch.equal(initial_noise((1, 4, 4), seed=3, indices=part), whole[list(part)])
