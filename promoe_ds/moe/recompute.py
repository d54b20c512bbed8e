"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

#: Calls a function on arguments and forgets what happened inside until the backward pass, which
# calls it again.
Recompute = Callable[..., Any]


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), keeping the arguments alone for the backward pass. Nothing random
    happens inside.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
