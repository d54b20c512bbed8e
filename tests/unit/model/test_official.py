"""Names of the published checkpoints and ours: there and back, and mistakes named by their key."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.config import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.embeddings import sincos_positions
from promoe_ds.model.official import from_official, to_official

from ..builders import random_network, small_config

SETTINGS: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"routing": {"method": "dense"}},
    "qk_norm": {"model": {"qk_norm": True, "depth": 3}},
    "all blocks": {"routing": {"moe_blocks": "all"}},
    "no shared": {"routing": {"num_shared_experts": 0}},
    "no unconditional": {"routing": {"num_unconditional_experts": 0}},
    "eleven blocks": {"model": {"depth": 11}},
    "twelve experts": {"routing": {"num_experts": 12}},
}


def official(**sections: Any) -> tuple[dict[str, Tensor], RunConfig]:
    network = random_network(**sections)
    return to_official(network.state_dict(), network.config), network.config


@pytest.mark.parametrize("setting", SETTINGS)
def test_official_there_and_back_is_the_same(setting: str) -> None:
    network = random_network(**SETTINGS[setting])
    state = network.state_dict()
    back = from_official(to_official(state, network.config), network.config)
    assert back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


def test_official_names_of_a_moe_block_are_the_published_ones() -> None:
    names = {name for name in official(model={"qk_norm": True})[0] if name.startswith("blocks.1.")}
    linear = ("weight", "bias")
    expected = {f"blocks.1.{layer}.{kind}" for kind in linear for layer in
                ("attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "adaLN_modulation.1", "mlp.shared_expert.up_proj",
                 "mlp.shared_expert.down_proj")}
    expected |= {f"blocks.1.mlp.experts.{expert}.{layer}_proj.{kind}" for expert in range(5) for layer in ("up", "down")
                 for kind in linear}
    assert names == expected | {"blocks.1.mlp.cluster_centers"}


def test_official_names_outside_moe_blocks_are_the_published_ones() -> None:
    names = {name for name in official()[0] if not name.startswith("blocks.1.")}
    expected = {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in
                ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1",
                 "final_layer.linear", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.adaLN_modulation.1",
                 "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_official_last_expert_is_the_unconditional_one() -> None:
    network = random_network()
    state = to_official(network.state_dict(), network.config)
    moe = network.blocks[1].moe
    assert torch.equal(state["blocks.1.mlp.experts.4.up_proj.weight"], moe.unconditional.up.weight)
    assert torch.equal(state["blocks.1.mlp.experts.2.down_proj.bias"], moe.routed.down_bias[2])


def test_official_positions_come_first_with_a_batch_dimension() -> None:
    state, config = official()
    assert next(iter(state)) == "pos_embed"
    assert torch.equal(state["pos_embed"], sincos_positions(config.model.hidden_size, 2)[None])


def raises_saying(message: str) -> Any:
    return pytest.raises(CheckpointError, match=re.escape(message))


@pytest.mark.parametrize("key", ["foo.bar", "y_embedder.other.weight", "blocks.1.mlp.router.weight", "optimizer"])
def test_from_official_unknown_key_is_named(key: str) -> None:
    state, config = official()
    with raises_saying(f"{key}: no such parameter in this architecture"):
        from_official({**state, key: torch.zeros(1)}, config)


def test_to_official_unknown_key_is_named() -> None:
    with raises_saying("head.weight: no such parameter in this architecture"):
        to_official({"head.weight": torch.zeros(1)}, small_config())


def test_from_official_missing_expert_names_its_stack() -> None:
    state, config = official()
    del state["blocks.1.mlp.experts.2.up_proj.bias"]
    with raises_saying("blocks.1.moe.routed.up_bias: expected the experts 0 ... 3, found [0, 1, 3]"):
        from_official(state, config)


def test_from_official_expert_too_many_names_its_stack() -> None:
    state, config = official()
    state["blocks.1.mlp.experts.5.up_proj.bias"] = state["blocks.1.mlp.experts.0.up_proj.bias"]
    with raises_saying("blocks.1.moe.routed.up_bias: expected the experts 0 ... 3, found [0, 1, 2, 3, 5]"):
        from_official(state, config)


def test_from_official_unconditional_expert_without_place_is_named() -> None:
    state, _ = official()
    with raises_saying("expected the experts 0 ... 3, found [0, 1, 2, 3, 4]"):
        from_official(state, small_config(routing={"num_unconditional_experts": 0}))


@pytest.mark.parametrize("damage", [lambda p: p + 1e-3, lambda p: p[:, :3], lambda p: p[..., :8], lambda p: p.flip(1)],
                         ids=["values", "tokens", "width", "order"])
def test_from_official_other_positions_are_named(damage: Any) -> None:
    state, config = official()
    state["pos_embed"] = damage(state["pos_embed"])
    with raises_saying(f"pos_embed of shape {tuple(state['pos_embed'].shape)} is not the fixed table of this architecture"):
        from_official(state, config)


@pytest.mark.parametrize("ours", ["patch_embedding.proj.weight", "blocks.1.moe.router.prototypes",
                                  "blocks.1.moe.routed.up_bias", "blocks.1.moe.unconditional.down.weight"])
def test_from_official_missing_key_is_named(ours: str) -> None:
    # The docstring promises an error that names a missing key.
    network = random_network()
    state = network.state_dict()
    whole = to_official(state, network.config)
    damaged = to_official({name: value for name, value in state.items() if name != ours}, network.config)
    names = [ours, *(name for name in whole if name not in damaged)]
    with pytest.raises(CheckpointError, match="|".join(map(re.escape, names))):
        from_official(damaged, network.config)


def test_from_official_key_of_a_block_beyond_the_depth_is_named() -> None:
    state, config = official()
    with raises_saying("blocks.7.attention.qkv.bias has no place in this architecture"):
        from_official({**state, "blocks.7.attn.qkv.bias": torch.zeros(48)}, config)


def test_from_official_expert_of_another_shape_is_named() -> None:
    state, config = official()
    state["blocks.1.mlp.experts.2.up_proj.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.m.*up_(proj\.)?bias"):
        from_official(state, config)
