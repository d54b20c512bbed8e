"""promoe_ds: distributed training of ProMoE diffusion transformers.

What is public is in `__all__` and described in docs/reference/python.md. `load_model` and
`Pipeline` need no deepspeed, megatron or transformer-engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promoe_ds import reports
    from promoe_ds.api import read_routing, train
    from promoe_ds.model.export import load_model
    from promoe_ds.pipeline import Pipeline, ProMoEPipeline, ProMoETransformer2DModel

__version__ = "0.2.0"
__all__ = [
    "Pipeline",
    "ProMoEPipeline",
    "ProMoETransformer2DModel",
    "__version__",
    "load_model",
    "read_routing",
    "reports",
    "train",
]

#: Where a name comes from when it is asked for: `import promoe_ds.config` stays free of torch.
_HOMES = {
    "Pipeline": "promoe_ds.pipeline",
    "ProMoEPipeline": "promoe_ds.pipeline",
    "ProMoETransformer2DModel": "promoe_ds.pipeline",
    # diffusers looks up the base class that says how to load a pipeline's parts beside them.
    "ModelMixin": "promoe_ds.pipeline",
    "load_model": "promoe_ds.model.export",
    "read_routing": "promoe_ds.api",
    "train": "promoe_ds.api",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "reports":
        return importlib.import_module("promoe_ds.reports")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
