"""promoe_ds: distributed training of ProMoE diffusion transformers.

`load_model(export_dir)` loads a single export, `ProMoEPipeline.from_pretrained(folder)` a diffusers
pipeline; neither needs deepspeed, megatron or transformer-engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promoe_ds.model.export import load_model
    from promoe_ds.pipeline import ProMoEPipeline, ProMoETransformer2DModel

__version__ = "0.2.0"
__all__ = ["ProMoEPipeline", "ProMoETransformer2DModel", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Deferred: `import promoe_ds.config` must stay free of torch.
    if name == "load_model":
        from promoe_ds.model.export import load_model

        return load_model
    # diffusers looks up a pipeline's parts, and the base class that says how to load them, in their
    # package.
    if name in ("ProMoEPipeline", "ProMoETransformer2DModel", "ModelMixin"):
        import promoe_ds.pipeline

        return getattr(promoe_ds.pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
