"""MoE layers of other libraries as contenders: found by asking the config and the engine for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.errors import PromoeError
from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.moe.layer import MoELayer

#: `parallel.dispatch` of the layers that other libraries bring.
LIBRARIES = ("deepspeed_moe", "megatron")


@contextmanager
def single_process(timeout_seconds: float = 300.0) -> Iterator[torch.device]:
    """Be a process group of one, as the engines want it; gives the device. May be entered again after it was left."""
    from promoe_ds.backends.deepspeed_private import forget_expert_groups
    from promoe_ds.backends.process_group import start_distributed
    from promoe_ds.distributed.process_group import complete_environment, stop_distributed

    before = dict(os.environ)
    complete_environment()
    ranks = start_distributed(timeout_seconds)
    try:
        yield ranks.device
    finally:
        stop_distributed()
        forget_expert_groups()
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
    """Return a config whose rows are moved by `dispatch`, between all processes of this group.

    Raises: ConfigError if this version knows no such dispatcher, or the recipe does not fit it.
    """
    values = config.model_dump(mode="json")
    values["parallel"] |= {"dispatch": dispatch, "expert_backend": "auto", "ep_size": dist.get_world_size()}
    return config_from_dict(values, source=f"contender {dispatch}")


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """Return a config that computes in `precision`.

    Raises: ConfigError if the recipe does not fit FP8.
    """
    if precision != "fp8":
        return config
    values = config.model_dump(mode="json")
    values["precision"] |= {"compute": "fp8"}
    return config_from_dict(values, source=f"{config.name} in fp8")


def fp8_layer(config: RunConfig, device: torch.device, dtype: torch.dtype) -> tuple[MoELayer, Callable[[], AbstractContextManager]]:
    """Build one MoE layer of Transformer Engine's, all experts here, and what makes the context of its forward pass.

    Raises: ConfigError naming what the recipe, the device or the installation lacks.
    """
    from promoe_ds.backends.te_layers import use_transformer_engine

    network = _two_blocks(with_precision(config, "fp8")).to_empty(device=device)
    initialise(network, 0)
    context = use_transformer_engine(network.to(dtype), network.config, device)
    return network.moe_layers()[network.config.moe_block_indices[0]].train(), context


def layer_of(config: RunConfig, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """Build one MoE layer whose experts the engine places: a block of a network of two, on the groups of this process."""
    from promoe_ds.backends.deepspeed_private import make_expert_groups
    from promoe_ds.backends.expert_parallel import mark_experts, shard_experts

    network = _two_blocks(config)
    config = network.config
    group = make_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds)
    shard_experts(network, group, device)
    network.to_empty(device=device)
    initialise(network, 0)
    mark_experts(network.to(dtype))
    return network.moe_layers()[config.moe_block_indices[0]].train()


def _two_blocks(config: RunConfig) -> DiT:
    """Build a network of two blocks, one of which has experts, on the meta device."""
    values = config.model_dump(mode="json")
    values["model"] |= {"preset": None, "depth": 2}
    with torch.device("meta"):
        return build_model(config_from_dict(values, source="contender"))
