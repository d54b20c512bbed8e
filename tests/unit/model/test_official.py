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

from ..builders import of_method, random_network, random_tensor, small_config

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


PUBLISHED = ("token_choice", "expert_choice", "dit_moe", "ec_dit", "diff_moe")
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"expert_type": "swiglu"},
    "shared swiglu": {"shared_expert_type": "swiglu", "num_shared_experts": 2},
    "swiglu, shared gelu": {"expert_type": "swiglu", "shared_expert_type": "gelu"},
    "no shared": {"num_shared_experts": 0},
    "as published": {"num_shared_experts": 0, "num_unconditional_experts": 0},
}


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.parametrize("method", PUBLISHED)
def test_official_of_every_published_method_there_and_back_is_the_same(
    method: str, experts: dict[str, Any]
) -> None:
    network = random_network(model={"depth": 4, "qk_norm": True}, **of_method(method, **experts))
    for name, buffer in network.named_buffers():
        buffer.copy_(random_tensor(*buffer.shape, seed=len(name)))
    state = network.state_dict()
    published = to_official(state, network.config)
    assert not any(".moe." in name for name in published)
    back = from_official(published, network.config)
    assert back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


def names_of_moe(method: str, **experts: Any) -> set[str]:
    """Return the published names of a MoE feed-forward, experts but the first and last apart."""
    names = official(**of_method(method, **experts))[0]
    inner = (
        name.removeprefix("blocks.1.mlp.") for name in names if name.startswith("blocks.1.mlp.")
    )
    return {
        name for name in inner if not name.startswith(("experts.1.", "experts.2.", "experts.3."))
    }


LINEAR = ("weight", "bias")
BASELINE = {
    f"experts.{expert}.{layer}.{kind}"
    for expert in (0, 4)
    for layer in ("fc1", "fc2")
    for kind in LINEAR
}
SWIGLU = {f"shared_experts.{layer}_proj.weight" for layer in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("method", "shared", "expected"),
    [
        ("dit_moe", "swiglu", {"gate.weight", *SWIGLU}),
        ("ec_dit", "swiglu", {"gate_weight", *SWIGLU}),
        (
            "diff_moe",
            "swiglu",
            {
                "gate_weight",
                "expert_threshold",
                "ema_decay",
                *SWIGLU,
                *(f"capacity_predictor.{layer}.{kind}" for layer in (0, 2) for kind in LINEAR),
            },
        ),
        (
            "diff_moe",
            "gelu",
            {
                "gate_weight",
                "expert_threshold",
                "ema_decay",
                *(f"shared_experts.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in LINEAR),
                *(f"capacity_predictor.{layer}.{kind}" for layer in (0, 2) for kind in LINEAR),
            },
        ),
    ],
)
def test_official_names_of_the_baselines_are_the_published_ones(
    method: str, shared: str, expected: set[str]
) -> None:
    assert names_of_moe(method, shared_expert_type=shared) == BASELINE | expected


def test_official_names_of_swiglu_experts() -> None:
    expected = {
        f"experts.{expert}.{layer}_proj.weight"
        for expert in (0, 4)
        for layer in ("gate", "up", "down")
    }
    assert names_of_moe("ec_dit", expert_type="swiglu", num_shared_experts=0) == expected | {
        "gate_weight"
    }
    assert names_of_moe("expert_choice", expert_type="swiglu", num_shared_experts=0) == expected | {
        "cluster_centers"
    }


@pytest.mark.parametrize("method", ["expert_race", "classification", "kmeans"])
def test_official_of_a_method_never_published_is_refused(method: str) -> None:
    network = random_network(**of_method(method))
    message = f"routing.method={method} was never published: it has no official layout"
    with raises_saying(message):
        to_official(network.state_dict(), network.config)
    with raises_saying(message):
        from_official({"x_embedder.proj.bias": torch.zeros(16)}, network.config)


def test_official_threshold_decay_is_written_and_held_against_the_config() -> None:
    state, config = official(**of_method("diff_moe", threshold_decay=0.9))
    assert state["blocks.1.mlp.ema_decay"].tolist() == pytest.approx([0.9])
    other = small_config(**of_method("diff_moe"))
    with raises_saying("blocks.1.mlp.ema_decay is 0.9, but routing.threshold_decay=0.95"):
        from_official(state, other)
    del state["blocks.1.mlp.ema_decay"]
    from_official(state, config)  # it is a hyperparameter: a state without it is whole


def test_from_official_of_another_method_names_what_has_no_place() -> None:
    state, _ = official(**of_method("ec_dit"))
    with raises_saying("blocks.1.mlp.gate_weight: no such parameter in this architecture"):
        from_official(state, small_config(**of_method("token_choice")))


def test_from_official_gelu_experts_have_no_gate() -> None:
    state, config = official()
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.mlp\.experts\.0\.gate_proj\.weight|routed\.gate_weight"
    ):
        from_official(
            {**state, "blocks.1.mlp.experts.0.gate_proj.weight": torch.zeros(32, 16)}, config
        )


def test_official_names_of_a_moe_block_are_the_published_ones() -> None:
    names = {name for name in official(model={"qk_norm": True})[0] if name.startswith("blocks.1.")}
    linear = ("weight", "bias")
    expected = {
        f"blocks.1.{layer}.{kind}"
        for kind in linear
        for layer in (
            "attn.qkv",
            "attn.proj",
            "attn.q_norm",
            "attn.k_norm",
            "adaLN_modulation.1",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert.down_proj",
        )
    }
    expected |= {
        f"blocks.1.mlp.experts.{expert}.{layer}_proj.{kind}"
        for expert in range(5)
        for layer in ("up", "down")
        for kind in linear
    }
    assert names == expected | {"blocks.1.mlp.cluster_centers"}


def test_official_names_outside_moe_blocks_are_the_published_ones() -> None:
    names = {name for name in official()[0] if not name.startswith("blocks.1.")}
    expected = {
        f"{layer}.{kind}"
        for kind in ("weight", "bias")
        for layer in (
            "x_embedder.proj",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "final_layer.adaLN_modulation.1",
            "final_layer.linear",
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
            "blocks.0.adaLN_modulation.1",
            "blocks.0.mlp.fc1",
            "blocks.0.mlp.fc2",
        )
    }
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


@pytest.mark.parametrize(
    "key", ["foo.bar", "y_embedder.other.weight", "blocks.1.mlp.router.weight", "optimizer"]
)
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
    with raises_saying(
        "blocks.1.moe.routed.up_bias: expected the experts 0 ... 3, found [0, 1, 3]"
    ):
        from_official(state, config)


def test_from_official_expert_too_many_names_its_stack() -> None:
    state, config = official()
    state["blocks.1.mlp.experts.5.up_proj.bias"] = state["blocks.1.mlp.experts.0.up_proj.bias"]
    with raises_saying(
        "blocks.1.moe.routed.up_bias: expected the experts 0 ... 3, found [0, 1, 2, 3, 5]"
    ):
        from_official(state, config)


def test_from_official_unconditional_expert_without_place_is_named() -> None:
    state, _ = official()
    with raises_saying("expected the experts 0 ... 3, found [0, 1, 2, 3, 4]"):
        from_official(state, small_config(routing={"num_unconditional_experts": 0}))


@pytest.mark.parametrize(
    "damage",
    [lambda p: p + 1e-3, lambda p: p[:, :3], lambda p: p[..., :8], lambda p: p.flip(1)],
    ids=["values", "tokens", "width", "order"],
)
def test_from_official_other_positions_are_named(damage: Any) -> None:
    state, config = official()
    state["pos_embed"] = damage(state["pos_embed"])
    with raises_saying(
        f"pos_embed of shape {tuple(state['pos_embed'].shape)} is not the fixed table of this"
        " architecture"
    ):
        from_official(state, config)


@pytest.mark.parametrize(
    "ours",
    [
        "patch_embedding.proj.weight",
        "blocks.1.moe.router.prototypes",
        "blocks.1.moe.routed.up_bias",
        "blocks.1.moe.unconditional.down.weight",
    ],
)
def test_from_official_missing_key_is_named(ours: str) -> None:
    # The docstring promises an error that names a missing key.
    network = random_network()
    state = network.state_dict()
    whole = to_official(state, network.config)
    damaged = to_official(
        {name: value for name, value in state.items() if name != ours}, network.config
    )
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
