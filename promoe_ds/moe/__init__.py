"""The mixture-of-experts layer: experts, movement of tokens, the layer that joins them."""

from promoe_ds.moe.dispatch import (
    DISPATCHERS,
    AllToAllDispatcher,
    Dispatcher,
    ExpertPath,
    LocalDispatcher,
)
from promoe_ds.moe.experts import FeedForward, StackedExperts
from promoe_ds.moe.layer import MoELayer

__all__ = [
    "DISPATCHERS",
    "AllToAllDispatcher",
    "Dispatcher",
    "ExpertPath",
    "FeedForward",
    "LocalDispatcher",
    "MoELayer",
    "StackedExperts",
]
