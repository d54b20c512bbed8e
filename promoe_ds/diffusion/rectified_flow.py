"""Rectified flow: the straight path from data to noise and its velocity.

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.objective import DiffusionBatch, target_error


class RectifiedFlow:
    """Predict the velocity, noise - clean, at logit-normal noise levels."""

    def __init__(self, config: DiffusionConfig) -> None:
        """Take the distribution of the noise levels from `config`."""
        self.config = config

    def draw_sigma(self, random: np.random.Generator) -> float:
        """Draw a logit-normal noise level.

        Source: Esser et al. (2024), Sec. 3.1; official: the same.
        """
        return 1.0 / (
            1.0
            + np.exp(-(self.config.sigma_mean + self.config.sigma_std * random.standard_normal()))
        )

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
