"""Diffusion: noise levels, training objective, guidance and samplers. Takes callables, never imports the model."""

from promoe_ds.diffusion.guidance import guided
from promoe_ds.diffusion.objective import DiffusionBatch, velocity_loss
from promoe_ds.diffusion.sampler import sample_latents

__all__ = ["DiffusionBatch", "guided", "sample_latents", "velocity_loss"]
