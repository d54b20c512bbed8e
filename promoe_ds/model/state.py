"""Which tensors a model has: names and shapes, known without memory."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch

import torch

from promoe_ds.config.schema import RunConfig
from promoe_ds.model.build import build_model

#: The fixed position table, where a checkpoint brings its own: the published code averages it.
POSITIONS = "positions"


def buffer_names(config: RunConfig) -> list[str]:
    """Return the names of what a model keeps besides its parameters: the running state of its
    routers.
    """
    with torch.device("meta"):
        network = build_model(config)
    parameters = dict(network.named_parameters())
    return [name for name in network.state_dict() if name not in parameters]


def frozen_names(config: RunConfig) -> list[str]:
    """Return the names of what `train.freeze` kept from training.

    A pattern may fit none: a branch can be of another condition than the run whose settings it has.
    """
    names = list(state_shapes(config)) if config.train.freeze else []
    return [name for name in names if any(fnmatch(name, each) for each in config.train.freeze)]


def state_shapes(config: RunConfig, *, own_positions: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all that a model keeps.

    Args:
        own_positions: whether the position table is among them.
    """
    with torch.device("meta"):
        network = build_model(config)
    state = network.state_dict() | ({POSITIONS: network.positions} if own_positions else {})
    return {name: tuple(value.shape) for name, value in state.items()}


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return a line for each tensor that is missing, left over or misshapen."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has no place in this architecture" for name in found if name not in expected
    ]
    return problems + [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
