"""promoe_ds: distributed training of ProMoE diffusion transformers."""

from __future__ import annotations

__version__ = "0.1.0"
