"""Which tensors a model has: names and shapes, known without memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from promoe_ds.config.schema import RunConfig
from promoe_ds.model.build import build_model, freeze

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
    """Return the names of the parameters that `train.freeze` keeps from training."""
    if not config.train.freeze:
        return []
    with torch.device("meta"):
        network = build_model(config)
    freeze(network, config.train.freeze)
    return [name for name, parameter in network.named_parameters() if not parameter.requires_grad]


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
