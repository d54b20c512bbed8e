"""What holds for the routers of every method: oracles, lists, statistics, losses, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.config.routing import METHODS as TRAITS
from promoe_ds.routing import RoutingPlan
from promoe_ds.routing.router import mean_prototype_similarity, pool_token_ids

from ..builders import random_tensor
from . import oracles
from .oracles_methods import ORACLES
from .plans import (
    LOOKING,
    METHODS,
    NEAR,
    NULL,
    ONE_EXPERT,
    cases,
    check_against_oracle,
    make_router,
    partition,
    plan_rows,
    route,
)

BATCHES = {
    "mixed": [3, NULL, 0],
    "all conditional": [0, 1, 2],
    "all unconditional": [NULL, NULL, NULL],
    "one sample": [5],
}
ACTIVATIONS = ("identity", "sigmoid", "softmax")
_ACTIVATION = st.sampled_from(ACTIVATIONS)
_COSINE = {
    "activation": _ACTIVATION,
    "score_scale": st.sampled_from([0.5, 1.0, 4.0]),
    "rcl_weight": st.sampled_from([0.0, 0.5, 2.0]),
    "rcl_temperature": st.sampled_from([0.07, 1.0]),
}
_BALANCE = {
    "balance_weight": st.sampled_from([0.0, 0.25, 2.0]),
    "balance_level": st.sampled_from(["batch", "sample"]),
}
#: The settings that each method's router reads.
SETTINGS: dict[str, dict[str, st.SearchStrategy]] = {
    "token_choice": {**_COSINE, **_BALANCE, "rcl_assignments": st.sampled_from(["all", "first"])},
    "expert_choice": _COSINE,
    "dit_moe": _BALANCE,
    "expert_race": {
        "activation": _ACTIVATION,
        "similarity_weight": st.sampled_from([0.0, 0.25]),
    },
}

every_method = pytest.mark.parametrize("method", METHODS)
#: Without gradients there is nothing to say of the others.
every_looking_method = pytest.mark.parametrize("method", LOOKING)


def batch_of(labels: list[int], tokens: int = 4, seed: int = 0) -> Tensor:
    return random_tensor(len(labels), tokens, 8, seed=seed, dtype=torch.float64)


def differentiable(plan: RoutingPlan) -> list[Tensor]:
    """Return all of a plan that a loss may be made of."""
    predicted = [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.square().sum()]
    return [plan.assignment.gates_N.square().sum(), *plan.aux_losses.values(), *predicted]


def test_every_method_of_the_config_has_a_router_and_an_oracle() -> None:
    assert set(METHODS) == set(TRAITS) - {"dense"} == set(ORACLES)


# Plans.


@every_method
@given(data=st.data())
@settings(max_examples=200)
def test_router_any_batch_and_setting_equals_oracle(method: str, data: st.DataObject) -> None:
    case = data.draw(cases(all_experts_in_reach=method == "ec_dit"))
    check_against_oracle(case, method, **data.draw(st.fixed_dictionaries(SETTINGS.get(method, {}))))


@every_method
def test_router_types_of_a_plan(method: str) -> None:
    plan = route(make_router(method, dtype=torch.float32), batch_of([0, NULL]).float(), [0, NULL])
    assignment, stats = plan.assignment, plan.stats
    integers = (assignment.token_ids_N, assignment.tokens_per_expert_E, stats.tokens_per_expert_BE)
    assert [value.dtype for value in integers] == [torch.int64] * 3
    floats = (
        assignment.gates_N,
        stats.gate_sums_BE,
        stats.prototype_similarity,
        *plan.aux_losses.values(),
    )
    assert {value.dtype for value in floats} == {torch.float32}
    assert all(loss.shape == () for loss in plan.aux_losses.values())


@every_method
@pytest.mark.parametrize("autocast", [False, True])
def test_router_bf16_is_computed_in_fp32(method: str, autocast: bool) -> None:
    router, exact = (make_router(method, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    exact.load_state_dict(router.state_dict())
    tokens, labels = batch_of([3, NULL, 0]).bfloat16(), [3, NULL, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plan = route(router, tokens, labels)
    expected = route(exact, tokens.float(), labels)
    assert plan_rows(plan) == plan_rows(expected)
    pairs = [
        *((plan.aux_losses[name], loss) for name, loss in expected.aux_losses.items()),
        (plan.observation, expected.observation),
        (plan.target_patches_BSP, expected.target_patches_BSP),
    ]
    for found, value in pairs:
        if value is not None:
            assert found.dtype == torch.float32 and torch.equal(found, value)


@every_method
def test_router_statistics_and_observations_hold_no_graph(method: str) -> None:
    plan = route(make_router(method), batch_of([0, 1]).requires_grad_(), [0, 1])
    stats = (
        plan.stats.tokens_per_expert_BE,
        plan.stats.gate_sums_BE,
        plan.stats.prototype_similarity,
    )
    assert not any(
        value.requires_grad
        for value in (*stats, *([] if plan.observation is None else [plan.observation]))
    )
    assert plan.assignment.gates_N.requires_grad == (method in LOOKING)


@every_method
def test_router_changes_neither_its_input_nor_its_state(method: str) -> None:
    router, tokens = make_router(method), batch_of([3, NULL, 0])
    before, state = (
        tokens.clone(),
        {name: value.clone() for name, value in router.state_dict().items()},
    )
    route(router, tokens, [3, NULL, 0])
    assert torch.equal(tokens, before)
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())


def test_router_all_tokens_may_go_to_one_expert() -> None:
    router = make_router("token_choice", top_k=1)
    tokens = router.prototypes[2].detach().expand(2, 3, 8) * torch.arange(1.0, 4.0)[None, :, None]
    plan = route(router, tokens, [0, 1])
    assert [row[:2] for row in plan_rows(plan)] == [(token, 2) for token in range(6)]
    assert plan.aux_losses["rcl"] == 0


# Losses.


@every_method
def test_router_null_samples_move_no_loss(method: str) -> None:
    router, tokens = make_router(method), batch_of([0, NULL, 1])
    other = torch.cat([tokens[:1], 5 - 3 * tokens[1:2], tokens[2:]])
    first, second = (route(router, batch, [0, NULL, 1]).aux_losses for batch in (tokens, other))
    assert first == second


@pytest.mark.parametrize("method", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("labels", [[0, 1], [NULL, NULL]], ids=["conditional", "unconditional"])
def test_router_contrastive_loss_calls_its_collective_once_on_every_rank(
    method: str, labels: list[int]
) -> None:
    """Other ranks may have routed samples: a rank without any must not leave them waiting."""
    calls: list[Tensor] = []
    for weight in (1.0, 0.0):
        router = make_router(method, rcl_weight=weight)
        router.reduce_sum = lambda tensor: calls.append(tensor) or tensor
        route(router, batch_of(labels), labels)
    assert len(calls) == 1


# Gradients.


@every_looking_method
def test_router_all_unconditional_is_empty_and_trainable(method: str) -> None:
    router = make_router(method)
    plan = route(router, batch_of([NULL] * 2).requires_grad_(), [NULL] * 2)
    assert plan_rows(plan) == []
    assert plan.assignment.tokens_per_expert_E.tolist() == [0] * 4
    assert plan.stats.gate_sums_BE.sum(dim=1).tolist() == [0.0] * 2
    assert all(loss == 0 for loss in plan.aux_losses.values())
    sum(differentiable(plan)).backward()
    idle = [name for name, parameter in router.named_parameters() if not parameter.grad.any()]
    # Only Expert Race has something to say about null samples: what their target is.
    assert idle == [
        name
        for name, _ in router.named_parameters()
        if not name.startswith(("hidden", "target_head"))
    ]


@every_looking_method
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_router_every_parameter_gets_a_finite_gradient_in_training(
    method: str, labels: list[int]
) -> None:
    """Zeros, not none, where nothing was routed: a rank without a gradient would break the
    reduction.
    """
    router = make_router(method)
    sum(differentiable(route(router, batch_of(labels).requires_grad_(), labels))).backward()
    assert [name for name, parameter in router.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


@every_looking_method
def test_router_zero_tokens_have_finite_gradients(method: str) -> None:
    router, tokens = make_router(method, dtype=torch.float32), batch_of([0, 1]).float()
    tokens[0] = 0
    tokens.requires_grad_()
    sum(differentiable(route(router, tokens, [0, 1]))).backward()
    assert tokens.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


SMOOTH: list[tuple[str, dict[str, Any]]] = [
    *(
        ("token_choice", {"activation": a, "balance_weight": 0.5, "rcl_temperature": 0.5})
        for a in ACTIVATIONS
    ),
    *(("expert_choice", {"activation": a, "rcl_temperature": 0.5}) for a in ACTIVATIONS),
    *(("expert_race", {"activation": a}) for a in ACTIVATIONS),
    ("dit_moe", {"balance_level": "sample"}),
    *((method, {}) for method in ("dit_moe", "ec_dit", "diff_moe", *ONE_EXPERT)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("method", "extra"),
    SMOOTH,
    ids=[f"{method} {extra.get('activation', '')}" for method, extra in SMOOTH],
)
def test_router_gradients_are_those_of_finite_differences(
    method: str, extra: dict[str, Any], training: bool
) -> None:
    router = make_router(method, width=4, **extra).train(training)
    tokens = random_tensor(3, 4, 4, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in router.named_parameters()]
    parameters = tuple(
        parameter.detach().clone().requires_grad_() for parameter in router.parameters()
    )

    def outputs(tokens_BSD: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, values, strict=True))
        plan = torch.func.functional_call(router, state, (tokens_BSD, partition([0, NULL, 1])))
        # DiffMoE's predictor learns from tokens that it is not to move: its loss lacks their
        # gradient on purpose.
        losses = [loss for name, loss in plan.aux_losses.items() if name != "capacity"]
        return (
            plan.assignment.gates_N,
            *losses,
            *([] if plan.target_patches_BSP is None else [plan.target_patches_BSP]),
        )

    assert torch.autograd.gradcheck(outputs, (tokens, *parameters))


# What the routers share.


@pytest.mark.parametrize(
    ("prototypes", "expected"),
    [
        ([[1.0, 0.0], [2.0, 0.0]], 1.0),
        ([[1.0, 0.0], [-3.0, 0.0]], -1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0]], 0.0),
        ([[0.0, 0.0], [1.0, 0.0]], 0.0),
    ],
)
def test_prototype_similarity_by_hand(prototypes: list[list[float]], expected: float) -> None:
    assert mean_prototype_similarity(torch.tensor(prototypes)) == expected


@given(
    labels=st.lists(st.sampled_from([0, NULL]), min_size=1, max_size=5), tokens=st.integers(1, 4)
)
def test_pool_token_ids_are_the_places_of_the_routed_tokens(labels: list[int], tokens: int) -> None:
    routed, _ = oracles.partition(labels, NULL, has_unconditional_expert=True)
    places = [place * tokens + s for place in routed for s in range(tokens)]
    backwards = torch.arange(len(places)).flip(0)
    assert pool_token_ids(partition(labels), backwards, tokens).tolist() == places[::-1]


@given(num_experts=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_prototype_similarity_equals_oracle(num_experts: int, seed: int) -> None:
    prototypes = random_tensor(num_experts, 6, seed=seed, dtype=torch.float64)
    expected = oracles.mean_similarity(prototypes.tolist())
    assert mean_prototype_similarity(prototypes).item() == pytest.approx(expected, **NEAR)
