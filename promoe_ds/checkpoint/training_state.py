"""What a checkpoint reads from a trainer and writes into it."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol

from torch import nn

from promoe_ds.config import BatchPlan, DeepSpeedPlan, RunConfig
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.model.dit import DiT


class TrainingState(Protocol):
    """The trainer, as far as checkpoints know it."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    batches: BatchPlan
    context: DistributedContext
    #: DeepSpeed's engine.
    engine: Any
    #: The moving averages in the optimizer's state: `averages`, `averages_since`.
    ema: Any
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
