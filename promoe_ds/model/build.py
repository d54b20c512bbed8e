"""From a config to the network: the one place where presets and routers become modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError
from promoe_ds.model.blocks import DiTBlock, FinalLayer, Norm, RMSNorm, SelfAttention
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import FEED_FORWARDS, FeedForward, StackedExperts
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import build_router

#: The norm of each `model.block`.
_NORMS: dict[str, type[Norm]] = {"dit": nn.LayerNorm, "modern": RMSNorm}


def build_model(config: RunConfig) -> DiT:
    """Build the whole network, all experts on this process, uninitialised.

    Use `torch.device("meta")` around it for models that do not fit; `backends.expert_parallel` then
    keeps this rank's experts.
    """
    blocks = [_build_block(config, index) for index in range(config.model.depth)]
    network = DiT(config, blocks, _NORMS[config.model.block])
    _choose_kernels(network, config)
    for block in network.blocks:
        block.recompute = config.parallel.activation_checkpointing == "full"
        block.recompute_hidden = config.parallel.activation_checkpointing == "selective"
        if block.is_moe:
            block.moe.recompute_hidden = block.recompute_hidden
    return network


def freeze(network: DiT, patterns: Sequence[str]) -> None:
    """Let no parameter be trained whose name fits one of the patterns (`train.freeze`).

    Raises: ConfigError for a pattern that fits none, or if none is left to train.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise ConfigError(
                f"train.freeze={pattern}: no parameter has such a name; names begin with "
                + ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze={', '.join(patterns)}: leaves nothing to train")


def _choose_kernels(network: nn.Module, config: RunConfig) -> None:
    """Say which kernels compute what may be compiled instead: then it sees plain operations."""
    for module in network.modules():
        if isinstance(module, DiTBlock | FinalLayer | FeedForward | SelfAttention):
            module.kernels = "eager" if config.parallel.compile else config.parallel.kernels


def _build_block(config: RunConfig, index: int) -> DiTBlock:
    model, norm = config.model, _NORMS[config.model.block]
    attention = SelfAttention(
        model.hidden_size,
        model.num_heads,
        qk_norm=model.qk_norm,
        head_width=model.head_width,
        text_width=model.text_width if model.condition == "text" else None,
        norm=norm,
    )
    feed_forward = (
        build_moe_layer(config, index)
        if config.is_moe_block(index)
        else FEED_FORWARDS[model.mlp_type](model.hidden_size, config.dense_width)
    )
    return DiTBlock(model.hidden_size, attention, feed_forward, norm)


def build_moe_layer(config: RunConfig, block: int = 0) -> MoELayer:
    """Build a block's MoE layer: router, routed experts, shared and unconditional expert."""
    routing, width = config.routing, config.model.hidden_size
    shared = routing.num_shared_experts * config.shared_expert_width
    unconditional = routing.num_unconditional_experts * config.expert_width
    layer = MoELayer(
        router=build_router(config, block),
        routed=StackedExperts(
            routing.num_experts,
            width,
            config.expert_width,
            expert_type=routing.expert_type,
            backend=config.expert_backend,
            kernels=config.parallel.kernels,
        ),
        shared=FEED_FORWARDS[config.shared_expert_type](width, shared) if shared else None,
        unconditional=(
            FEED_FORWARDS[routing.expert_type](width, unconditional) if unconditional else None
        ),
        kernels=config.parallel.kernels,
    )
    _choose_kernels(layer, config)
    return layer
