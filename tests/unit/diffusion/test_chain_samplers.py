"""DDPM and DDIM along respaced chains: against a float64 loop, on Gaussian data with its exact
answer, image by image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion.sampler import (
    SamplingPlan,
    build_scheduler,
    image_generators,
    initial_noise,
    sample_latents,
)

from ..builders import random_tensor, small_config
from .test_noise_chain import chain_by_loop, timesteps_by_loop

NULL = 10
SHAPE = (2, 4, 4)


def make_plan(solver: str, steps: int, **values: Any) -> SamplingPlan:
    return SamplingPlan(**{"steps": steps, "cfg_scale": 1.0, "solver": solver, **values})


def labels_of(indices: range | list[int]) -> ClassCondition:
    return ClassCondition(torch.tensor([index % NULL for index in indices]), NULL)


def curved(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
    """Answer elementwise, by image, timestep and label, with noise and variances in and out of
    their range.
    """
    assert timestep.shape == condition.labels_B.shape and timestep.is_floating_point()
    level = (timestep / 1000).view(-1, 1, 1, 1)
    noise = 0.45 * latents * level.sqrt() / (0.2 + level) + 0.1 * torch.sin(
        3 * latents + condition.labels_B.view(-1, 1, 1, 1)
    )
    return torch.cat([noise, torch.cos(latents + level)], dim=1)


def sample(
    denoiser: Any,
    plan: SamplingPlan,
    *,
    seed: int = 0,
    indices: range | list[int] = range(3),
    shape: tuple[int, ...] = SHAPE,
) -> Tensor:
    noise = initial_noise(shape, seed=seed, indices=indices)
    generators = image_generators(seed=seed, indices=indices)
    return sample_latents(denoiser, noise, labels_of(indices), plan, generators)


def short_chain(length: int, steps: int) -> tuple[list[int], list[float], list[float]]:
    """Return DiT's respaced chain: timesteps, betas and alpha_bar, all of them by loops."""
    _, alpha_bar = chain_by_loop(length)
    timesteps = timesteps_by_loop(length, steps)
    kept = [alpha_bar[t] for t in timesteps]
    return (
        timesteps,
        [1 - now / before for now, before in zip(kept, [1.0, *kept[:-1]], strict=True)],
        kept,
    )


def sample_by_loop(length: int, steps: int, solver: str, indices: range) -> Tensor:
    """Return what `curved` leads to, in float64."""
    timesteps, betas, alpha_bar = short_chain(length, steps)
    condition = labels_of(indices)
    latents = initial_noise(SHAPE, seed=0, indices=indices).double()
    generators = image_generators(seed=0, indices=indices)
    for i in reversed(range(steps)):
        told = torch.full((len(indices),), float(timesteps[i]), dtype=torch.float64)
        noise, variance = curved(latents, told, condition).chunk(2, dim=1)
        image = (latents - np.sqrt(1 - alpha_bar[i]) * noise) / np.sqrt(alpha_bar[i])
        before = alpha_bar[i - 1] if i else 1.0
        if solver == "ddim":
            latents = np.sqrt(before) * image + np.sqrt(1 - before) * noise
            continue
        latents = (
            betas[i] * np.sqrt(before) * image + (1 - before) * np.sqrt(1 - betas[i]) * latents
        ) / (1 - alpha_bar[i])
        if i:
            low, high = np.log(betas[i] * (1 - before) / (1 - alpha_bar[i])), np.log(betas[i])
            drawn = torch.stack(
                [torch.randn(SHAPE, generator=generator) for generator in generators]
            )
            latents += torch.exp(0.5 * (low + (variance + 1) / 2 * (high - low))) * drawn
    return latents


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("length", "steps"), [(1000, 2), (1000, 21), (1000, 250), (1000, 1000), (100, 31), (21, 21)]
)
def test_respaced_sampling_equals_float64_loop(length: int, steps: int, solver: str) -> None:
    expected = sample_by_loop(length, steps, solver, range(3))
    result = sample(curved, make_plan(solver, steps, num_train_timesteps=length))
    # fp32 latents over all steps; from the first one they are up to 157 times the noise.
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)


# What an image depends on.


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_does_not_depend_on_its_batch(solver: str, scale: float) -> None:
    plan = make_plan(solver, 10, cfg_scale=scale)
    whole = sample(curved, plan, indices=range(5))
    cut = torch.cat(
        [sample(curved, plan, indices=part) for part in ([0], range(1, 3), range(3, 5))]
    )
    assert torch.equal(cut, whole)
    assert torch.equal(sample(curved, plan, indices=[4, 1]), whole[[4, 1]])


def test_noise_of_every_step_and_image_and_seed_differs() -> None:
    draws = [
        torch.randn(SHAPE, generator=g)
        for seed in (0, 1)
        for g in image_generators(seed=seed, indices=range(3))
        for _ in range(4)
    ]
    draws += [
        noise for seed in (0, 1) for noise in initial_noise(SHAPE, seed=seed, indices=range(3))
    ]
    assert len({draw.numpy().tobytes() for draw in draws}) == 2 * 3 * 5


def test_ddim_draws_nothing() -> None:
    plan, indices = make_plan("ddim", 10), range(2)
    noise = initial_noise(SHAPE, seed=0, indices=indices)
    generators, untouched = (image_generators(seed=0, indices=indices) for _ in range(2))
    first = sample_latents(curved, noise, labels_of(indices), plan)
    assert torch.equal(sample_latents(curved, noise, labels_of(indices), plan, generators), first)
    for used, fresh in zip(generators, untouched, strict=True):
        assert torch.equal(used.get_state(), fresh.get_state())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ddpm_without_a_generator_for_each_image_is_refused(count: int) -> None:
    generators = image_generators(seed=0, indices=range(count))
    with pytest.raises(ValueError, match=f"each of the 2 images, got {count}"):
        sample_latents(
            curved, random_tensor(2, *SHAPE), labels_of(range(2)), make_plan("ddpm", 5), generators
        )


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_chain_samplers_keep_fp32_and_no_graph_and_follow_the_device(solver: str) -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    result = sample(
        lambda x, t, y: torch.cat([x, x], dim=1).bfloat16() * weight, make_plan(solver, 3)
    )
    assert result.dtype == torch.float32 and not result.requires_grad
    noise, condition = torch.zeros(2, *SHAPE, device="meta"), labels_of(range(2))
    plan, generators = make_plan(solver, 3, cfg_scale=2.0), image_generators(seed=0, indices=[0, 1])
    result = sample_latents(curved, noise, condition.to(noise.device), plan, generators)
    assert (result.device.type, result.shape) == ("meta", noise.shape)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("length", [1000, 100])
def test_scheduler_of_a_pipeline_has_the_chain_that_was_trained(solver: str, length: int) -> None:
    diffusion = {"objective": "ddpm", "num_train_timesteps": length}
    sampling = {"solver": solver, "steps": 2}
    scheduler = build_scheduler(small_config(diffusion=diffusion, sampling=sampling))
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(alpha_bar, chain_by_loop(length)[1], rtol=1e-3)  # of fp32 betas
    assert not scheduler.config.clip_sample
    scheduler.set_timesteps(2)
    if solver == "ddpm":  # a variance behind the noise
        scheduler.step(torch.zeros(1, 4, 4, 4), scheduler.timesteps[0], torch.zeros(1, 2, 4, 4))


# Guidance.


def test_ddpm_guidance_moves_the_noise_and_leaves_the_variance_conditional() -> None:
    def guided_by_hand(latents: Tensor, timestep: Tensor, condition: ClassCondition) -> Tensor:
        conditional = curved(latents, timestep, condition)
        null = curved(latents, timestep, condition.null_like())
        noise = null[:, :2] + 2.0 * (conditional[:, :2] - null[:, :2])
        return torch.cat([noise, conditional[:, 2:]], dim=1)

    for solver in ("ddpm", "ddim"):
        result = sample(curved, make_plan(solver, 10, cfg_scale=2.0))
        assert torch.equal(result, sample(guided_by_hand, make_plan(solver, 10)))


# Normal data N(0, s^2): everything is linear, so the exact answers and all variances are known.


class NormalDenoiser:
    """The exact noise, and the exact variance of a step back, for data N(0, s^2) along a chain of
    some steps.
    """

    def __init__(self, deviation: float, steps: int) -> None:
        self.deviation = deviation
        timesteps, betas, alpha_bar = short_chain(1000, steps)
        self.level = {
            float(t): (beta, now, before)
            for t, beta, now, before in zip(
                timesteps, betas, alpha_bar, [1.0, *alpha_bar[:-1]], strict=True
            )
        }

    def __call__(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        beta, now, before = self.level[timestep[0].item()]
        marginal = now * self.deviation**2 + 1 - now
        noise = np.sqrt(1 - now) / marginal * latents
        if before == 1.0:
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)  # the last step adds no noise
        low, high = np.log(beta * (1 - before) / (1 - now)), np.log(beta)
        # Of x_{i-1} given x_i: that of the posterior, and that of the image through the posterior's
        # mean.
        image = self.deviation**2 * (1 - now) / marginal
        exact = np.exp(low) + (beta * np.sqrt(before) / (1 - now)) ** 2 * image
        return torch.cat(
            [noise, torch.full_like(noise, 2 * (np.log(exact) - low) / (high - low) - 1)], dim=1
        )


@pytest.mark.parametrize("steps", [4, 50, 1000])
@pytest.mark.parametrize("deviation", [0.5, 1.5])
def test_ddpm_of_normal_data_recovers_its_variance(deviation: float, steps: int) -> None:
    result = sample(
        NormalDenoiser(deviation, steps),
        make_plan("ddpm", steps),
        indices=range(16),
        shape=(1, 32, 32),
    )
    # 16,384 numbers: the deviation's standard error is 1 / sqrt(2 n) = 0.55%, times four. The chain
    # itself is exact but for its last step, which leaves out 1e-4 of variance.
    assert result.std().item() == pytest.approx(deviation, rel=0.022)
    assert result.mean().item() == pytest.approx(0.0, abs=4 * deviation / 128)


@pytest.mark.parametrize("deviation", [0.5, 1.5])
def test_ddim_of_normal_data_recovers_its_variance(deviation: float) -> None:
    # DDIM scales the noise that it starts from: no statistical error beside the start's own. Its
    # steps have an error of first order: 1,000 steps come within half a per cent.
    noise = initial_noise((1, 8, 8), seed=0, indices=[0])
    errors = []
    for steps in (100, 1000):
        plan = make_plan("ddim", steps)
        result = sample_latents(
            NormalDenoiser(deviation, steps), noise, ClassCondition(torch.tensor([0]), NULL), plan
        )
        ratio = (result / noise).double()
        assert ratio.std() < 1e-4 * ratio.mean()  # fp32
        errors.append(abs(ratio.mean().item() / deviation - 1))
    assert errors[1] < 0.005
    assert errors[1] < errors[0] < 0.05
