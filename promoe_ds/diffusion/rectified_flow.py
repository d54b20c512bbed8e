"""Rectified flow: the straight path from data to noise and its velocity.

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.objective import DiffusionBatch, target_error

Level = TypeVar("Level", float, np.ndarray)


def shifted(sigma: Level, shift: float) -> Level:
    """Return a noise level, or an array of them, under a shift: more than 1 favours noise.

    Source: Esser et al. (2024), Eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


class RectifiedFlow:
    """Predict the velocity, noise - clean."""

    def __init__(self, config: DiffusionConfig) -> None:
        """Take the distribution of the noise levels from `config`."""
        self.config = config

    def draw_sigma(self, random: np.random.Generator) -> float:
        """Draw a noise level.

        Source: Esser et al. (2024), Sec. 3.1 and Eq. 23 for `train_shift`; official: logit-normal.
        """
        config = self.config
        if config.noise_levels == "logit_normal":
            level = config.sigma_mean + config.sigma_std * random.standard_normal()
            sigma = 1.0 / (1.0 + np.exp(-level))
        else:
            sigma = random.random()
        if config.noise_levels == "mode":
            bend = np.cos(np.pi / 2 * sigma) ** 2 - 1.0 + sigma
            sigma = 1.0 - sigma - config.mode_scale * bend
        return shifted(sigma, config.train_shift)

    def noised(self, batch: DiffusionBatch) -> Tensor:
        """Return the point at sigma on the straight path: (1 - sigma) * clean + sigma * noise."""
        sigma = batch.sigma_B.view(-1, 1, 1, 1)
        return (1 - sigma) * batch.clean_BZHW + sigma * batch.noise_BZHW

    def timestep(self, batch: DiffusionBatch) -> Tensor:
        """Return sigma * num_train_timesteps, not rounded."""
        return batch.sigma_B * self.config.num_train_timesteps

    def target(self, batch: DiffusionBatch) -> Tensor:
        """Return the velocity: noise - clean."""
        return batch.noise_BZHW - batch.clean_BZHW

    def losses(self, prediction_BZHW: Tensor, batch: DiffusionBatch) -> dict[str, Tensor]:
        """Return the squared error of the velocity; channels beyond the latents' (learned variance)
        are ignored.
        """
        predicted = prediction_BZHW[:, : batch.clean_BZHW.shape[1]].float()
        return {"diffusion": target_error(predicted, self.target(batch))}
