"""Sampling: from noise to data, with diffusers' schedulers.

Letters: B images, J noise levels of a chain, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config.schema import RunConfig
from promoe_ds.diffusion.guidance import Denoiser, GuidedDenoiser
from promoe_ds.diffusion.noise_chain import (
    BETA_FIRST,
    BETA_LAST,
    LINEAR_STEPS,
    betas_of,
    linear_alpha_bar,
    respaced_timesteps,
)
from promoe_ds.diffusion.rectified_flow import shifted
from promoe_ds.randomness import generators

#: How far below noise level 1 the multistep solvers start.
_BELOW_ONE = 1e-6
#: Noise levels are fp32: one that differs by less from an end of the guidance interval is that end.
_SAME_LEVEL = 1e-6


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How to sample: the solver and its steps, guidance, the flow schedule's shift (applied once).

    cfg_interval: noise levels between which there is guidance (Kynkäänniemi et al., 2024), at all
    if None; outside them a step makes one pass without it. That of a DDPM timestep is its share of
    `num_train_timesteps`.
    two_passes: whether guidance's halves are computed one after the other, see `GuidedDenoiser`.
    """

    steps: int
    cfg_scale: float
    shift: float = 1.0
    solver: str = "euler"
    num_train_timesteps: int = 1000
    cfg_interval: tuple[float, float] | None = None
    two_passes: bool = False

    @classmethod
    def of(cls, config: RunConfig, **given: Any) -> SamplingPlan:
        """Return how a recipe samples; what is given and not None takes the place of its values."""
        values: dict[str, Any] = {
            "steps": config.sampling.steps,
            "cfg_scale": config.sampling.cfg_scale,
            "shift": config.diffusion.shift,
            "solver": config.resolved_solver,
            "num_train_timesteps": config.diffusion.num_train_timesteps,
            "two_passes": config.routing.traits.mixes_samples,
        }
        return cls(**values | {name: value for name, value in given.items() if value is not None})

    def guides_at(self, timesteps: Tensor) -> list[bool]:
        """Return whether there is guidance at each timestep.  Sync: one, under an interval."""
        if self.cfg_interval is None:
            return [True] * len(timesteps)
        low, high = self.cfg_interval
        sigmas = (timesteps.double() / self.num_train_timesteps).tolist()
        return [low - _SAME_LEVEL <= sigma <= high + _SAME_LEVEL for sigma in sigmas]


def sigma_schedule(steps: int) -> np.ndarray:
    """Return the unshifted noise levels of `steps` steps, from 1 downwards; the final 0 is the
    scheduler's.
    """
    return np.linspace(1.0, 0.0, steps + 1)[:-1]


def shifted_sigmas(steps: int, shift: float) -> np.ndarray:
    """Return the noise levels of `steps` steps under a shift, applied once."""
    return shifted(sigma_schedule(steps), shift)


def initial_noise(shape: Sequence[int], *, seed: int, indices: Sequence[int]) -> Tensor:
    """Return fp32 noise (len(indices), *shape) in which image i is a function of (seed, i)
    alone.
    """
    draws = [
        random.standard_normal(tuple(shape), dtype=np.float32)
        for random in generators(seed, "sample", 0, indices)
    ]
    return torch.from_numpy(np.stack(draws))


def image_generators(*, seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator an image, for the noise that `ddpm` adds at every step; a function of
    (seed, i) alone.

    torch's generator of the CPU takes the low 32 bits of a seed: of 50,000 images a pair shares
    this noise one time in four, but never the noise that it starts from.
    """
    seeds = [int(random.integers(2**63)) for random in generators(seed, "sample", 1, indices)]
    return [torch.Generator().manual_seed(s) for s in seeds]


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    noise_BZHW: Tensor,
    condition: Condition,
    plan: SamplingPlan,
    generators: Sequence[torch.Generator] = (),
    *,
    negative: Condition | None = None,
    prepare: Callable[[Condition], Condition] | None = None,
) -> Tensor:
    """Integrate from noise to data.

    Source: official samplers of ProMoE (euler) and DiT (ddpm, ddim with eta 0, no clipping);
    differs: the flow's shift is applied once (by the scheduler), not twice. heun: Karras et al.
    (2022), Algorithm 1, on the same noise levels; it asks the network twice a step but for the
    last. unipc (Zhao et al., 2023, B(h) of second order) and dpmpp (DPM-Solver++ 2M, Lu et al.,
    2022) are diffusers' on the same noise levels; their first step starts just below 1, where log(1
    - sigma) ends.
    Args:
        denoiser: predicts velocity (flow) or noise (ddim) in its first Z channels; ddpm: 2 Z
        channels, noise and variance.
        noise_BZHW: fp32 start.
        condition: of each image.
        generators: one an image, see `image_generators`; only ddpm draws from them.
        negative, prepare: see `GuidedDenoiser`.
    Returns: latents (B, Z, H, W), fp32.
    Raises: ValueError for an unknown solver, or ddpm without a generator for each image.
    """
    if plan.solver not in (*_CHAINS, "heun"):
        raise ValueError(f"solver {plan.solver!r} is none of {', '.join(_CHAINS)}, heun")
    guided = GuidedDenoiser(
        denoiser,
        condition,
        scale=plan.cfg_scale,
        negative=negative,
        two_passes=plan.two_passes,
        prepare=prepare,
    )
    if plan.solver == "heun":
        return _sample_heun(guided, noise_BZHW, plan)
    draws = plan.solver == "ddpm"  # noise at every step, of a variance that is predicted, too
    if draws and len(generators) != len(noise_BZHW):
        raise ValueError(
            f"solver 'ddpm' needs a generator for each of the {len(noise_BZHW)} images, got"
            f" {len(generators)}"
        )
    options = {"generator": list(generators)} if draws else {}
    scheduler, timesteps = _CHAINS[plan.solver](plan, noise_BZHW.device)
    latents, channels = noise_BZHW, noise_BZHW.shape[1]
    for step, timestep, guide in zip(
        scheduler.timesteps, timesteps, plan.guides_at(timesteps), strict=True
    ):
        prediction = guided(latents, timestep.expand(len(latents)), channels=channels, guide=guide)
        predicted = prediction[:, : 2 * channels if draws else channels].float()
        latents = scheduler.step(predicted, step, latents, **options).prev_sample
    return latents


#: A scheduler, and the timesteps that the network gets at its steps.
_Chain = tuple[SchedulerMixin, Tensor]


def _euler(plan: SamplingPlan, device: torch.device) -> _Chain:
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=plan.num_train_timesteps, shift=plan.shift
    )
    scheduler.set_timesteps(sigmas=sigma_schedule(plan.steps).tolist(), device=device)
    return scheduler, scheduler.timesteps


def _sample_heun(guided: GuidedDenoiser, noise_BZHW: Tensor, plan: SamplingPlan) -> Tensor:
    """Integrate by Heun's method; the last step, to noise level 0, is Euler's.

    diffusers' own Heun scheduler ends one step above 0 and shifts twice, see `shifted_sigmas`.
    """
    channels = noise_BZHW.shape[1]

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        timestep = torch.tensor([sigma * plan.num_train_timesteps], dtype=torch.float32)
        prediction = guided(
            latents,
            timestep.to(latents.device).expand(len(latents)),
            channels=channels,
            guide=plan.guides_at(timestep)[0],
        )
        return prediction[:, :channels].float()

    latents, sigmas = noise_BZHW, [*shifted_sigmas(plan.steps, plan.shift).tolist(), 0.0]
    for here, there in pairwise(sigmas):
        first = velocity(latents, here)
        predicted = latents + (there - here) * first
        latents = (
            predicted
            if there == 0
            else latents + (there - here) * (first + velocity(predicted, there)) / 2
        )
    return latents


def _multistep(
    kind: type[UniPCMultistepScheduler] | type[DPMSolverMultistepScheduler],
    plan: SamplingPlan,
    device: torch.device,
) -> _Chain:
    """Return diffusers' solver on our noise levels: its own end early, and are rounded to whole
    timesteps for the network.
    """
    scheduler = kind(
        num_train_timesteps=plan.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(plan.steps, device=device)
    sigmas = shifted_sigmas(plan.steps, plan.shift)
    timesteps = torch.from_numpy(sigmas * plan.num_train_timesteps).float()
    sigmas[0] = min(sigmas[0], 1.0 - _BELOW_ONE)
    scheduler.sigmas = torch.from_numpy(np.concatenate([sigmas, [0.0]])).float()
    scheduler.set_begin_index(0)  # the steps are counted: rounded timesteps may occur twice
    return scheduler, timesteps.to(device)


def _respaced(
    kind: type[DDPMScheduler] | type[DDIMScheduler],
    plan: SamplingPlan,
    device: torch.device,
    **options: Any,
) -> _Chain:
    """Return a scheduler of the chain in `plan.steps` steps, and the network's timesteps, most
    noise first.

    Source: Nichol & Dhariwal (2021), Sec. 4; official DiT: the same. The scheduler walks every
    level of a shorter chain: skipping levels of the long one, diffusers' DDIM would take its
    previous level at a constant, rounded stride.
    """
    timesteps = respaced_timesteps(plan.num_train_timesteps, plan.steps)
    alpha_bar_J = linear_alpha_bar(plan.num_train_timesteps)[timesteps]
    scheduler = kind(
        num_train_timesteps=plan.steps,
        trained_betas=betas_of(alpha_bar_J),
        clip_sample=False,
        **options,
    )
    # From fp32 betas, 1 - alpha_bar of the last steps would keep four digits.
    scheduler.alphas_cumprod = torch.from_numpy(alpha_bar_J)
    scheduler.set_timesteps(plan.steps)
    return scheduler, torch.from_numpy(timesteps[::-1].copy()).float().to(device)


_CHAINS: dict[str, Callable[[SamplingPlan, torch.device], _Chain]] = {
    "euler": _euler,
    "unipc": partial(_multistep, UniPCMultistepScheduler),
    "dpmpp": partial(_multistep, DPMSolverMultistepScheduler),
    "ddpm": partial(_respaced, DDPMScheduler, variance_type="learned_range"),
    "ddim": partial(_respaced, DDIMScheduler),
}


def build_scheduler(
    config: RunConfig,
) -> FlowMatchEulerDiscreteScheduler | DDPMScheduler | DDIMScheduler:
    """Return the scheduler of a diffusers pipeline that is nearest to the recipe's solver; Euler's
    for every solver of a flow.
    """
    timesteps = config.diffusion.num_train_timesteps
    if config.diffusion.objective == "rectified_flow":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=timesteps, shift=config.diffusion.shift
        )
    scale = LINEAR_STEPS / timesteps
    options = {
        "num_train_timesteps": timesteps,
        "beta_start": scale * BETA_FIRST,
        "beta_end": scale * BETA_LAST,
        "clip_sample": False,
    }
    if config.resolved_solver == "ddpm":
        return DDPMScheduler(variance_type="learned_range", **options)
    return DDIMScheduler(**options)
