"""The sampler: its sigmas in closed form, Euler on fields with known solutions, noise of each
image.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.sampler import SamplingPlan, initial_noise, sample_latents, sigma_schedule

from ..builders import random_tensor

NULL = 10


def make_plan(**values: Any) -> SamplingPlan:
    return SamplingPlan(**{"steps": 4, "cfg_scale": 1.0, **values})


def seen_timesteps(plan: SamplingPlan) -> list[float]:
    """Return the timesteps that a denoiser is asked for, checking that all images share them."""
    seen = []

    def denoiser(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        assert timestep.shape == labels.labels_B.shape == latents.shape[:1]
        assert timestep.unique().numel() == 1
        seen.append(timestep[0].item())
        return torch.zeros_like(latents)

    sample_latents(
        denoiser, random_tensor(2, 1, 2, 2), ClassCondition(torch.tensor([0, 1]), NULL), plan
    )
    return seen


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_sigmas_unshifted_are_even_steps_from_one(steps: int) -> None:
    assert sigma_schedule(steps).tolist() == pytest.approx(
        [1 - i / steps for i in range(steps)], abs=1e-15
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_timesteps_equal_closed_form_with_the_shift_applied_once(steps: int, shift: float) -> None:
    sigmas = [1 - i / steps for i in range(steps)]
    expected = [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]
    assert seen_timesteps(make_plan(steps=steps, shift=shift)) == pytest.approx(
        expected, rel=1e-6
    )  # fp32 sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_equal_closed_form_with_the_shift_applied_once(shift: float) -> None:
    # On v = t the steps add up to minus the sum of t * (width of the step), which pins every sigma.
    steps = 8
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps))] + [
        0.0
    ]
    expected = sum((after - before) * before for before, after in pairwise(sigmas))
    result = sample_latents(
        lambda x, t, y: (t / 1000).view(-1, 1, 1, 1).expand_as(x),
        torch.zeros(1, 1, 1, 1),
        ClassCondition(torch.tensor([0]), NULL),
        make_plan(steps=steps, shift=shift),
    )
    assert result.item() == pytest.approx(expected, rel=1e-5)  # fp32


@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_timestep_is_sigma_times_num_train_timesteps(num_train_timesteps: int) -> None:
    seen = seen_timesteps(make_plan(num_train_timesteps=num_train_timesteps))
    assert seen == [sigma * num_train_timesteps for sigma in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_euler_constant_velocity_is_exact(steps: int) -> None:
    # Integers and steps of a power of two: no rounding anywhere.
    noise, velocity = (torch.arange(8.0).view(2, 1, 2, 2) - shift for shift in (3, 5))
    result = sample_latents(
        lambda x, t, y: velocity,
        noise,
        ClassCondition(torch.tensor([0, 1]), NULL),
        make_plan(steps=steps),
    )
    assert torch.equal(result, noise - velocity)


def test_euler_constant_velocity_is_exact_under_a_shift() -> None:
    noise, velocity = random_tensor(2, 1, 2, 2), random_tensor(2, 1, 2, 2, seed=1)
    result = sample_latents(
        lambda x, t, y: velocity,
        noise,
        ClassCondition(torch.tensor([0, 1]), NULL),
        make_plan(steps=10, shift=3.0),
    )
    torch.testing.assert_close(result, noise - velocity, rtol=1e-5, atol=1e-5)  # ten steps in fp32


def test_euler_velocity_towards_a_point_arrives_there() -> None:
    # v = (x - target) / sigma is the straight path's velocity: every number of steps ends in the
    # target.
    target = random_tensor(2, 1, 2, 2)

    def denoiser(latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return (latents - target) / (timestep / 1000).view(-1, 1, 1, 1)

    result = sample_latents(
        denoiser,
        random_tensor(2, 1, 2, 2, seed=1),
        ClassCondition(torch.tensor([0, 1]), NULL),
        make_plan(steps=5, shift=3.0),
    )
    torch.testing.assert_close(result, target, rtol=1e-5, atol=1e-5)  # five steps in fp32


def test_sampler_takes_the_first_channels_as_velocity() -> None:
    noise = random_tensor(2, 1, 2, 2)
    result = sample_latents(
        lambda x, t, y: torch.cat([torch.ones_like(x), torch.full_like(x, torch.nan)], dim=1),
        noise,
        ClassCondition(torch.tensor([0, 1]), NULL),
        make_plan(steps=1),
    )
    assert torch.equal(result, noise - 1)


def test_sampler_hands_labels_and_guidance_on() -> None:
    # v = label: guided velocity is null + scale * (label - null).
    result = sample_latents(
        lambda x, t, y: y.labels_B.float().view(-1, 1, 1, 1).expand_as(x),
        torch.zeros(2, 1, 1, 1),
        ClassCondition(torch.tensor([4, 10]), NULL),
        make_plan(steps=4, cfg_scale=2.0),
    )
    assert result.flatten().tolist() == [-(10 + 2 * (4 - 10)), -10]


def test_sampler_accepts_bf16_predictions_and_returns_fp32() -> None:
    result = sample_latents(
        lambda x, t, y: torch.ones_like(x, dtype=torch.bfloat16),
        random_tensor(1, 1, 2, 2),
        ClassCondition(torch.tensor([0]), NULL),
        make_plan(),
    )
    assert result.dtype == torch.float32


def test_sampler_keeps_no_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    result = sample_latents(
        lambda x, t, y: x * weight,
        random_tensor(1, 1, 2, 2),
        ClassCondition(torch.tensor([0]), NULL),
        make_plan(),
    )
    assert not result.requires_grad


def test_sampler_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="solver 'magic' is none of euler"):
        sample_latents(
            lambda x, t, y: x,
            random_tensor(1, 1, 2, 2),
            ClassCondition(torch.tensor([0]), NULL),
            make_plan(solver="magic"),
        )


def test_initial_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    whole = initial_noise((1, 4, 4), seed=3, indices=range(10))
    assert torch.equal(
        torch.cat(
            [initial_noise((1, 4, 4), seed=3, indices=part) for part in ([0, 1, 2], range(3, 10))]
        ),
        whole,
    )
    assert torch.equal(initial_noise((1, 4, 4), seed=3, indices=[7, 2]), whole[[7, 2]])


def test_initial_noise_differs_between_images_and_seeds() -> None:
    whole = torch.cat([initial_noise((1, 2, 2), seed=seed, indices=range(4)) for seed in (0, 1)])
    assert len({noise.numpy().tobytes() for noise in whole}) == 8
    assert whole.dtype == torch.float32
