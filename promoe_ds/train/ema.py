"""Looking at the averaged weights in the middle of training: they change places with the trained
ones, and back, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from promoe_ds.backends.deepspeed_private import ZeroPartitions
from promoe_ds.config.optimizer import EMA
from promoe_ds.model import DiT
from promoe_ds.train.trainer import Trainer


@contextmanager
def averaged_network(trainer: Trainer) -> Iterator[DiT]:
    """Yield the network in evaluation mode with the first average of the weights; all ranks call
    this together.

    Every rank swaps the values that it owns, in place; one tensor's worth of memory is needed
    beside them. Before the first update there is no average, and the weights are what it would
    start from.
    Collectives: ZeRO's gathering of the weights, twice.
    """
    network = trainer.network
    _swap(trainer)
    network.eval()
    try:
        yield network
    finally:
        network.train()
        _swap(trainer)


@torch.no_grad()
def _swap(trainer: Trainer) -> None:
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            average = optimizer.state.get(parameter, {}).get(EMA)
            if average is not None:
                weights = parameter.clone()
                parameter.copy_(average)
                average.copy_(weights)
    if trainer.deepspeed_plan.zero_stage > 0:
        ZeroPartitions(trainer.engine.optimizer).write_back()
