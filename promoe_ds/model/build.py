"""From a config to the network: the one place where presets and routers become modules."""

from __future__ import annotations

from promoe_ds.config.schema import RunConfig
from promoe_ds.model.blocks import DiTBlock, SelfAttention
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import FEED_FORWARDS, FeedForward, StackedExperts
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import build_router


def build_model(config: RunConfig) -> DiT:
    """Build the whole network, all experts on this process, uninitialised.

    Use `torch.device("meta")` around it for models that do not fit; `backends.expert_parallel` then
    keeps this rank's experts.
    """
    blocks = [_build_block(config, index) for index in range(config.model.depth)]
    network = DiT(config, blocks)
    # What is compiled sees plain operations.
    kernels = "eager" if config.parallel.compile else config.parallel.kernels
    network.final_layer.kernels = kernels
    for block in network.blocks:
        block.kernels = kernels
        block.recompute = config.parallel.activation_checkpointing == "full"
        block.recompute_hidden = config.parallel.activation_checkpointing == "selective"
        if block.is_moe:
            block.moe.recompute_hidden = block.recompute_hidden
    return network


def _build_block(config: RunConfig, index: int) -> DiTBlock:
    model = config.model
    attention = SelfAttention(
        model.hidden_size,
        model.num_heads,
        qk_norm=model.qk_norm,
        text_width=model.text_width if model.condition == "text" else None,
    )
    feed_forward = (
        build_moe_layer(config, index)
        if config.is_moe_block(index)
        else FeedForward(model.hidden_size, int(model.mlp_ratio * model.hidden_size))
    )
    return DiTBlock(model.hidden_size, attention, feed_forward)


def build_moe_layer(config: RunConfig, block: int = 0) -> MoELayer:
    """Build a block's MoE layer: router, routed experts, shared and unconditional expert."""
    routing, width = config.routing, config.model.hidden_size
    shared = routing.num_shared_experts * config.shared_expert_width
    unconditional = routing.num_unconditional_experts * config.expert_width
    backend: str = config.expert_backend
    if backend == "grouped_mm":  # allowed by the widths; `auto` also depends on device and dtype
        backend = config.parallel.expert_backend
    return MoELayer(
        router=build_router(config, block),
        routed=StackedExperts(
            routing.num_experts,
            width,
            config.expert_width,
            expert_type=routing.expert_type,
            backend=backend,
            kernels=config.parallel.kernels,
        ),
        shared=FEED_FORWARDS[config.shared_expert_type](width, shared) if shared else None,
        unconditional=(
            FEED_FORWARDS[routing.expert_type](width, unconditional) if unconditional else None
        ),
        kernels=config.parallel.kernels,
    )
