"""Sampling: from noise along the velocity, with diffusers' schedulers.

Letters: B images, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from promoe_ds.diffusion.guidance import Denoiser, guided
from promoe_ds.randomness import generator

SOLVERS = ("euler",)


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How to sample: steps of the solver, guidance, the schedule's shift (applied once)."""

    steps: int
    cfg_scale: float
    null_label: int
    shift: float = 1.0
    solver: str = "euler"
    num_train_timesteps: int = 1000


def sigma_schedule(steps: int) -> np.ndarray:
    """Return the unshifted noise levels of `steps` steps, from 1 downwards; the final 0 is the scheduler's."""
    return np.linspace(1.0, 0.0, steps + 1)[:-1]


def initial_noise(shape: Sequence[int], *, seed: int, indices: Sequence[int]) -> Tensor:
    """Return fp32 noise (len(indices), *shape) in which image i is a function of (seed, i) alone."""
    draws = [generator(seed, "sample", 0, index).standard_normal(tuple(shape), dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(draws))


@torch.no_grad()
def sample_latents(denoiser: Denoiser, noise_BZHW: Tensor, labels_B: Tensor, plan: SamplingPlan) -> Tensor:
    """Integrate from noise to data.

    Source: official sampler; differs: the shift is applied once (by the scheduler), not twice.
    Args:
        denoiser: predicts at least Z channels; the first Z are the velocity.
        noise_BZHW: fp32 start.
        labels_B: int64.
    Returns: latents (B, Z, H, W), fp32.
    Raises: ValueError for an unknown solver.
    """
    if plan.solver not in SOLVERS:
        raise ValueError(f"solver {plan.solver!r} is none of {', '.join(SOLVERS)}")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=plan.num_train_timesteps, shift=plan.shift)
    scheduler.set_timesteps(sigmas=sigma_schedule(plan.steps).tolist(), device=noise_BZHW.device)
    latents = noise_BZHW
    for timestep in scheduler.timesteps:
        prediction = guided(denoiser, latents, timestep.expand(len(latents)), labels_B, null_label=plan.null_label,
                            scale=plan.cfg_scale)
        latents = scheduler.step(prediction[:, :latents.shape[1]].float(), timestep, latents).prev_sample
    return latents
