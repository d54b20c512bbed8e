"""Rectified flow: the straight path from data to noise and the velocity loss.

One time convention: sigma 0 is data, 1 is noise; timestep = sigma * num_train_timesteps is what the network sees;
velocity = noise - clean.
Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import DiffusionConfig
from promoe_ds.randomness import generator


@dataclass(frozen=True)
class DiffusionBatch:
    """What one forward pass of training needs; labels after dropout."""

    clean_BZHW: Tensor
    noise_BZHW: Tensor
    sigma_B: Tensor
    labels_B: Tensor

    @property
    def noised_BZHW(self) -> Tensor:
        """The point at sigma on the straight path: (1 - sigma) * clean + sigma * noise."""
        sigma = self.sigma_B.view(-1, 1, 1, 1)
        return (1 - sigma) * self.clean_BZHW + sigma * self.noise_BZHW

    @property
    def velocity_BZHW(self) -> Tensor:
        """The target: noise - clean."""
        return self.noise_BZHW - self.clean_BZHW

    def to(self, device: torch.device) -> DiffusionBatch:
        """Return the batch on `device`."""
        return DiffusionBatch(*(t.to(device, non_blocking=True) for t in
                                (self.clean_BZHW, self.noise_BZHW, self.sigma_B, self.labels_B)))


def draw_batch(clean_BZHW: Tensor, labels_B: Tensor, config: DiffusionConfig, *, null_label: int, seed: int, step: int,
               slots: Sequence[int]) -> DiffusionBatch:
    """Draw noise, noise levels and label dropout for samples of one optimizer step.

    Source: logit-normal sigma of Esser et al. (2024); official: the same, drawn from one generator; differs: each draw is
    a function of (seed, stream, step, slot of the global batch), hence of no rank, micro-batch or resume.
    Args:
        clean_BZHW: latents; labels_B: their classes; slots: their places in the global batch.
    """
    noise, sigma, dropped = [], [], []
    for slot in slots:
        noise.append(generator(seed, "noise", step, slot).standard_normal(clean_BZHW.shape[1:], dtype=np.float32))
        normal = generator(seed, "sigma", step, slot).standard_normal()
        sigma.append(1.0 / (1.0 + np.exp(-(config.sigma_mean + config.sigma_std * normal))))
        dropped.append(generator(seed, "label_drop", step, slot).random() < config.label_dropout)
    labels = torch.where(torch.tensor(dropped), null_label, labels_B)
    return DiffusionBatch(clean_BZHW, torch.from_numpy(np.stack(noise)), torch.tensor(sigma, dtype=torch.float32), labels)


def velocity_loss(prediction_BZHW: Tensor, batch: DiffusionBatch) -> Tensor:
    """Return the mean squared error of the velocity, a scalar in fp32.

    Source: Eq. 1 for the target noise - clean; official: the same.
    Args:
        prediction_BZHW: the network's output; channels beyond the latents' (learned variance) are ignored.
    """
    predicted = prediction_BZHW[:, :batch.clean_BZHW.shape[1]].float()
    return (predicted - batch.velocity_BZHW).square().mean()
