"""One optimizer step: what is computed, in what order, on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from promoe_ds.diffusion.objective import DiffusionBatch, velocity_loss
from promoe_ds.model.dit import DiT
from promoe_ds.routing.assignment import RoutingPlan


@dataclass(frozen=True)
class TrainingOutput:
    """A training pass: the loss, its terms (they add up to it), each MoE layer's plan."""

    loss: Tensor
    terms: dict[str, Tensor]
    plans: dict[int, RoutingPlan]


class TrainingModule(nn.Module):
    """What DeepSpeed's engine wraps: a batch in, the loss out."""

    def __init__(self, denoiser: DiT) -> None:
        """Train `denoiser`."""
        super().__init__()
        self.denoiser = denoiser
        self._num_train_timesteps = denoiser.config.diffusion.num_train_timesteps

    def forward(self, batch: DiffusionBatch) -> TrainingOutput:
        """Return diffusion loss plus the auxiliary losses of all layers, added in the open.

        Source: Sec. 4.3, L = Eq. 1 + lambda_RCL * Eq. 6, summed over the MoE layers; official: the auxiliary losses enter
        the gradient alone, with weight 1; differs: accumulation and scaling treat them as the rest of the loss.
        """
        output = self.denoiser.denoise(batch.noised_BZHW, batch.sigma_B * self._num_train_timesteps, batch.labels_B)
        terms = {"diffusion": velocity_loss(output.prediction_BZHW, batch)}
        for plan in output.plans.values():
            for name, value in plan.aux_losses.items():
                terms[name] = terms[name] + value if name in terms else value
        return TrainingOutput(torch.stack(list(terms.values())).sum(), terms, output.plans)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log. Terms are this rank's means over its micro-steps, on the device."""

    terms: dict[str, Tensor]
    grad_norm: float
    lr: float
    problem: str = ""

    @property
    def skipped(self) -> bool:
        """Whether the update was left out."""
        return bool(self.problem)
