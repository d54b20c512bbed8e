"""DDPM with learned variance: noise prediction at integer timesteps and the hybrid loss.

Letters: B images, J timesteps of the chain, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.noise_chain import betas_of, linear_alpha_bar, posterior_variance
from promoe_ds.diffusion.objective import DiffusionBatch, target_error

#: lambda of Nichol & Dhariwal (2021), Eq. 16. The bound sums over the chain, a batch estimates the
# mean: therefore * J.
VLB_WEIGHT = 1e-3
#: Half a level of 8-bit pixels that are scaled to -1 ... 1.
HALF_PIXEL = 1 / 255
#: Beyond this, a pixel is black or white: its level reaches to infinity.
EDGE = 0.999
#: Less mass than this counts as this much, and gives no gradient.
_MIN_PROBABILITY = 1e-12


class Ddpm:
    """Predict the noise in the first Z channels, the variance of the step back in the other Z."""

    def __init__(self, config: DiffusionConfig) -> None:
        """Compute the chain's tables from `config`."""
        self.config = config
        alpha_bar_J = linear_alpha_bar(config.num_train_timesteps)
        betas_J = betas_of(alpha_bar_J)
        # The last step back has no variance, and no logarithm of it: DiT lends it that of the step
        # before.
        posterior_J = posterior_variance(alpha_bar_J)
        posterior_J[0] = posterior_J[1]
        self._tables = {
            name: torch.from_numpy(values).float()
            for name, values in {
                "signal": np.sqrt(alpha_bar_J),
                "noise": np.sqrt(1.0 - alpha_bar_J),
                "mean_per_noise": betas_J / np.sqrt((1.0 - betas_J) * (1.0 - alpha_bar_J)),
                "log_variance_low": np.log(posterior_J),
                "log_variance_high": np.log(betas_J),
            }.items()
        }

    def draw_sigma(self, random: np.random.Generator) -> float:
        """Draw a timestep, uniform in 0 ... num_train_timesteps - 1, as its share of
        num_train_timesteps.

        Source: Ho et al. (2020), Algorithm 1; official DiT: the same.
        """
        return (
            int(random.integers(self.config.num_train_timesteps)) / self.config.num_train_timesteps
        )

    def noised(self, batch: DiffusionBatch) -> Tensor:
        """Return sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise.

        Source: Ho et al. (2020), Eq. 4; official DiT: the same.
        """
        return (
            self._at("signal", batch) * batch.clean_BZHW
            + self._at("noise", batch) * batch.noise_BZHW
        )

    def timestep(self, batch: DiffusionBatch) -> Tensor:
        """Return the integer timesteps, as floats."""
        return (batch.sigma_B * self.config.num_train_timesteps).round()

    def target(self, batch: DiffusionBatch) -> Tensor:
        """Return the noise."""
        return batch.noise_BZHW

    def losses(self, prediction_BZHW: Tensor, batch: DiffusionBatch) -> dict[str, Tensor]:
        """Return the squared error of the noise and the weighted variational bound, `vlb`.

        Source: Nichol & Dhariwal (2021), Eq. 16; official DiT: mse + vb, the same for its 1000
        timesteps.
        Args:
            prediction_BZHW: (B, 2 Z, H, W), any float dtype.
        Gradient: `diffusion` reaches the first Z channels only, `vlb` the others only.
        """
        predicted, variance = prediction_BZHW.float().chunk(2, dim=1)
        bound_B = self._bound(predicted.detach(), variance, batch)
        weight = VLB_WEIGHT * self.config.num_train_timesteps
        return {
            "diffusion": target_error(predicted, self.target(batch)),
            "vlb": weight * bound_B.mean(),
        }

    def _bound(
        self, predicted_BZHW: Tensor, variance_BZHW: Tensor, batch: DiffusionBatch
    ) -> Tensor:
        """Return each image's term of the variational bound at its timestep, in bits per dimension,
        (B,).

        Source: Ho et al. (2020), Eq. 5; official DiT: the same; differs: the difference of the true
        and the predicted mean is formed from that of the noises (Eq. 12), where both means would
        cancel in fp32.
        """
        low, high = self._at("log_variance_low", batch), self._at("log_variance_high", batch)
        # Nichol & Dhariwal (2021), Eq. 15; -1 ... 1 spans the range, as in DiT.
        log_variance = low + (variance_BZHW + 1) / 2 * (high - low)
        mean_error = self._at("mean_per_noise", batch) * (predicted_BZHW - batch.noise_BZHW)
        divergence = gaussian_divergence(mean_error, low, log_variance)
        # The image itself is the true mean of the last step.
        surprise = -pixel_log_likelihood(batch.clean_BZHW, mean_error, log_variance)
        is_last_step = (self.timestep(batch) == 0).view(-1, 1, 1, 1)
        return torch.where(is_last_step, surprise, divergence).mean(dim=(1, 2, 3)) / math.log(2)

    def _at(self, name: str, batch: DiffusionBatch) -> Tensor:
        """Return a table's values at the batch's timesteps, (B, 1, 1, 1)."""
        if self._tables[name].device != batch.sigma_B.device:
            self._tables[name] = self._tables[name].to(batch.sigma_B.device)
        return self._tables[name][self.timestep(batch).long()].view(-1, 1, 1, 1)


def gaussian_divergence(
    mean_difference: Tensor, log_variance_true: Tensor, log_variance_model: Tensor
) -> Tensor:
    """Return KL(true || model) of normal distributions, elementwise, in nats."""
    wider = log_variance_model - log_variance_true
    # expm1: the two variances of early steps agree in all but their last digits.
    return 0.5 * (
        wider + torch.expm1(-wider) + mean_difference.square() * torch.exp(-log_variance_model)
    )


def pixel_log_likelihood(pixels: Tensor, mean_error: Tensor, log_variance: Tensor) -> Tensor:
    """Return the logarithm of a normal distribution's mass on the 8-bit level of each pixel, in
    nats.

    Source: Ho et al. (2020), Eq. 13; official DiT: the same with a fast approximation of the normal
    distribution; differs: the exact one.
    Args:
        pixels: in -1 ... 1; mean_error: pixels minus the distribution's mean; log_variance: of the
        distribution.
    """
    scale = torch.exp(-0.5 * log_variance)
    # The mass is symmetric about the mean; below it, fp32 keeps the digits of small probabilities.
    distance = -mean_error.abs()
    inside = _normal_mass_below(scale * (distance + HALF_PIXEL)) - _normal_mass_below(
        scale * (distance - HALF_PIXEL)
    )
    black, white = (
        _normal_mass_below(scale * (mean_error + HALF_PIXEL)),
        _normal_mass_below(scale * (HALF_PIXEL - mean_error)),
    )
    mass = torch.where(pixels < -EDGE, black, torch.where(pixels > EDGE, white, inside))
    return mass.clamp_min(_MIN_PROBABILITY).log()


def _normal_mass_below(x: Tensor) -> Tensor:
    # torch.special.ndtr is 1 + erf, which in fp32 has lost the tail at five deviations.
    return 0.5 * torch.erfc(-x / math.sqrt(2))
