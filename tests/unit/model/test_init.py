"""Initial weights: a function of (seed, name, global expert id) only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.moe import StackedExperts

from ..builders import METHODS, MODERN, TEXT, of_method, small_config

ROUTED = "blocks.1.moe.routed."


def initialised(seed: int = 0, **sections: Any) -> DiT:
    network = build_model(small_config(**sections))
    initialise(network, seed)
    return network


def wide(name: str) -> dict[str, dict[str, Any]]:
    """Return the sections of a network of width 64 that has a parameter of this name."""
    return {"model": {**(TEXT["model"] if "text" in name else {}), "hidden_size": 64}}


def weights(network: DiT) -> dict[str, Tensor]:
    return dict(network.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_init_is_a_function_of_the_seed_alone(method: str) -> None:
    torch.manual_seed(1)
    first = weights(initialised(3, **of_method(method)))
    torch.manual_seed(2)
    second, other = (weights(initialised(seed, **of_method(method))) for seed in (3, 4))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, other[name]) == (value.unique().numel() == 1), name
        assert value.any() or ".router." not in name or name.endswith("bias"), name


def test_init_parameters_of_equal_shape_differ() -> None:
    network = initialised(model={"depth": 4}, routing={"expert_type": "swiglu"})
    moe = network.blocks[1].moe
    for alike in (
        [block.attention.qkv.weight for block in network.blocks],
        [*moe.routed.up_weight, *moe.routed.gate_weight],
        [moe.shared.gate.weight, moe.shared.up.weight],
    ):
        assert not any(torch.equal(a, b) for i, a in enumerate(alike) for b in alike[:i])


def test_init_parameter_does_not_depend_on_other_parts_of_the_network() -> None:
    small, large = (
        weights(initialised()),
        weights(initialised(model={"depth": 4, "qk_norm": True}, routing={"top_k": 2})),
    )
    assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_init_std_of_experts_is_theirs_alone() -> None:
    plain, small = (
        weights(initialised(model={"hidden_size": 64}, routing=routing))
        for routing in ({}, {"expert_init_std": 0.006})
    )
    for name, value in small.items():
        part = name.split(".moe.")[-1]
        if part.startswith(("routed", "shared", "unconditional")) and name.endswith("weight"):
            assert value.std().item() == pytest.approx(0.006, rel=0.1), name
        else:
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("expert_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_init_experts_of_all_ranks_together_are_those_of_one(
    expert_type: str, ep_size: int
) -> None:
    whole = initialised(routing={"expert_type": expert_type}).blocks[1].moe.routed
    parts = []
    for rank in range(ep_size):
        network = build_model(small_config(routing={"expert_type": expert_type}))
        parts.append(StackedExperts(4, 16, 32, expert_type=expert_type))
        parts[-1].keep(rank * 4 // ep_size, 4 // ep_size)
        network.blocks[1].moe.routed = parts[-1]
        initialise(network, 0)
    for name, value in whole.named_parameters():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name


@pytest.mark.parametrize(
    ("block", "experts"),
    [
        ("dit", {}),
        ("modern", {}),
        ("dit", {"shared_expert_type": "swiglu", "num_unconditional_experts": 2}),
    ],
    ids=["gelu", "modern with swiglu", "shared swiglu"],
)
@pytest.mark.parametrize("method", METHODS)
def test_init_after_meta_covers_every_parameter_and_buffer(
    method: str, block: str, experts: dict[str, Any]
) -> None:
    sections = {"model": {"block": block}, **of_method(method, **experts)}
    with torch.device("meta"):
        network = build_model(small_config(**sections))
    network.to_empty(device="cpu")
    for value in (*network.parameters(), *network.buffers()):
        value.data.fill_(torch.nan)  # what memory may hold
    initialise(network, 0)
    assert [
        name
        for name, value in (*network.named_parameters(), *network.named_buffers())
        if not value.isfinite().all()
    ] == []
    expected = initialised(**sections)
    tables, state = dict(expected.named_buffers()), expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, tables[name]) for name, value in network.named_buffers())


@pytest.mark.parametrize(
    ("seed", "model"), [(0, {"qk_norm": True}), (2**62, {"qk_norm": True}), (0, MODERN["model"])]
)
def test_init_untrained_biases_modulation_and_output_are_zero(
    seed: int, model: dict[str, Any]
) -> None:
    network = initialised(seed, model=model)
    for name, value in weights(network).items():
        if name.endswith("bias") or "modulation" in name or name.startswith("final_layer"):
            assert not value.any(), name
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert value.any(), name


@pytest.mark.parametrize(
    ("name", "fan_in", "fan_out"),
    [
        ("blocks.0.attention.qkv.weight", 64, 192),
        ("blocks.0.attention.text_kv.weight", 12, 128),
        ("blocks.0.feed_forward.down.weight", 256, 64),
        ("patch_embedding.proj.weight", 4, 64),
        (ROUTED + "up_weight", 64, 128),
        (ROUTED + "down_weight", 128, 64),
        ("blocks.1.moe.shared.up.weight", 64, 128),
        (ROUTED + "gate_weight", 64, 128),
        ("blocks.1.moe.shared.gate.weight", 64, 128),
        ("blocks.1.moe.router.hidden.weight", 64, 64),
        ("blocks.1.moe.router.gate_weight", 64, 4),
    ],
)
def test_init_matrices_are_xavier_uniform(name: str, fan_in: int, fan_out: int) -> None:
    routing = {"expert_type": "swiglu"} if "gate" in name else {}
    routing |= {"method": "expert_race"} if ".router." in name else {}
    value = weights(initialised(**wide(name), routing=routing))[name]
    bound = (6 / (fan_in + fan_out)) ** 0.5
    assert value.abs().max() <= bound
    # 256 draws at least: the largest lies near the bound, the deviation within some percent of
    # bound / sqrt(3).
    assert value.abs().max() > 0.95 * bound
    assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert abs(value.mean().item()) < 0.1 * bound


@pytest.mark.parametrize(
    ("method", "std", "is_uniform"),
    [
        ("dit_moe", 3**-0.5 / 8, True),
        ("ec_dit", 0.006, False),
        ("diff_moe", 0.006, False),
        ("expert_race", (2 / (64 + 4)) ** 0.5, True),
    ],
)
def test_init_linear_gates_start_as_published(method: str, std: float, is_uniform: bool) -> None:
    gates = [
        weights(initialised(seed, model={"hidden_size": 64}, **of_method(method)))[
            "blocks.1.moe.router.gate_weight"
        ]
        for seed in range(8)
    ]
    value = torch.stack(gates) / std  # 2,048 draws
    assert value.std().item() == pytest.approx(1, rel=0.05)
    # The fourth moment tells the shapes apart (1.8 and 3), so does the largest value.
    assert value.pow(4).mean().item() == pytest.approx(1.8 if is_uniform else 3, rel=0.15)
    assert (value.abs().max() <= 3**0.5) == is_uniform


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.moe.router.prototypes",
        "label_embedding.table.weight",
        "timestep_embedding.up.weight",
        "timestep_embedding.down.weight",
        "text_embedding.pooled.weight",
    ],
)
def test_init_embeddings_and_prototypes_are_normal_002(name: str) -> None:
    value = weights(initialised(**wide(name)))[name]
    # 256 draws at least: the estimate lies within 15 percent (over three standard errors).
    assert value.std().item() == pytest.approx(0.02, rel=0.15)
    assert value.abs().max() > 0.04  # beyond the bound of a uniform draw with this deviation
