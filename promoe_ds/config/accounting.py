"""Sizes known before anything is built: parameters and floating-point operations.

Both are functions of the config alone and need no torch; tests compare the counts with built models
and the operations with `torch.utils.flop_counter`.
"""

from dataclasses import dataclass

from promoe_ds.config.routing import RouterSize
from promoe_ds.config.schema import RunConfig

TIMESTEP_FREQUENCIES = 256
#: Matrices of a feed-forward by expert type.
_MATRICES = {"gelu": 2, "swiglu": 3}


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by kind. `total` and `activated` follow the published convention."""

    dense: int
    routed: int
    unconditional: int
    routed_per_expert: int
    top_k: int
    moe_layers: int
    position_embedding: int

    @property
    def trainable(self) -> int:
        """All that the optimizer moves."""
        return self.dense + self.routed + self.unconditional

    @property
    def total(self) -> int:
        """Trainable parameters and the fixed position embedding, as the paper counts (Table 2)."""
        return self.trainable + self.position_embedding

    @property
    def activated(self) -> int:
        """What one conditional token uses: everything but the experts it is not sent to."""
        unused = (
            self.routed - self.moe_layers * self.top_k * self.routed_per_expert + self.unconditional
        )
        return self.total - unused


def count_parameters(config: RunConfig) -> ParameterCount:
    """Count the parameters of the model that `config` describes."""
    model, routing = config.model, config.routing
    width, layers = model.hidden_size, len(config.moe_block_indices)
    expert = _feed_forward(width, config.expert_width, routing.expert_type)
    shared = _feed_forward(
        width, routing.num_shared_experts * config.shared_expert_width, config.shared_expert_type
    )
    unconditional = _feed_forward(
        width, routing.num_unconditional_experts * config.expert_width, routing.expert_type
    )
    dense = _outside_blocks(config) + model.depth * _block_without_feed_forward(config)
    dense += (model.depth - layers) * _feed_forward(width, config.dense_width, model.mlp_type)
    dense += layers * (_router_size(config).parameters + shared)
    return ParameterCount(
        dense=dense,
        routed=layers * routing.num_experts * expert,
        routed_per_expert=expert,
        top_k=routing.top_k,
        unconditional=layers * unconditional,
        moe_layers=layers,
        position_embedding=model.tokens_per_image * width,
    )


def forward_flops_per_image(config: RunConfig, text_tokens: int = 0) -> int:
    """Floating-point operations of one conditional image's forward pass (a multiply-add is two).

    Matrix products only: linear layers, attention, the experts a token activates, routing scores.

    Args:
        text_tokens: of the image's text; with none, what a log calls used is never more than was.
    """
    model, routing = config.model, config.routing
    width, depth, layers = model.hidden_size, model.depth, len(config.moe_block_indices)
    tokens, patch = model.tokens_per_image, model.patch_size**2
    routed = routing.top_k * config.expert_width * _MATRICES[routing.expert_type]
    shared = routing.num_shared_experts * config.shared_expert_width
    active = routed + shared * _MATRICES[config.shared_expert_type]
    router = _router_size(config)
    per_token = (
        (model.in_channels + model.out_channels) * patch * width
        + depth * model.attention_width * (4 * width + 2 * (tokens + text_tokens))
        + (depth - layers) * _MATRICES[model.mlp_type] * width * config.dense_width
        + layers * (width * active + router.per_token)
    )
    per_image = (
        TIMESTEP_FREQUENCIES * width + (3 + 6 * depth) * width * width + layers * router.per_image
    )
    if model.condition == "text":
        per_image += model.pooled_width * width
        per_image += 2 * depth * text_tokens * model.text_width * model.attention_width
    return 2 * (tokens * per_token + per_image)


def training_flops_per_image(config: RunConfig, text_tokens: int = 0) -> int:
    """Forward and backward pass: three times the forward one (Kaplan et al., 2020)."""
    return 3 * forward_flops_per_image(config, text_tokens)


def _feed_forward(width: int, hidden: int, expert_type: str) -> int:
    biases = hidden + width if expert_type == "gelu" and hidden else 0
    return _MATRICES[expert_type] * width * hidden + biases


def _router_size(config: RunConfig) -> RouterSize:
    return config.routing.traits.size(
        config.model.hidden_size, config.routing.num_experts, config.target_patch_values
    )


def _block_without_feed_forward(config: RunConfig) -> int:
    width, inner = config.model.hidden_size, config.model.attention_width
    head_width = config.model.head_width
    attention_and_modulation = 4 * width * inner + 3 * inner + 6 * width * width + 7 * width
    norm = head_width if config.model.block == "modern" else 2 * head_width  # no bias
    qk_norm = 2 * norm if config.model.qk_norm else 0
    is_text = config.model.condition == "text"
    text = 2 * inner * (config.model.text_width + 1) + norm if is_text else 0
    return attention_and_modulation + qk_norm + text


def _outside_blocks(config: RunConfig) -> int:
    model, width = config.model, config.model.hidden_size
    patch = model.patch_size**2
    patches = model.in_channels * patch * width + width
    timestep = TIMESTEP_FREQUENCIES * width + width + width * width + width
    rows = model.pooled_width + 1 if model.condition == "text" else model.label_rows
    condition = rows * width
    final = 2 * width * width + 2 * width + patch * model.out_channels * (width + 1)
    return patches + timestep + condition + final
