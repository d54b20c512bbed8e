"""Diffusion: noise levels, training objectives, guidance. Takes callables, never imports the model.

Samplers are in `sampler`, apart: training starts without diffusers.
"""

from promoe_ds.diffusion.build import build_objective
from promoe_ds.diffusion.guidance import GuidedDenoiser, check_guided, check_interval, choose_scale
from promoe_ds.diffusion.objective import DiffusionBatch, Objective, draw_batch

__all__ = [
    "DiffusionBatch",
    "GuidedDenoiser",
    "Objective",
    "build_objective",
    "check_guided",
    "check_interval",
    "choose_scale",
    "draw_batch",
]
