"""Diffusion: noise levels, training objectives, guidance and samplers. Takes callables, never
imports the model.
"""

from promoe_ds.diffusion.build import build_objective
from promoe_ds.diffusion.guidance import GuidedDenoiser, check_guided, check_interval, choose_scale
from promoe_ds.diffusion.objective import DiffusionBatch, Objective, draw_batch
from promoe_ds.diffusion.sampler import SamplingPlan, sample_latents

__all__ = [
    "DiffusionBatch",
    "GuidedDenoiser",
    "Objective",
    "SamplingPlan",
    "build_objective",
    "check_guided",
    "check_interval",
    "choose_scale",
    "draw_batch",
    "sample_latents",
]
