"""Initial weights: a function of (seed, parameter name, global expert id) and of no layout."""

from __future__ import annotations

import math
import re
import zlib

import torch
from torch import Tensor

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.randomness import generator
from promoe_ds.routing import ROUTERS, Router

#: Of embeddings and prototypes.
EMBEDDING_STD = 0.02


@torch.no_grad()
def initialise(network: DiT, seed: int) -> None:
    """Fill every parameter and the position table.

    Source: DiT and the published code: Xavier-uniform matrices, zero biases, normal(0, 0.02)
    embeddings, timestep layers and prototypes, zero modulation and output layers, so that an
    untrained network returns exactly 0; gates as `Router.initial_gate` says.
    Differs: each expert's weights depend on its global id, so that any number of ranks starts
    alike.
    Args:
        network: on a real device.
        seed: of the stream `init`.
    """
    routing = network.config.routing
    for module_name, module in network.named_modules():
        if isinstance(module, Router):
            module.reset_state()
        first = module.first_expert if isinstance(module, StackedExperts) else 0
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            fill_parameter(parameter, full_name, seed, routing, first_expert=first)
    network.reset_positions()


@torch.no_grad()
def fill_parameter(
    parameter: Tensor, name: str, seed: int, routing: RoutingConfig, *, first_expert: int = 0
) -> None:
    """Fill one parameter with its initial value; a stack of routed experts with that of each.

    Args:
        name: dotted, in the whole network.
        routing: gives the start of a router's gate and of experts.
        first_expert: of the stack.
    """
    std = routing.expert_init_std
    if ".moe.routed." in name:
        _fill_stack(parameter, name, seed, first_expert=first_expert, std=std)
    elif std is not None and re.search(r"\.moe\.(shared|unconditional)\..*weight$", name):
        _normal(parameter, std, name, seed)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        parameter.fill_(1.0)
    elif name.endswith(".router.gate_weight"):
        _fill_gate(parameter, name, seed, ROUTERS[routing.method].initial_gate)
    elif "modulation" in name or name.startswith("final_layer.") or name.endswith("bias"):
        parameter.zero_()
    elif name.startswith(("timestep_embedding.", "label_embedding.", "text_embedding.")):
        _normal(parameter, EMBEDDING_STD, name, seed)
    elif name.endswith(".prototypes"):
        _normal(parameter, EMBEDDING_STD, name, seed)
    else:
        _xavier(parameter, name, seed)


def _fill_gate(parameter: Tensor, name: str, seed: int, start: str | float) -> None:
    if start == "xavier":
        _xavier(parameter, name, seed)
    elif start == "linear":
        _uniform(parameter, parameter.shape[1] ** -0.5, name, seed)
    else:
        _normal(parameter, float(start), name, seed)


def _fill_stack(
    parameter: Tensor, name: str, seed: int, *, first_expert: int, std: float | None
) -> None:
    for expert, value in enumerate(parameter.unbind(0), first_expert):
        if not name.endswith("weight"):
            value.zero_()
        elif std is None:
            _xavier(value, name, seed, expert)
        else:
            _normal(value, std, name, seed, expert)


def _xavier(weight: Tensor, name: str, seed: int, expert: int = 0) -> None:
    fan_out, fan_in = weight.shape[0], math.prod(weight.shape[1:])
    _uniform(weight, math.sqrt(6.0 / (fan_in + fan_out)), name, seed, expert)


def _uniform(weight: Tensor, bound: float, name: str, seed: int, expert: int = 0) -> None:
    draw = generator(seed, "init", zlib.crc32(name.encode()), expert).random(
        weight.numel(), dtype="float32"
    )
    weight.copy_(torch.from_numpy(draw * (2 * bound) - bound).view(weight.shape))


def _normal(weight: Tensor, std: float, name: str, seed: int, expert: int = 0) -> None:
    draw = generator(seed, "init", zlib.crc32(name.encode()), expert).standard_normal(
        weight.numel(), dtype="float32"
    )
    weight.copy_(torch.from_numpy(draw * std).view(weight.shape))
