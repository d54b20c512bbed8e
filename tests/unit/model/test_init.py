"""Initial weights: a function of (seed, name, global expert id) only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.moe import StackedExperts

from ..builders import small_config

ROUTED = "blocks.1.moe.routed."


def initialised(seed: int = 0, **sections: Any) -> DiT:
    network = build_model(small_config(**sections))
    initialise(network, seed)
    return network


def weights(network: DiT) -> dict[str, Tensor]:
    return dict(network.named_parameters())


def drawn(network: DiT) -> dict[str, Tensor]:
    """Return the parameters that are random, not constant."""
    return {name: value for name, value in weights(network).items() if value.unique().numel() > 1}


def test_init_same_seed_is_the_same() -> None:
    first, second = weights(initialised(3)), weights(initialised(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_init_other_seed_changes_every_drawn_parameter() -> None:
    first, second = drawn(initialised(0)), drawn(initialised(1))
    assert first.keys() == second.keys() and ROUTED + "up_weight" in first
    assert [name for name in first if torch.equal(first[name], second[name])] == []


def test_init_ignores_the_state_of_torch() -> None:
    torch.manual_seed(1)
    first = weights(initialised())
    torch.manual_seed(2)
    second = weights(initialised())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_init_parameters_of_equal_shape_differ() -> None:
    network = initialised(model={"depth": 4})
    qkv = [block.attention.qkv.weight for block in network.blocks]
    assert not any(torch.equal(a, b) for i, a in enumerate(qkv) for b in qkv[:i])


def test_init_parameter_does_not_depend_on_other_parts_of_the_network() -> None:
    small, large = weights(initialised()), weights(initialised(model={"depth": 4, "qk_norm": True}, routing={"top_k": 2}))
    assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_init_experts_differ_from_each_other() -> None:
    routed = initialised().blocks[1].moe.routed
    for weight in (routed.up_weight, routed.down_weight):
        assert not any(torch.equal(weight[i], weight[j]) for i in range(4) for j in range(i))


def test_init_experts_of_a_rank_equal_the_rows_of_all() -> None:
    whole = initialised().blocks[1].moe.routed
    network = build_model(small_config())
    _, hidden, width = whole.up_weight.shape
    network.blocks[1].moe.routed = part = StackedExperts(2, width, hidden, first_expert=2)
    initialise(network, 0)
    for name, value in part.named_parameters():
        assert torch.equal(value, getattr(whole, name)[2:4]), name


def test_init_more_experts_keep_the_first_ones() -> None:
    few, many = (initialised(routing={"num_experts": n}).blocks[1].moe.routed for n in (4, 6))
    assert torch.equal(few.up_weight, many.up_weight[:4])


@pytest.mark.parametrize("seed", [0, 2**62])
def test_init_untrained_biases_modulation_and_output_are_zero(seed: int) -> None:
    network = initialised(seed, model={"qk_norm": True})
    for name, value in weights(network).items():
        if name.endswith("bias") or "modulation" in name or name.startswith("final_layer"):
            assert not value.any(), name
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert value.any(), name


@pytest.mark.parametrize(("name", "fan_in", "fan_out"), [
    ("blocks.0.attention.qkv.weight", 64, 192), ("blocks.0.feed_forward.down.weight", 256, 64),
    ("patch_embedding.proj.weight", 4, 64), (ROUTED + "up_weight", 64, 128), (ROUTED + "down_weight", 128, 64),
    ("blocks.1.moe.shared.up.weight", 64, 128),
])
def test_init_matrices_are_xavier_uniform(name: str, fan_in: int, fan_out: int) -> None:
    value = weights(initialised(model={"hidden_size": 64}))[name]
    bound = (6 / (fan_in + fan_out)) ** 0.5
    assert value.abs().max() <= bound
    # 256 draws at least: the largest lies near the bound, the deviation within some percent of bound / sqrt(3).
    assert value.abs().max() > 0.95 * bound
    assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert abs(value.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("name", ["blocks.1.moe.router.prototypes", "label_embedding.table.weight",
                                  "timestep_embedding.up.weight", "timestep_embedding.down.weight"])
def test_init_embeddings_and_prototypes_are_normal_002(name: str) -> None:
    value = weights(initialised(model={"hidden_size": 64}))[name]
    # 256 draws at least: the estimate lies within 15 percent (over three standard errors).
    assert value.std().item() == pytest.approx(0.02, rel=0.15)
    assert value.abs().max() > 0.04  # beyond the bound of a uniform draw with this deviation


def test_init_fills_the_position_table() -> None:
    network = build_model(small_config())
    network.positions.fill_(torch.nan)
    initialise(network, 0)
    assert network.positions.isfinite().all()
