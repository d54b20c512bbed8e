"""Names of the published implementation's checkpoints and ours, both ways.

Published layout of a MoE feed-forward: the router's parameters, `experts.0 ... experts.E-1` routed,
`experts.E` unconditional (where there is one), `shared_expert` (ProMoE) or `shared_experts`
(baselines). ProMoE's experts are `up_proj`, `down_proj`, the baselines' `fc1`, `fc2`; SwiGLU ones
`gate_proj`, `up_proj`, `down_proj`. Ours stacks the routed experts. Methods that were never
published (Expert Race, the two of Sec. 4.2) have no such layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.embeddings import fixed_positions
from promoe_ds.model.state import POSITIONS as OUR_POSITIONS

_RENAMES = (
    ("x_embedder.proj.", "patch_embedding.proj."),
    ("t_embedder.mlp.0.", "timestep_embedding.up."),
    ("t_embedder.mlp.2.", "timestep_embedding.down."),
    ("y_embedder.embedding_table.", "label_embedding.table."),
    ("final_layer.adaLN_modulation.1.", "final_layer.modulation."),
    ("final_layer.linear.", "final_layer.linear."),
    (".adaLN_modulation.1.", ".modulation."),
    (".attn.", ".attention."),
    (".mlp.fc1.", ".feed_forward.up."),
    (".mlp.fc2.", ".feed_forward.down."),
)
_PROMOE = (
    (".mlp.cluster_centers", ".moe.router.prototypes"),
    (".mlp.shared_expert.gate_proj.", ".moe.shared.gate."),
    (".mlp.shared_expert.up_proj.", ".moe.shared.up."),
    (".mlp.shared_expert.down_proj.", ".moe.shared.down."),
)
_BASELINE = tuple(
    (published.replace("shared_expert.", "shared_experts."), ours)
    for published, ours in _PROMOE[1:]
)
_GATE = ((".mlp.gate_weight", ".moe.router.gate_weight"),)
#: What each method's layers add to _RENAMES.
_METHOD_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "dense": (),
    "token_choice": _PROMOE,
    "expert_choice": _PROMOE,
    "dit_moe": ((".mlp.gate.weight", ".moe.router.gate_weight"), *_BASELINE),
    "ec_dit": (*_GATE, *_BASELINE),
    "diff_moe": (
        *_GATE,
        (".mlp.expert_threshold", ".moe.router.thresholds"),
        (".mlp.capacity_predictor.0.", ".moe.router.predictor.up."),
        (".mlp.capacity_predictor.2.", ".moe.router.predictor.down."),
    ),
}
#: DiffMoE's shared experts are plain feed-forwards as published; gated ones are named as the other
# baselines'.
_DIFF_MOE_SHARED = {
    "gelu": (
        (".mlp.shared_experts.fc1.", ".moe.shared.up."),
        (".mlp.shared_experts.fc2.", ".moe.shared.down."),
    ),
    "swiglu": _BASELINE,
}
_PROMOE_METHODS = ("token_choice", "expert_choice")
_EXPERT = re.compile(
    r"^(?P<block>.*)\.mlp\.experts\.(?P<expert>\d+)\.(?P<layer>\w+)\.(?P<kind>weight|bias)$"
)
_OUR_EXPERTS = re.compile(r"^(.*)\.moe\.(routed|unconditional)\.(\w+)[._](weight|bias)$")
POSITIONS = "pos_embed"
#: Parts of published names, in the order in which the modules register what they hold: those of
#: the network, a block, a feed-forward, attention and an expert, the last layer, a linear map.
_REGISTRATION_ORDER = (
    "pos_embed x_embedder t_embedder y_embedder blocks"
    " attn mlp"
    " cluster_centers gate_weight expert_threshold ema_decay"
    " experts gate capacity_predictor shared_expert shared_experts"
    " qkv q_norm k_norm gate_proj up_proj down_proj fc1 fc2 proj"
    " final_layer linear adaLN_modulation"
    " weight bias"
)
_PLACES = {part: place for place, part in enumerate(_REGISTRATION_ORDER.split())}
#: DiffMoE keeps a hyperparameter, `routing.threshold_decay`, among its buffers.
_DECAY = ".mlp.ema_decay"


def rename_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Translate published names, whole or a part (e.g. one layer), into ours; experts are stacked.

    `pos_embed` is checked against the computed table, and kept as `positions` only where it
    differs: the published loop averages it, too.
    Raises: CheckpointError naming a key that has no place here, or a table that is another one.
    """
    result: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    layers = {published: ours for ours, published in _expert_layers(config).items()}
    for key, value in state.items():
        match = _EXPERT.match(key)
        if key == POSITIONS:
            own = _own_positions(value, config)
            result |= {} if own is None else {OUR_POSITIONS: own}
        elif key.endswith(_DECAY):
            _check_decay(key, value, config)
        elif match is None:
            result[_renamed(key, config)] = value
        elif (
            int(match["expert"]) == config.routing.num_experts
            and config.routing.num_unconditional_experts
        ):
            result[
                f"{match['block']}.moe.unconditional.{layers[match['layer']]}.{match['kind']}"
            ] = value
        else:
            name = f"{match['block']}.moe.routed.{layers[match['layer']]}_{match['kind']}"
            stacks.setdefault(name, {})[int(match["expert"])] = value
    for name, experts in stacks.items():
        result[name] = torch.stack([experts[i] for i in range(config.routing.num_experts)])
    return result


def to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Translate our state dict into the published names, with the position table, computed or its
    own.

    The inverse of `rename_official`.
    """
    if config.routing.num_unconditional_experts > 1:
        raise CheckpointError(
            f"routing.num_unconditional_experts={config.routing.num_unconditional_experts}: the"
            " official layout has room for one"
        )
    model, layers = config.model, _expert_layers(config)
    result = {POSITIONS: fixed_positions(model)[None]}
    for name, value in state.items():
        match = _OUR_EXPERTS.match(name)
        if name == OUR_POSITIONS:
            result[POSITIONS] = value[None]
        elif match is not None:
            block, part, layer, kind = match.groups()
            first = 0 if part == "routed" else config.routing.num_experts
            for expert, weight in enumerate((value,) if first else value.unbind(0), first):
                result[f"{block}.mlp.experts.{expert}.{layers[layer]}.{kind}"] = weight
        else:
            result[_renamed(name, config, reverse=True)] = value
            if name.endswith(".moe.router.thresholds"):
                result[name.replace(".moe.router.thresholds", _DECAY)] = torch.tensor(
                    [config.routing.threshold_decay]
                )
    return result


def published_shapes(
    name: str, shape: tuple[int, ...], config: RunConfig
) -> dict[str, tuple[int, ...]]:
    """Return the published keys that hold one tensor of ours, and their shapes.

    One key, an expert each for a stack, or two: DiffMoE's decay.
    """
    with torch.device("meta"):
        pieces = to_official({name: torch.empty(shape)}, config)
    return {
        key: tuple(value.shape)
        for key, value in pieces.items()
        if key != POSITIONS or name == OUR_POSITIONS
    }


def published_order(key: str) -> tuple[int, ...]:
    """Return what sorts published keys as the published modules register them, by which its
    optimizer numbers them.
    """
    return tuple(int(part) if part.isdigit() else _PLACES.get(part, 0) for part in key.split("."))


def is_published_parameter(key: str) -> bool:
    """Whether a published key is a parameter, which the optimizer numbers, and no buffer."""
    return not key.endswith((_DECAY, ".mlp.expert_threshold"))


def _expert_layers(config: RunConfig) -> dict[str, str]:
    """Our layers of an expert and their published names."""
    if config.routing.expert_type == "swiglu" or config.routing.method in _PROMOE_METHODS:
        return {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {"up": "fc1", "down": "fc2"}


def _renamed(key: str, config: RunConfig, *, reverse: bool = False) -> str:
    method = config.routing.method
    for field, value, known in (
        ("model.condition", config.model.condition, ("class",)),
        ("model.block", config.model.block, ("dit",)),
        ("routing.method", method, tuple(_METHOD_RENAMES)),
    ):
        if value not in known:
            raise CheckpointError(f"{field}={value} was never published: it has no official layout")
    shared = _DIFF_MOE_SHARED[config.shared_expert_type] if method == "diff_moe" else ()
    for published, ours in (*_METHOD_RENAMES[method], *shared, *_RENAMES):
        old, new = (ours, published) if reverse else (published, ours)
        if old in key and (key.startswith(old) or old.startswith(".")):
            return key.replace(old, new)
    raise CheckpointError(f"{key}: no such parameter in this architecture")


def _check_decay(key: str, value: Tensor, config: RunConfig) -> None:
    if not torch.allclose(value, torch.tensor(config.routing.threshold_decay, dtype=value.dtype)):
        raise CheckpointError(
            f"{key} is {value.item():g}, but"
            f" routing.threshold_decay={config.routing.threshold_decay}"
        )


def _own_positions(value: Tensor, config: RunConfig) -> Tensor | None:
    """Return a published position table (S, D) in fp32, None if it is the computed one.

    Averaging shrinks a constant in fp32 (decay 0.9999: to 0.99983 of it), half precision rounds it:
    a table within one percent is the same table.
    """
    model = config.model
    ours = fixed_positions(model)
    if value.shape != (1, *ours.shape) or not torch.allclose(
        value[0].float(), ours, rtol=1e-2, atol=1e-5
    ):
        raise CheckpointError(
            f"pos_embed of shape {tuple(value.shape)} is not the fixed table of this architecture"
        )
    return None if torch.equal(value[0].float(), ours) else value[0].float()
