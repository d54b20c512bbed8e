"""Diffusion: noise levels, training objectives, guidance. Takes callables, never imports the model.

Samplers are in `sampler`, apart: training starts without diffusers.
"""

from collections.abc import Callable

from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.ddpm import Ddpm
from promoe_ds.diffusion.guidance import GuidedDenoiser, check_guided, check_interval, choose_scale
from promoe_ds.diffusion.objective import DiffusionBatch, Objective, draw_batch
from promoe_ds.diffusion.rectified_flow import RectifiedFlow

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

_OBJECTIVES: dict[str, Callable[[DiffusionConfig], Objective]] = {
    "rectified_flow": RectifiedFlow,
    "ddpm": Ddpm,
}


def build_objective(config: DiffusionConfig) -> Objective:
    """Build the objective that `config.objective` names."""
    return _OBJECTIVES[config.objective](config)
