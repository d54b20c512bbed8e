"""DDPM: noising, targets and the hybrid loss, against slow oracles in Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from promoe_ds.condition import ClassCondition
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.ddpm import Ddpm, gaussian_divergence, pixel_log_likelihood
from promoe_ds.diffusion.objective import DiffusionBatch
from promoe_ds.randomness import generator

from ..builders import random_tensor
from .test_noise_chain import chain_by_loop

SHAPE = (2, 3, 3)
#: Both ends, their neighbours, the middle.
TIMESTEPS = [0, 1, 2, 500, 998, 999]


def ddpm(length: int = 1000) -> Ddpm:
    return Ddpm(DiffusionConfig(objective="ddpm", num_train_timesteps=length))


def make_batch(timesteps: list[int], length: int = 1000) -> DiffusionBatch:
    """Return noised images whose pixels are in -1 ... 1, some of them black and white."""
    clean = random_tensor(len(timesteps), *SHAPE, seed=0).clamp(-1, 1)
    sigma = torch.tensor([t / length for t in timesteps])
    return DiffusionBatch(
        clean,
        random_tensor(len(timesteps), *SHAPE, seed=1),
        sigma,
        ClassCondition(torch.arange(len(timesteps)), 10**6),
    )


def make_prediction(batch: DiffusionBatch, error: float = 0.5) -> Tensor:
    """Return the noise, not exactly, and variances inside and outside of their range."""
    noise, variance = (random_tensor(*batch.noise_BZHW.shape, seed=s) for s in (2, 3))
    return torch.cat([batch.noise_BZHW + error * noise, variance], dim=1)


# The chain seen from a batch.


@pytest.mark.parametrize("length", [21, 1000, 4000])
def test_sigma_holds_every_timestep_exactly(length: int) -> None:
    batch = DiffusionBatch(
        *(torch.zeros(1, 1, 1, 1),) * 2,
        torch.tensor([t / length for t in range(length)]),
        ClassCondition(torch.zeros(1), 10),
    )
    assert ddpm(length).timestep(batch).tolist() == list(range(length))


def test_timesteps_are_drawn_uniformly_from_all() -> None:
    objective = ddpm(25)
    drawn = [
        round(objective.draw_sigma(generator(0, "sigma", 0, slot)) * 25) for slot in range(5000)
    ]
    counts = np.bincount(drawn, minlength=25)
    assert len(counts) == 25
    assert (
        (counts - 200) ** 2 / 200
    ).sum() < 51.2  # chi squared, 24 degrees of freedom: one in a thousand


def test_noised_equals_closed_form_of_each_image() -> None:
    batch = make_batch(TIMESTEPS)
    _, alpha_bar = chain_by_loop(1000)
    noised = ddpm().noised(batch)
    for image, t in enumerate(TIMESTEPS):
        expected = (
            math.sqrt(alpha_bar[t]) * batch.clean_BZHW[image].double()
            + math.sqrt(1 - alpha_bar[t]) * batch.noise_BZHW[image].double()
        )
        torch.testing.assert_close(noised[image].double(), expected, rtol=1e-6, atol=1e-6)  # fp32


# The terms of the loss.


def bound_by_loop(batch: DiffusionBatch, prediction: Tensor, length: int) -> list[float]:
    """Return each image's term of the bound in bits, number by number from the means and variances
    of both directions.
    """
    betas, alpha_bar = chain_by_loop(length)
    terms = []
    for image, sigma in enumerate(batch.sigma_B.tolist()):
        t = round(sigma * length)
        before = alpha_bar[t - 1] if t else 1.0
        posterior = betas[t] * (1 - before) / (1 - alpha_bar[t])
        low = posterior if t else betas[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
        numbers = zip(
            *(
                part.double().flatten().tolist()
                for part in (
                    batch.clean_BZHW[image],
                    batch.noise_BZHW[image],
                    *prediction[image].chunk(2),
                )
            ),
            strict=True,
        )
        total = 0.0
        for clean, noise, predicted, variance in numbers:
            noised = math.sqrt(alpha_bar[t]) * clean + math.sqrt(1 - alpha_bar[t]) * noise
            guess = (noised - math.sqrt(1 - alpha_bar[t]) * predicted) / math.sqrt(alpha_bar[t])
            of_image = betas[t] * math.sqrt(before) / (1 - alpha_bar[t])
            of_noised = (1 - before) * math.sqrt(1 - betas[t]) / (1 - alpha_bar[t])
            share = (variance + 1) / 2
            deviation = math.exp(0.5 * (share * math.log(betas[t]) + (1 - share) * math.log(low)))
            mean = of_image * guess + of_noised * noised
            if t:
                true = Normal(
                    torch.tensor(of_image * clean + of_noised * noised).double(),
                    math.sqrt(posterior),
                )
                total += kl_divergence(true, Normal(torch.tensor(mean).double(), deviation)).item()
            else:
                total -= pixel_log_likelihood_by_erf(clean, mean, deviation)
        terms.append(total / batch.clean_BZHW[image].numel() / math.log(2))
    return terms


def pixel_log_likelihood_by_erf(pixel: float, mean: float, deviation: float) -> float:
    def below(x: float) -> float:
        return 0.5 * math.erfc(-(x - mean) / deviation / math.sqrt(2))

    def above(x: float) -> float:
        return 0.5 * math.erfc((x - mean) / deviation / math.sqrt(2))

    if pixel < -0.999:
        return math.log(below(pixel + 1 / 255))
    if pixel > 0.999:
        return math.log(above(pixel - 1 / 255))
    tail = above if pixel > mean else below
    return math.log(abs(tail(pixel + 1 / 255) - tail(pixel - 1 / 255)))


@pytest.mark.parametrize("length", [1000, 200])
@pytest.mark.parametrize("error", [0.05, 1.0])
def test_hybrid_loss_equals_loop(length: int, error: float) -> None:
    timesteps = [0, 0, 1, 2, length // 2, length - 2, length - 1]
    batch = make_batch(timesteps, length)
    prediction = make_prediction(batch, error)
    losses = ddpm(length).losses(prediction, batch)
    assert list(losses) == ["diffusion", "vlb"]
    squares = (prediction[:, :2].double() - batch.noise_BZHW.double()).square()
    assert losses["diffusion"].item() == pytest.approx(squares.mean().item(), rel=1e-6)  # fp32 sums
    for image in range(len(timesteps)):
        latents = (
            part[image : image + 1] for part in (batch.clean_BZHW, batch.noise_BZHW, batch.sigma_B)
        )
        one = DiffusionBatch(*latents, batch.condition.select(slice(image, image + 1)))
        (expected,) = bound_by_loop(one, prediction[image : image + 1], length)
        # Weight 1 at 1000 timesteps, as DiT's mse + vb. fp32; the two ends of the variance's range
        # nearly meet at the last t.
        value = ddpm(length).losses(prediction[image : image + 1], one)["vlb"].item()
        assert value == pytest.approx(length / 1000 * expected, rel=1e-4), timesteps[image]
    expected = sum(bound_by_loop(batch, prediction, length)) / len(timesteps)
    assert losses["vlb"].item() == pytest.approx(length / 1000 * expected, rel=1e-4)


def test_squared_error_reaches_the_noise_and_the_bound_the_variance_channels_only() -> None:
    batch = make_batch(TIMESTEPS)
    prediction = make_prediction(batch).requires_grad_()
    losses = ddpm().losses(prediction, batch)
    of_error, of_bound = (
        torch.autograd.grad(losses[name], prediction)[0] for name in ("diffusion", "vlb")
    )
    expected = 2 * (prediction[:, :2] - batch.noise_BZHW) / batch.noise_BZHW.numel()
    torch.testing.assert_close(of_error[:, :2], expected)
    assert not of_error[:, 2:].any() and not of_bound[:, :2].any() and of_bound[:, 2:].all()


def test_bound_of_exact_noise_and_smallest_variance_is_zero_beyond_the_last_step() -> None:
    # The model's step back is then the true one.
    batch = make_batch(TIMESTEPS[1:])
    exact = torch.cat([batch.noise_BZHW, torch.full_like(batch.noise_BZHW, -1)], dim=1)
    losses = ddpm().losses(exact, batch)
    assert losses["diffusion"] == 0
    assert losses["vlb"] == 0


@pytest.mark.parametrize("error", [1e2, 1e4])
@pytest.mark.parametrize("variance", [-20.0, 20.0])
def test_loss_and_gradient_of_far_predictions_are_finite(error: float, variance: float) -> None:
    batch = make_batch(TIMESTEPS)
    prediction = make_prediction(batch, error)
    prediction[:, 2:] = variance
    prediction.requires_grad_()
    losses = ddpm().losses(prediction, batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert prediction.grad.isfinite().all()


def test_ddpm_loss_of_bf16_prediction_is_formed_in_fp32_on_the_batchs_device() -> None:
    batch = make_batch(TIMESTEPS)
    prediction = make_prediction(batch).bfloat16()
    expected = ddpm().losses(prediction.float(), batch)
    for name, value in ddpm().losses(prediction, batch).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])
    elsewhere = batch.to(torch.device("meta"))
    losses = ddpm().losses(prediction.to("meta"), elsewhere).values()
    assert {value.device.type for value in (ddpm().noised(elsewhere), *losses)} == {"meta"}


# The two elementary functions.


def test_divergence_of_nearly_equal_variances_keeps_its_digits() -> None:
    # wider - 1 + exp(-wider), which is wider^2 / 2, would be all rounding in fp32.
    wider = torch.tensor([1e-3, 1e-4])
    value = gaussian_divergence(torch.zeros(2), torch.zeros(2), wider)
    torch.testing.assert_close(value, wider.square() / 4, rtol=1e-2, atol=0)


@pytest.mark.parametrize("deviation", [0.007, 0.05, 1.0])
def test_pixel_likelihood_equals_erf(deviation: float) -> None:
    pixels = torch.linspace(-1, 1, 256)
    log_variance = torch.tensor(2 * math.log(deviation))
    for mean in (-1.02, -0.98, 0.0, 0.3, 1.0):
        # As far as the mass is not floored (six deviations).
        near = (pixels - mean).abs() < 6 * deviation
        value = pixel_log_likelihood(pixels, pixels - mean, log_variance)[near]
        expected = [
            pixel_log_likelihood_by_erf(pixel, mean, deviation) for pixel in pixels[near].tolist()
        ]
        torch.testing.assert_close(
            value.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
        )  # fp32


def test_pixel_likelihood_sums_to_one_over_the_levels() -> None:
    pixels = torch.linspace(-1, 1, 256)
    for mean, deviation in ((-0.99, 0.1), (0.2, 0.01), (1.5, 0.5)):
        mass = (
            pixel_log_likelihood(pixels, pixels - mean, torch.tensor(2 * math.log(deviation)))
            .exp()
            .sum()
        )
        assert mass.item() == pytest.approx(1.0, abs=1e-5)  # fp32
