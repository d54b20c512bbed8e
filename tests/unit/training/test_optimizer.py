"""Moving averages beside any optimizer, parameter groups, learning rates in closed form."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.config.optimizer import EMA, OptimizerConfig, learning_rate, power_exponent

from ..averaged import AveragedOptimizer
from ..builders import random_network

STEPS = 5
#: A fused optimizer with state, one without state, one whose state is smaller than the weights.
OPTIMIZERS = {
    torch.optim.AdamW: {"betas": (0.8, 0.95), "fused": True},
    torch.optim.SGD: {},
    torch.optim.Adafactor: {},
}


class Trained(AveragedOptimizer):
    def __init__(self, kind: type = torch.optim.AdamW, **averages: Any) -> None:
        settings = OptimizerConfig(**{"ema_decays": (0.9,), **averages})
        super().__init__(partial(kind, lr=1e-2, **OPTIMIZERS[kind]), settings)


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_averages_leave_the_updates_of_any_optimizer_as_they_are(kind: type) -> None:
    trained, bare = Trained(kind), Trained(kind)
    bare.optimizer = kind(bare.optimizer.param_groups, **OPTIMIZERS[kind])
    for _ in range(STEPS):
        trained.update()
        bare.update()
        assert_equal(trained.weights, bare.weights)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("averages", "decays"),
    [
        ({}, [0.9] * STEPS),
        ({"ema_decays": (0.0,)}, [0.0] * STEPS),
        ({"ema_decays": (0.3,), "ema_warmup": True}, [2 / 11, 3 / 12, 0.3, 0.3]),
    ],
)
def test_average_equals_one_by_hand_from_the_weights_before_the_first_update(
    kind: type, averages: dict[str, Any], decays: list[float]
) -> None:
    trained = Trained(kind, **averages)
    expected = [value.clone() for value in trained.values()]
    for decay in decays:
        trained.update()
        expected = [
            decay * average + (1 - decay) * value
            for average, value in zip(expected, trained.values(), strict=True)
        ]
        assert_equal(trained.averages(), expected, 1e-6)  # fp32 against fp64


def test_several_averages_equal_those_kept_alone() -> None:
    together = Trained(ema_decays=(0.9, 0.5), ema_sigma_rels=(0.05, 0.1))
    alone = {"ema": Trained(), "ema_0.5": Trained(ema_decays=(0.5,))}
    for trained in (together, *alone.values()):
        for _ in range(STEPS):
            trained.update()
    for name, trained in alone.items():
        assert_equal(together.averages(name), trained.averages())
    assert list(together.ema.averages) == ["ema", "ema_0.5", "ema_power_0.05", "ema_power_0.1"]


def test_power_average_is_the_weighted_mean_of_all_weights_so_far() -> None:
    """(1 - 1/t)^(gamma + 1) unrolled: update i has the weight (i/t)^(gamma + 1) - ((i -
    1)/t)^(gamma + 1).
    """
    trained, seen = Trained(ema_sigma_rels=(0.2,)), []
    for _ in range(STEPS):
        trained.update()
        seen.append([value.clone() for value in trained.values()])
    power = power_exponent(0.2) + 1
    parts = [(i / STEPS) ** power - ((i - 1) / STEPS) ** power for i in range(1, STEPS + 1)]
    expected = [
        sum(part * value for part, value in zip(parts, values, strict=True))
        for values in zip(*seen, strict=True)
    ]
    assert_equal(trained.averages("ema_power_0.2"), expected, 1e-6)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("updates", [0, 1, 2, 7, 300])
def test_initial_share_of_an_average_is_the_product_of_its_decays(
    decay: float, updates: int, warmup: bool
) -> None:
    average = OptimizerConfig(ema_decays=(decay,), ema_warmup=warmup).averages[EMA]
    product = math.prod(average.decay_at(update) for update in range(1, updates + 1))
    assert average.initial_share(updates) == pytest.approx(product, rel=1e-9, abs=1e-300)
    assert bool(average.warning(EMA, updates)) == (product >= 0.1)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_power_exponent_equals_the_published_ones(length: float, gamma: float) -> None:
    """EDM2, Sec. 3.1 names these two pairs."""
    assert power_exponent(length) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_update_without_gradients_changes_nothing_and_begins_no_average(kind: type) -> None:
    trained = Trained(kind)
    before = [value.clone() for value in trained.values()]
    trained.update(has_gradients=False)
    assert_equal(trained.weights, before)
    assert not any(trained.optimizer.state.values())
    trained.update()
    averages, after = trained.averages(), [value.clone() for value in trained.values()]
    trained.update(has_gradients=False)
    assert_equal(trained.weights, after)
    assert_equal(trained.averages(), averages)
    expected = [0.9 * old + 0.1 * new for old, new in zip(before, after, strict=True)]
    assert_equal(averages, expected, 1e-6)


def test_swapped_average_and_weights_come_back_exactly() -> None:
    trained = Trained()
    trained.ema.swap()  # no average yet
    trained.update()
    weights, averages = [value.clone() for value in trained.values()], trained.averages()
    trained.ema.swap()
    assert_equal(trained.weights, averages)
    trained.ema.swap()
    assert_equal(trained.weights, weights)
    assert_equal(trained.averages(), averages)


def test_restored_state_continues_alike() -> None:
    trained, restored = Trained(), Trained()
    trained.update()
    with torch.no_grad():
        for weight, value in zip(restored.weights, trained.weights, strict=True):
            weight.copy_(value)
    restored.optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    restored.step = restored.ema.updates = 1
    for each in (trained, restored):
        each.update()
    assert_equal(trained.weights, restored.weights)
    assert_equal(trained.averages(), restored.averages())


# Groups.


def groups_of(weight_decay: float, *, sharded: bool) -> tuple[nn.Module, list[dict[str, Any]]]:
    network = random_network(model={"qk_norm": True}, routing={"moe_blocks": "all"})
    network.label_embedding.requires_grad_(False)
    for layer in network.moe_layers().values() if sharded else ():
        for parameter in layer.routed.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_2"
    return network, parameter_groups(network, OptimizerConfig(weight_decay=weight_decay))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_groups_hold_every_trained_parameter_once_and_experts_apart_where_sharded(
    weight_decay: float, sharded: bool
) -> None:
    network, groups = groups_of(weight_decay, sharded=sharded)
    listed = [
        (name, value, group.get("moe", False), group["name"])
        for group in groups
        for name, value in zip(group["param_names"], group["params"], strict=True)
    ]
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert "label_embedding.table.weight" not in trained
    assert sorted(name for name, *_ in listed) == sorted(trained)
    for name, value, *kind in listed:
        is_expert = sharded and ".routed." in name
        assert value is trained[name]
        assert kind == [is_expert, "ep_size_2" if is_expert else "dense"]
    assert len(groups) == (1 + sharded) * (1 + (weight_decay > 0))


@pytest.mark.parametrize("sharded", [False, True])
def test_groups_decay_never_reaches_biases_prototypes_norms_or_expert_biases(sharded: bool) -> None:
    _, groups = groups_of(0.1, sharded=sharded)
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    plain = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    forbidden = ("bias", "up_bias", "down_bias", "prototypes", "q_norm.weight", "k_norm.weight")
    assert [name for name in decayed if name.endswith(forbidden)] == []
    assert [name for name in plain if not name.endswith(forbidden)] == []  # every matrix is decayed
    for kind in (*forbidden, "qkv.weight", "routed.up_weight", "routed.down_weight"):
        assert any(name.endswith(kind) for name in decayed | plain), kind


# Learning rate.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "min_lr": 0.5}, [1.0] * 12),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75] + [1.0] * 9),
        (
            {"schedule": "linear", "min_lr": 0.2},
            [1.0 - 0.8 * step / 10 for step in range(11)] + [0.2],
        ),
        (
            {"schedule": "cosine", "min_lr": 0.2},
            [0.6 + 0.4 * math.cos(math.pi * step / 10) for step in range(11)] + [0.2],
        ),
        (
            {"schedule": "linear", "warmup_steps": 2},
            [0.5, 1.0] + [1.0 - step / 8 for step in range(9)] + [0.0],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 2},
            [0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(9)] + [0.0],
        ),
        ({"schedule": "cosine", "warmup_steps": 20}, [(step + 1) / 20 for step in range(10)]),
        ({"schedule": "linear", "warmup_steps": 20}, [(step + 1) / 20 for step in range(10)]),
    ],
)
def test_learning_rate_of_ten_steps(settings: dict[str, Any], expected: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, **settings)
    found = [learning_rate(step, 10, config) for step in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
