"""A training pass, from a batch to the loss, and what an optimizer step returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from promoe_ds.config import RunConfig
from promoe_ds.diffusion import DiffusionBatch, build_objective
from promoe_ds.model.dit import DiT
from promoe_ds.routing.assignment import RoutingPlan


@dataclass(frozen=True)
class TrainingOutput:
    """A training pass: the loss, its terms (they add up to it), each MoE layer's plan."""

    loss: Tensor
    terms: dict[str, Tensor]
    plans: dict[int, RoutingPlan]


def autocast_context(config: RunConfig, device_type: str) -> Callable[[], AbstractContextManager]:
    """Return what makes the context of a pass: torch's autocast for `bf16_autocast`."""
    if config.precision.compute == "bf16_autocast":
        return partial(torch.autocast, device_type, torch.bfloat16)
    return nullcontext


class TrainingModule(nn.Module):
    """What DeepSpeed's engine wraps: a batch in, the loss out."""

    def __init__(
        self, denoiser: DiT, compute_context: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        """Train `denoiser`, whose passes run in a context that `compute_context` makes."""
        super().__init__()
        self.denoiser, self.compute_context = denoiser, compute_context
        self.objective = build_objective(denoiser.config.diffusion)

    def forward(self, batch: DiffusionBatch) -> TrainingOutput:
        """Return diffusion loss plus the auxiliary losses of all layers, added in the open.

        Source: Sec. 4.3, L = Eq. 1 + lambda_RCL * Eq. 6, summed over the MoE layers; official: the
        auxiliary losses enter the gradient alone, with weight 1; differs: accumulation and scaling
        treat them as the rest of the loss.
        """
        with self.compute_context():
            output = self.denoiser.denoise(
                self.objective.noised(batch), self.objective.timestep(batch), batch.condition
            )
        terms = self.objective.losses(output.prediction_BZHW, batch)
        terms |= output.aux_losses
        terms |= self._per_layer_terms(output.plans, batch)
        return TrainingOutput(torch.stack(list(terms.values())).sum(), terms, output.plans)

    def _per_layer_terms(
        self, plans: dict[int, RoutingPlan], batch: DiffusionBatch
    ) -> dict[str, Tensor]:
        """Compare each router's own prediction of the target, where it makes one, with the target;
        return the mean error over layers.

        Source: per-layer regularisation of Expert Race (arXiv 2503.16057, Sec. 6).
        """
        predictions = [
            plan.target_patches_BSP
            for plan in plans.values()
            if plan.target_patches_BSP is not None
        ]
        if not predictions:
            return {}
        target_BSP = self.denoiser.patchify(self.objective.target(batch)).float()
        errors = torch.stack(
            [(prediction - target_BSP).square().mean() for prediction in predictions]
        )
        return {"per_layer": self.denoiser.config.routing.per_layer_weight * errors.mean()}


@dataclass(frozen=True)
class Verdict:
    """What every rank knows of a step: the gradient's norm, what was not finite ("": nothing),
    whether some rank asked for a shutdown.
    """

    grad_norm: float
    problem: str = ""
    stop_requested: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log. Terms are this rank's means over its micro-steps, on the
    device.
    """

    terms: dict[str, Tensor]
    lr: float
    read: Callable[[], Verdict]

    @cached_property
    def verdict(self) -> Verdict:
        """What `read` returns; all ranks ask for it together.  Sync: the first time, where the
        device decided.
        """
        return self.read()
