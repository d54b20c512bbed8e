"""The network: one rank-blind diffusion transformer for every method."""

from promoe_ds.model.build import build_model, freeze
from promoe_ds.model.dit import DenoiserOutput, DiT
from promoe_ds.model.init import initialise

__all__ = ["DenoiserOutput", "DiT", "build_model", "freeze", "initialise"]
