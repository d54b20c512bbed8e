"""promoe_ds: distributed training of ProMoE diffusion transformers.

`load_model(export_dir)` loads a single export; it needs neither deepspeed nor megatron nor transformer-engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promoe_ds.model.export import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Deferred: `import promoe_ds.config` must stay free of torch.
    if name == "load_model":
        from promoe_ds.model.export import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
