"""AdamW with the moving average in its state, parameter groups, learning rates in closed form."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.config.optimizer import EMA, OptimizerConfig, learning_rate, power_exponent
from promoe_ds.train.optimizer import AdamWithEma

from ..builders import random_network, random_tensor

STEPS = 5


def parameters() -> list[nn.Parameter]:
    return [
        nn.Parameter(random_tensor(*shape, seed=seed))
        for seed, shape in enumerate([(4, 3), (5,), (2, 3, 2)])
    ]


def set_gradients(values: list[nn.Parameter], step: int) -> None:
    for seed, parameter in enumerate(values):
        parameter.grad = random_tensor(*parameter.shape, seed=100 * step + seed)


class Trained(AdamWithEma):
    """The optimizer as the trainer drives it under ZeRO: `updates` set before a step, `step` called
    once a group.
    """

    def step(self, closure: None = None) -> None:
        every = self.param_groups
        for group in every:
            self.param_groups = [group]
            super().step(closure)
        self.param_groups = every
        self.updates += not self.overflow


def make_optimizer(values: list[nn.Parameter], decay: float = 0.01, **config: Any) -> AdamWithEma:
    settings = OptimizerConfig(**{"lr": 1e-2, "ema_decays": (0.9,), "betas": (0.8, 0.95), **config})
    groups = [{"params": part, "weight_decay": decay} for part in (values[:1], values[1:])]
    return Trained(groups, settings)


def state_copy(optimizer: AdamWithEma) -> list[dict[str, Tensor]]:
    return [
        {key: value.clone() for key, value in state.items()} for state in optimizer.state.values()
    ]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_optimizer_weights_equal_those_of_torch_adamw(decay: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(ours, decay)
    reference = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=decay, fused=True
    )
    for step in range(STEPS):
        for values, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(values, step)
            each.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_optimizer_average_equals_one_by_hand_from_the_weights_before_the_first_update() -> None:
    values = parameters()
    optimizer = make_optimizer(values)
    averages = [p.detach().double().clone() for p in values]
    for step in range(STEPS):
        set_gradients(values, step)
        optimizer.step()
        averages = [
            0.9 * average + 0.1 * p.detach().double()
            for average, p in zip(averages, values, strict=True)
        ]
        for parameter, average in zip(values, averages, strict=True):
            # fp32 against fp64, five steps.
            torch.testing.assert_close(
                optimizer.state[parameter][EMA].double(), average, rtol=1e-6, atol=1e-6
            )


def test_optimizer_average_with_decay_zero_is_the_weights() -> None:
    values = parameters()
    optimizer = make_optimizer(values, ema_decays=(0.0,))
    for step in range(2):
        set_gradients(values, step)
        optimizer.step()
        assert all(torch.equal(optimizer.state[p][EMA], p) for p in values)


def test_optimizer_several_averages_equal_those_kept_alone() -> None:
    together, decays, lengths = parameters(), (0.9, 0.5), (0.05, 0.1)
    optimizer = make_optimizer(together, ema_decays=decays, ema_sigma_rels=lengths)
    alone = {"ema": {"ema_decays": (0.9,)}, "ema_0.5": {"ema_decays": (0.5,)}}
    for name, settings in alone.items():
        values = parameters()
        other = make_optimizer(values, **settings)
        for step in range(STEPS):
            set_gradients(values, step)
            other.step()
            if name == "ema":
                set_gradients(together, step)
                optimizer.step()
        for mine, its in zip(together, values, strict=True):
            assert torch.equal(optimizer.state[mine][name], other.state[its][EMA])
    assert list(optimizer.averages) == ["ema", "ema_0.5", "ema_power_0.05", "ema_power_0.1"]


def test_optimizer_power_average_is_the_weighted_mean_of_all_weights_so_far() -> None:
    """(1 - 1/t)^(gamma + 1) unrolled: update i has the weight (i/t)^(gamma + 1) - ((i -
    1)/t)^(gamma + 1).
    """
    values = parameters()
    optimizer = make_optimizer(values, ema_sigma_rels=(0.2,))
    seen = []
    for step in range(STEPS):
        set_gradients(values, step)
        optimizer.step()
        seen.append([p.detach().double().clone() for p in values])
    power = power_exponent(0.2) + 1
    weights = [(i / STEPS) ** power - ((i - 1) / STEPS) ** power for i in range(1, STEPS + 1)]
    for number, parameter in enumerate(values):
        expected = sum(weight * each[number] for weight, each in zip(weights, seen, strict=True))
        torch.testing.assert_close(
            optimizer.state[parameter]["ema_power_0.2"].double(), expected, rtol=1e-6, atol=1e-6
        )


def test_optimizer_average_with_warmup_decays_by_the_update_in_every_group() -> None:
    values = parameters()
    optimizer = make_optimizer(values, ema_decays=(0.3,), ema_warmup=True)
    averages = [p.detach().double().clone() for p in values]
    for step, decay in enumerate([2 / 11, 3 / 12, 0.3, 0.3]):
        set_gradients(values, step)
        optimizer.step()
        averages = [
            decay * average + (1 - decay) * p.detach().double()
            for average, p in zip(averages, values, strict=True)
        ]
        for parameter, average in zip(values, averages, strict=True):
            torch.testing.assert_close(
                optimizer.state[parameter][EMA].double(), average, rtol=1e-6, atol=1e-6
            )


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


def test_optimizer_average_is_memory_of_its_own() -> None:
    values = parameters()
    optimizer = make_optimizer(values)
    set_gradients(values, 0)
    optimizer.step()
    before = optimizer.state[values[0]][EMA].clone()
    with torch.no_grad():
        values[0].add_(1.0)
    assert torch.equal(optimizer.state[values[0]][EMA], before)


def test_optimizer_overflow_changes_nothing() -> None:
    values = parameters()
    optimizer = make_optimizer(values)
    set_gradients(values, 0)
    optimizer.step()
    weights, state = [p.detach().clone() for p in values], state_copy(optimizer)
    set_gradients(values, 1)
    optimizer.overflow = True
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(values, weights, strict=True))
    for before, after in zip(state, state_copy(optimizer), strict=True):
        assert before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before
        )


def test_optimizer_overflow_at_the_first_step_does_not_start_the_average() -> None:
    values = parameters()
    optimizer = make_optimizer(values)
    set_gradients(values, 0)
    optimizer.overflow = True
    optimizer.step()
    assert not optimizer.state
    optimizer.overflow = False
    with torch.no_grad():
        values[0].add_(1.0)
    start = values[0].detach().clone()
    optimizer.step()
    expected = 0.9 * start + 0.1 * values[0].detach()
    torch.testing.assert_close(
        optimizer.state[values[0]][EMA], expected, rtol=1e-6, atol=1e-6
    )  # lerp rounds otherwise


def test_optimizer_parameter_without_gradient_stays_and_has_no_average() -> None:
    values = parameters()
    optimizer = make_optimizer(values)
    set_gradients(values, 0)
    values[1].grad = None
    before = values[1].detach().clone()
    optimizer.step()
    assert torch.equal(values[1], before)
    assert EMA not in optimizer.state.get(values[1], {})


def test_optimizer_state_restored_goes_on_alike() -> None:
    values, others = parameters(), parameters()
    optimizer, restored = make_optimizer(values), make_optimizer(others)
    for step in range(2):
        set_gradients(values, step)
        optimizer.step()
    with torch.no_grad():
        for other, value in zip(others, values, strict=True):
            other.copy_(value)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, owner in ((values, optimizer), (others, restored)):
        set_gradients(each, 2)
        owner.step()
    for value, other in zip(values, others, strict=True):
        assert torch.equal(value, other)
        assert torch.equal(optimizer.state[value][EMA], restored.state[other][EMA])


# Groups.


def groups_of(weight_decay: float, *, sharded: bool) -> tuple[nn.Module, list[dict[str, Any]]]:
    network = random_network(model={"qk_norm": True}, routing={"moe_blocks": "all"})
    if sharded:
        for layer in network.moe_layers().values():
            for parameter in layer.routed.parameters():
                parameter.allreduce, parameter.group_name = False, "ep_size_2"
    return network, parameter_groups(network, OptimizerConfig(weight_decay=weight_decay))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_groups_hold_every_parameter_once_beside_its_name(
    weight_decay: float, sharded: bool
) -> None:
    network, groups = groups_of(weight_decay, sharded=sharded)
    listed = {
        name: value
        for group in groups
        for name, value in zip(group["param_names"], group["params"], strict=True)
    }
    assert sum(len(group["params"]) for group in groups) == len(listed)
    expected = dict(network.named_parameters())
    assert listed.keys() == expected.keys()
    assert all(listed[name] is expected[name] for name in expected)


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


def test_groups_without_decay_are_one_of_dense_and_one_of_experts() -> None:
    _, groups = groups_of(0.0, sharded=True)
    assert [(group["name"], group.get("moe", False)) for group in groups] == [
        ("dense", False),
        ("ep_size_2", True),
    ]


def test_groups_experts_are_those_that_are_sharded() -> None:
    _, groups = groups_of(0.1, sharded=True)
    experts = {name for group in groups if group.get("moe") for name in group["param_names"]}
    assert experts == {
        name for group in groups for name in group["param_names"] if ".routed." in name
    }
    assert {group["name"] for group in groups if group.get("moe")} == {"ep_size_2"}


def test_groups_unsharded_experts_are_dense() -> None:
    _, groups = groups_of(0.1, sharded=False)
    assert {group["name"] for group in groups} == {"dense"}
    assert not any("moe" in group for group in groups)


def test_groups_leave_out_frozen_parameters() -> None:
    network = random_network()
    network.label_embedding.requires_grad_(False)
    groups = parameter_groups(network, OptimizerConfig())
    names = {name for group in groups for name in group["param_names"]}
    assert "label_embedding.table.weight" not in names and "final_layer.linear.weight" in names


# Learning rate.


def rates(steps: int = 12, max_steps: int = 10, **config: Any) -> list[float]:
    return [
        learning_rate(step, max_steps, OptimizerConfig(**{"lr": 1.0, **config}))
        for step in range(steps)
    ]


def test_lr_constant_is_constant() -> None:
    assert rates(schedule="constant", min_lr=0.5) == [1.0] * 12


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_lr_warmup_rises_in_even_steps_to_the_full_rate(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_lr_linear_falls_in_even_steps_to_the_minimum() -> None:
    expected = [1.0 - 0.8 * step / 10 for step in range(11)] + [0.2]
    assert rates(schedule="linear", min_lr=0.2) == pytest.approx(expected, rel=1e-12)


def test_lr_cosine_is_half_a_wave_from_full_to_minimum() -> None:
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)] + [0.2]
    found = rates(schedule="cosine", min_lr=0.2)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == 1.0 and found[5] == pytest.approx(0.6) and found[10] == pytest.approx(0.2)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_lr_schedule_begins_after_the_warmup(schedule: str, middle: float) -> None:
    found = rates(schedule=schedule, warmup_steps=2)
    assert (
        found[2] == 1.0
        and found[6] == pytest.approx(middle)
        and found[10] == pytest.approx(0.0, abs=1e-12)
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_lr_warmup_longer_than_the_run_only_rises(schedule: str) -> None:
    assert rates(steps=10, schedule=schedule, warmup_steps=20) == [
        (step + 1) / 20 for step in range(10)
    ]
