"""The sampler of a recipe as diffusers calls it."""

from __future__ import annotations

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from promoe_ds.config.schema import RunConfig


def build_scheduler(
    config: RunConfig,
) -> FlowMatchEulerDiscreteScheduler | DDPMScheduler | DDIMScheduler:
    """Return the scheduler nearest to the recipe's solver, Euler's for every solver of a
    flow.
    """
    timesteps = config.diffusion.num_train_timesteps
    if config.diffusion.objective == "rectified_flow":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=timesteps, shift=config.diffusion.shift
        )
    kind = DDPMScheduler if config.resolved_solver == "ddpm" else DDIMScheduler
    return kind(num_train_timesteps=timesteps, beta_schedule="linear", clip_sample=False)
