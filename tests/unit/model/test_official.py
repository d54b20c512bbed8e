"""Names of the published checkpoints and ours: there and back, and mistakes named by their key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.config import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.embeddings import sincos_positions
from promoe_ds.model.official import rename_official, to_official

from ..builders import MODERN, NO_NULL, of_method, random_network, random_tensor, small_config

SETTINGS: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"routing": {"method": "dense"}},
    "qk_norm": {"model": {"qk_norm": True, "depth": 3}},
    "all blocks": {"routing": {"moe_blocks": "all"}},
    "no shared": {"routing": {"num_shared_experts": 0}},
    "no unconditional": {"routing": {"num_unconditional_experts": 0}},
    "no null label": NO_NULL,
    "eleven blocks": {"model": {"depth": 11}},
    "twelve experts": {"routing": {"num_experts": 12}},
}


def official(**sections: Any) -> tuple[dict[str, Tensor], RunConfig]:
    network = random_network(**sections)
    return to_official(network.state_dict(), network.config), network.config


PUBLISHED = ("token_choice", "expert_choice", "dit_moe", "ec_dit", "diff_moe")
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"expert_type": "swiglu"},
    "shared swiglu": {"shared_expert_type": "swiglu", "num_shared_experts": 2},
    "swiglu, shared gelu": {"expert_type": "swiglu", "shared_expert_type": "gelu"},
    "no shared": {"num_shared_experts": 0},
    "as published": {"num_shared_experts": 0, "num_unconditional_experts": 0},
}


WHOLE: dict[str, dict[str, Any]] = {
    **SETTINGS,
    **{
        f"{method}, {name}": {
            "model": {"depth": 4, "qk_norm": True},
            **of_method(method, **experts),
        }
        for method in PUBLISHED
        for name, experts in EXPERTS.items()
    },
}


@pytest.mark.parametrize("setting", WHOLE)
def test_official_there_and_back_is_the_same(setting: str) -> None:
    network = random_network(**WHOLE[setting])
    for name, buffer in network.named_buffers():
        if name != "positions":
            buffer.copy_(random_tensor(*buffer.shape, seed=len(name)))
    state = network.state_dict()
    published = to_official(state, network.config)
    assert not any(".moe." in name for name in published)
    back = rename_official(published, network.config)
    assert back.keys() == state.keys()
    assert [name for name in state if not torch.equal(back[name], state[name])] == []


def linear(*layers: str) -> set[str]:
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def gated(*experts: str) -> set[str]:
    return {
        f"{expert}.{layer}_proj.weight" for expert in experts for layer in ("gate", "up", "down")
    }


#: Of a MoE feed-forward, of its routed experts the first alone.
PROMOE = linear("experts.0.up_proj", "experts.0.down_proj", "experts.4.up_proj")
PROMOE |= linear("experts.4.down_proj", "shared_expert.up_proj", "shared_expert.down_proj")
BASELINE = linear("experts.0.fc1", "experts.0.fc2", "experts.4.fc1", "experts.4.fc2")
DIFF_MOE = {"gate_weight", "expert_threshold", "ema_decay"}
DIFF_MOE |= linear("capacity_predictor.0", "capacity_predictor.2")
SHARED_SWIGLU = {"shared_expert_type": "swiglu"}
SWIGLU = {"expert_type": "swiglu", "num_shared_experts": 0}


@pytest.mark.parametrize(
    ("method", "experts", "expected"),
    [
        ("token_choice", {}, PROMOE | {"cluster_centers"}),
        ("dit_moe", SHARED_SWIGLU, BASELINE | gated("shared_experts") | {"gate.weight"}),
        ("ec_dit", SHARED_SWIGLU, BASELINE | gated("shared_experts") | {"gate_weight"}),
        ("diff_moe", SHARED_SWIGLU, BASELINE | gated("shared_experts") | DIFF_MOE),
        ("diff_moe", {}, BASELINE | linear("shared_experts.fc1", "shared_experts.fc2") | DIFF_MOE),
        ("ec_dit", SWIGLU, gated("experts.0", "experts.4") | {"gate_weight"}),
        ("expert_choice", SWIGLU, gated("experts.0", "experts.4") | {"cluster_centers"}),
    ],
)
def test_official_names_are_the_published_ones(
    method: str, experts: dict[str, Any], expected: set[str]
) -> None:
    state, _ = official(model={"qk_norm": True}, **of_method(method, **experts))
    inner = {name for name in state if name.startswith("blocks.1.mlp.")}
    names = {name.removeprefix("blocks.1.mlp.") for name in inner}
    assert {name for name in names if not re.match(r"experts\.[123]", name)} == expected
    block = ("attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "adaLN_modulation.1")
    outside = linear("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2")
    outside |= linear("final_layer.adaLN_modulation.1", "final_layer.linear")
    outside |= linear(*(f"blocks.{index}.{layer}" for index in (0, 1) for layer in block))
    outside |= linear("blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    assert state.keys() - inner == outside | {"pos_embed", "y_embedder.embedding_table.weight"}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        (MODERN, "model.block=modern"),
        *(
            (of_method(method), f"routing.method={method}")
            for method in ("expert_race", "classification", "kmeans", "hash")
        ),
    ],
)
def test_official_of_what_was_never_published_is_refused(
    sections: dict[str, Any], field: str
) -> None:
    network = random_network(**sections)
    message = f"{field} was never published: it has no official layout"
    with raises_saying(message):
        to_official(network.state_dict(), network.config)
    with raises_saying(message):
        rename_official({"x_embedder.proj.bias": torch.zeros(16)}, network.config)


def test_official_threshold_decay_is_written_and_held_against_the_config() -> None:
    state, _ = official(**of_method("diff_moe", threshold_decay=0.9))
    assert state["blocks.1.mlp.ema_decay"].tolist() == pytest.approx([0.9])
    other = small_config(**of_method("diff_moe"))
    with raises_saying("blocks.1.mlp.ema_decay is 0.9, but routing.threshold_decay=0.95"):
        rename_official(state, other)


def raises_saying(message: str) -> Any:
    return pytest.raises(CheckpointError, match=re.escape(message))


EXPERT_BIAS = "blocks.1.mlp.experts.2.up_proj.bias"
TABLE = sincos_positions(16, (2, 2))[None]


@pytest.mark.parametrize(
    ("changed", "routing", "named"),
    [
        *(
            ({key: torch.zeros(1)}, {}, f"{key} has no place in this architecture")
            for key in (
                "foo.bar",
                "y_embedder.other.weight",
                "blocks.1.mlp.router.weight",
                "blocks.7.attn.qkv.bias",
                "blocks.1.mlp.experts.0.gate_proj.weight",
                "blocks.1.mlp.experts.5.up_proj.bias",
            )
        ),
        *(
            ({key: None}, {}, f"{key} is missing")
            for key in (
                "x_embedder.proj.weight",
                "blocks.1.mlp.cluster_centers",
                "blocks.1.mlp.experts.4.down_proj.weight",
                EXPERT_BIAS,
            )
        ),
        ({"pos_embed": TABLE + 1e-3}, {}, "pos_embed of shape (1, 4, 16)"),
        ({"pos_embed": TABLE[:, :3]}, {}, "pos_embed of shape (1, 3, 16)"),
        ({"pos_embed": TABLE[..., :8]}, {}, "pos_embed of shape (1, 4, 8)"),
        ({"pos_embed": TABLE.flip(1)}, {}, "pos_embed of shape (1, 4, 16)"),
        ({}, {"num_unconditional_experts": 0}, "mlp.experts.4.up_proj.weight has no place"),
        ({EXPERT_BIAS: torch.zeros(1)}, {}, f"{EXPERT_BIAS} has shape (1,) instead of (32,)"),
        ({}, {"method": "ec_dit"}, "blocks.1.mlp.gate_weight is missing"),
    ],
)
def test_published_state_that_does_not_fit_is_named(
    tmp_path: Path, changed: dict[str, Tensor | None], routing: dict[str, Any], named: str
) -> None:
    state, _ = official()
    state = {name: value for name, value in (state | changed).items() if value is not None}
    torch.save(state, tmp_path / "file.pth")
    with raises_saying(named):
        open_source(tmp_path / "file.pth", small_config(routing=routing))


def test_to_official_places_what_it_knows_and_names_what_it_does_not() -> None:
    network = random_network()
    state, moe = to_official(network.state_dict(), network.config), network.blocks[1].moe
    assert next(iter(state)) == "pos_embed"
    assert torch.equal(state["pos_embed"], TABLE)
    assert torch.equal(state["blocks.1.mlp.experts.4.up_proj.weight"], moe.unconditional.up.weight)
    assert torch.equal(state["blocks.1.mlp.experts.2.down_proj.bias"], moe.routed.down_bias[2])
    with raises_saying("head.weight: no such parameter in this architecture"):
        to_official({"head.weight": torch.zeros(1)}, network.config)
