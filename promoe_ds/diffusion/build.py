"""From a config to its objective."""

from __future__ import annotations

from collections.abc import Callable

from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.diffusion.ddpm import Ddpm
from promoe_ds.diffusion.objective import Objective
from promoe_ds.diffusion.rectified_flow import RectifiedFlow

_OBJECTIVES: dict[str, Callable[[DiffusionConfig], Objective]] = {
    "rectified_flow": RectifiedFlow,
    "ddpm": Ddpm,
}


def build_objective(config: DiffusionConfig) -> Objective:
    """Build the objective that `config.objective` names."""
    return _OBJECTIVES[config.objective](config)
