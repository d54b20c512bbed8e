"""What a training objective is, the batch that it works on, and the draws that make one.

One time convention: sigma 0 is data, 1 is noise; the timestep, near sigma * num_train_timesteps, is
what the network sees.
Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.randomness import generators


@dataclass(frozen=True)
class DiffusionBatch:
    """What one forward pass of training needs; the condition after dropout."""

    clean_BZHW: Tensor
    noise_BZHW: Tensor
    sigma_B: Tensor
    condition: Condition

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        height, width = self.clean_BZHW.shape[2:]
        return height, width

    def to(self, device: torch.device) -> DiffusionBatch:
        """Return the batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> DiffusionBatch:
        """Return the batch in memory from which a GPU copies while the host continues."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, the condition's too."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(keep)
        return found

    def _map(self, function: Callable[[Tensor], Tensor]) -> DiffusionBatch:
        return DiffusionBatch(
            function(self.clean_BZHW),
            function(self.noise_BZHW),
            function(self.sigma_B),
            self.condition.moved(function),
        )


class Objective(Protocol):
    """How images are noised and what the network is to say about them; everything in fp32."""

    config: DiffusionConfig

    def draw_sigma(self, random: np.random.Generator) -> float:
        """Draw the noise level of one image."""

    def noised(self, batch: DiffusionBatch) -> Tensor:
        """Return what the network is shown, (B, Z, H, W)."""

    def timestep(self, batch: DiffusionBatch) -> Tensor:
        """Return the noise levels as the network gets them, (B,) float."""

    def target(self, batch: DiffusionBatch) -> Tensor:
        """Return what the first Z channels are to predict, (B, Z, H, W)."""

    def losses(self, prediction_BZHW: Tensor, batch: DiffusionBatch) -> dict[str, Tensor]:
        """Return the terms of the loss by name, scalars that add up to it; `diffusion` is the
        squared error of the target.
        """


def draw_batch(
    clean_BZHW: Tensor,
    condition: Condition,
    objective: Objective,
    *,
    seed: int,
    step: int,
    slots: Sequence[int],
) -> DiffusionBatch:
    """Draw noise, noise levels and condition dropout for samples of one optimizer step.

    Source: official; differs: each draw is a function of (seed, stream, step, slot of the global
    batch), and of no rank, micro-batch or resume.
    Args:
        clean_BZHW: latents; condition: theirs; slots: their places in the global batch.
    """
    noise_BZHW = np.empty(clean_BZHW.shape, dtype=np.float32)
    for noise_ZHW, random in zip(noise_BZHW, generators(seed, "noise", step, slots), strict=True):
        random.standard_normal(dtype=np.float32, out=noise_ZHW)
    sigma = [objective.draw_sigma(random) for random in generators(seed, "sigma", step, slots)]
    dropped = [
        random.random() < objective.config.label_dropout
        for random in generators(seed, "label_drop", step, slots)
    ]
    return DiffusionBatch(
        clean_BZHW,
        torch.from_numpy(noise_BZHW),
        torch.tensor(sigma, dtype=torch.float32),
        condition.drop(torch.tensor(dropped)).counted(),
    )


def target_error(predicted_BZHW: Tensor, target_BZHW: Tensor) -> Tensor:
    """Return the mean squared error of a prediction, a scalar.

    Source: Eq. 1 for the target noise - clean; official: the same.
    """
    return (predicted_BZHW - target_BZHW).square().mean()
