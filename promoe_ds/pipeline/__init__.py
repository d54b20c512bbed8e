"""The network and its sampler as diffusers knows them."""

from diffusers import ModelMixin

from promoe_ds.pipeline.pipeline import Pipeline, ProMoEPipeline
from promoe_ds.pipeline.transformer import ProMoETransformer2DModel

__all__ = ["ModelMixin", "Pipeline", "ProMoEPipeline", "ProMoETransformer2DModel"]
