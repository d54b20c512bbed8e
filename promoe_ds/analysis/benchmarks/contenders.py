"""MoE layers of other libraries as contenders: found by asking the config and the engine for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.errors import PromoeError
from promoe_ds.model import build_model, initialise
from promoe_ds.moe.layer import MoELayer

#: `parallel.dispatch` of the layers that other libraries bring.
LIBRARIES = ("deepspeed_capacity", "megatron")


@contextmanager
def single_process(timeout_seconds: float = 300.0) -> Iterator[torch.device]:
    """Be a process group of one, as the engines want it; gives the device."""
    from promoe_ds.engine.distributed import complete_environment, start_distributed, stop_distributed

    before = dict(os.environ)
    complete_environment()
    ranks = start_distributed(timeout_seconds)
    try:
        yield ranks.device
    finally:
        stop_distributed()
        os.environ.clear()
        os.environ.update(before)


def library_layers(config: RunConfig, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, MoELayer], dict[str, str]]:
    """Build the layers of the libraries at hand; return them, and the reason for each one that is missing."""
    layers: dict[str, MoELayer] = {}
    missing: dict[str, str] = {}
    for dispatch in LIBRARIES:
        try:
            layers[dispatch] = layer_of(with_dispatch(config, dispatch), device, dtype)
        except (PromoeError, ImportError) as error:
            missing[dispatch] = str(error)
    return layers, missing


def with_dispatch(config: RunConfig, dispatch: str) -> RunConfig:
    """Return a config whose rows are moved by `dispatch`.

    Raises: ConfigError if this version knows no such dispatcher, or the recipe does not fit it.
    """
    values = config.model_dump(mode="json")
    values["parallel"] |= {"dispatch": dispatch, "expert_backend": "auto"}
    return config_from_dict(values, source=f"contender {dispatch}")


def layer_of(config: RunConfig, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """Build one MoE layer whose experts the engine places: a block of a network of two, on the groups of this process."""
    from promoe_ds.engine.adapter import create_expert_groups, mark_experts, shard_experts

    values = config.model_dump(mode="json")
    values["model"] |= {"preset": None, "depth": 2}
    config = config_from_dict(values, source="contender")
    with torch.device("meta"):
        network = build_model(config)
    group = create_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds)
    shard_experts(network, group, device)
    network.to_empty(device=device)
    initialise(network, 0)
    mark_experts(network.to(dtype))
    return network.moe_layers()[config.moe_block_indices[0]].train()
