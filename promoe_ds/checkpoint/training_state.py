"""What a checkpoint reads from a trainer and writes into it."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol

from torch import nn

from promoe_ds.config import BatchPlan, DeepSpeedPlan, RunConfig
from promoe_ds.distributed.context import Ranks
from promoe_ds.model.dit import DiT


class TrainingState(Protocol):
    """The trainer, as far as checkpoints know it."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    batches: BatchPlan
    context: Ranks
    #: DeepSpeed's engine.
    engine: Any
    #: The optimizer under ZeRO: `averages`, `averages_since`.
    optimizer: Any
    step: int
    samples_seen: int

    @property
    def dataset(self) -> Sized:
        """The data set."""

    @property
    def module(self) -> nn.Module:
        """The module inside the engine."""

    @property
    def network(self) -> DiT:
        """The network that is trained."""
