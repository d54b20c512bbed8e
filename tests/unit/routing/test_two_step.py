"""The whole router against loops: choices, gates, losses and statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.routing import TwoStepRouter
from promoe_ds.routing.scores import activate, cosine_scores

from ..builders import random_tensor
from . import oracles
from .plans import NULL, plan_rows, route

#: Sums in another order than the oracle's; the contrastive loss divides cosines by 0.07.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def make_router(
    width: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64, **settings: Any
) -> TwoStepRouter:
    router = TwoStepRouter(width, RoutingConfig(**{"num_experts": 4, **settings})).to(dtype)
    with torch.no_grad():
        router.prototypes.copy_(random_tensor(*router.prototypes.shape, seed=seed))
    return router


def oracle_plan(
    router: TwoStepRouter, tokens_BSD: Tensor, labels: list[int], *, unconditional: bool = True
):
    """Return rows, losses, counts and gate sums of a router, by loops."""
    settings, prototypes = router.settings, router.prototypes.tolist()
    routed, _ = oracles.partition(labels, NULL, has_unconditional_expert=unconditional)
    _, tokens, _ = tokens_BSD.shape
    choices, membership, samples = [], [], []
    counts = [[0] * settings.num_experts for _ in labels]
    gate_sums = [0.0] * len(labels)
    for place, sample in enumerate(tokens_BSD.tolist()):
        samples.append(
            [
                oracles.scores(token, prototypes, settings.score_scale, settings.activation)
                for token in sample
            ]
        )
        for s, scores in enumerate(samples[-1]):
            chosen = oracles.best(scores, settings.top_k) if place in routed else []
            counted = chosen if settings.rcl_assignments == "all" else chosen[:1]
            membership.append([expert in counted for expert in range(settings.num_experts)])
            for expert in chosen:
                choices.append((place * tokens + s, expert, scores[expert]))
                counts[place][expert] += 1
                gate_sums[place] += scores[expert]
    losses = {}
    if settings.rcl_weight > 0:
        losses["rcl"] = settings.rcl_weight * oracles.contrastive_loss(
            tokens_BSD.flatten(0, 1).tolist(), membership, prototypes, settings.rcl_temperature
        )
    if settings.balance_weight > 0:
        losses["balance"] = settings.balance_weight * oracles.balance_loss(
            samples,
            counts,
            [place in routed for place in range(len(labels))],
            top_k=settings.top_k,
            level=settings.balance_level,
            scores_are_probabilities=settings.activation == "softmax",
        )
    return oracles.assignment_rows(choices), losses, counts, gate_sums


def check_against_oracle(
    router: TwoStepRouter, tokens_BSD: Tensor, labels: list[int], **kwargs: Any
) -> None:
    plan = route(router, tokens_BSD, labels, **kwargs)
    rows, losses, counts, gate_sums = oracle_plan(router, tokens_BSD, labels, **kwargs)
    found = plan_rows(plan)
    assert [row[:2] for row in found] == [row[:2] for row in rows]
    assert [row[2] for row in found] == pytest.approx(
        [row[2] for row in rows], rel=1e-11, abs=1e-11
    )
    assert {name: loss.item() for name, loss in plan.aux_losses.items()} == pytest.approx(
        losses, rel=1e-11, abs=1e-11
    )
    assert plan.stats.tokens_per_expert_BE.tolist() == counts
    assert plan.stats.gate_sums_B.tolist() == pytest.approx(gate_sums, rel=1e-11, abs=1e-11)
    similarity = oracles.mean_similarity(router.prototypes.tolist())
    assert plan.stats.prototype_similarity.item() == pytest.approx(similarity, rel=1e-11, abs=1e-11)


@given(
    images=st.integers(1, 4),
    tokens=st.integers(1, 4),
    width=st.integers(2, 5),
    experts=st.integers(1, 5),
    activation=st.sampled_from(["identity", "sigmoid", "softmax"]),
    scale=st.sampled_from([0.5, 1.0, 4.0]),
    assignments=st.sampled_from(["all", "first"]),
    level=st.sampled_from(["batch", "sample"]),
    unconditional=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_router_any_setting_equals_oracle(
    images: int,
    tokens: int,
    width: int,
    experts: int,
    activation: str,
    scale: float,
    assignments: str,
    level: str,
    unconditional: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    router = make_router(
        width,
        seed,
        num_experts=experts,
        top_k=data.draw(st.integers(1, experts)),
        activation=activation,
        score_scale=scale,
        rcl_assignments=assignments,
        rcl_weight=0.5,
        balance_weight=0.25,
        balance_level=level,
    )
    labels = data.draw(st.lists(st.sampled_from([0, 9, NULL]), min_size=images, max_size=images))
    tokens_BSD = random_tensor(images, tokens, width, seed=seed + 1, dtype=torch.float64)
    check_against_oracle(router, tokens_BSD, labels, unconditional=unconditional)


# Named corners.


def test_router_expert_without_tokens_gets_none() -> None:
    router = make_router(num_experts=3)
    with torch.no_grad():
        router.prototypes[1] = -router.prototypes[0]
        router.prototypes[2] = router.prototypes[0]
        router.prototypes[2, 0] += 1.0
    tokens = router.prototypes[[0, 2, 0]].detach()[None] * 2
    check_against_oracle(router, tokens, [4])
    assert route(router, tokens, [4]).assignment.tokens_per_expert_E.tolist() == [2, 0, 1]


def test_router_all_tokens_on_one_expert() -> None:
    router = make_router()
    tokens = router.prototypes[2].detach().expand(2, 3, 8) * torch.arange(1.0, 4.0)[None, :, None]
    plan = route(router, tokens, [0, 1])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0, 0, 6, 0]
    assert plan.assignment.token_ids_N.tolist() == list(range(6))
    assert plan.aux_losses["rcl"] == 0
    torch.testing.assert_close(plan.assignment.gates_N, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_all_unconditional_is_empty_and_trainable(top_k: int) -> None:
    router = make_router(top_k=top_k, balance_weight=1.0)
    tokens = random_tensor(2, 3, 8, dtype=torch.float64).requires_grad_()
    plan = route(router, tokens, [NULL, NULL])
    assert plan.assignment.token_ids_N.numel() == 0
    assert plan.assignment.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    assert plan.stats.tokens_per_expert_BE.sum() == plan.stats.gate_sums_B.sum() == 0
    assert plan.stats.is_routed_B.tolist() == [False, False]
    losses = sum(plan.aux_losses.values())
    assert losses == 0
    (losses + plan.assignment.gates_N.sum()).backward()
    assert torch.equal(router.prototypes.grad, torch.zeros(4, 8, dtype=torch.float64))
    assert torch.equal(tokens.grad, torch.zeros(2, 3, 8, dtype=torch.float64))


def test_router_one_token() -> None:
    check_against_oracle(make_router(top_k=2), random_tensor(1, 1, 8, dtype=torch.float64), [3])


@pytest.mark.parametrize("assignments", ["all", "first"])
def test_router_top_k_equal_to_number_of_experts_sends_every_token_everywhere(
    assignments: str,
) -> None:
    router = make_router(top_k=4, rcl_assignments=assignments)
    tokens = random_tensor(2, 3, 8, dtype=torch.float64)
    plan = route(router, tokens, [3, NULL])
    assert plan.assignment.tokens_per_expert_E.tolist() == [3, 3, 3, 3]
    assert plan.assignment.token_ids_N.tolist() == [0, 1, 2] * 4
    check_against_oracle(router, tokens, [3, NULL])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_router_exact_ties_choose_different_experts_with_the_best_scores(top_k: int) -> None:
    router = make_router(dtype=torch.float32, top_k=top_k)
    with torch.no_grad():
        router.prototypes[1:] = router.prototypes[0]
    tokens = random_tensor(2, 5, 8)
    plan = route(router, tokens, [0, 1])
    rows = plan_rows(plan)
    assert (
        len({row[:2] for row in rows}) == len(rows) == 2 * 5 * top_k
    )  # no expert twice for a token
    scores = cosine_scores(tokens, router.prototypes).flatten(0, 1)
    assert all(gate == scores[token, expert] for token, expert, gate in rows)


def test_router_ties_of_two_values_leave_out_only_worse_experts() -> None:
    router = make_router(width=2, num_experts=4, top_k=2)
    with torch.no_grad():
        router.prototypes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]))
    plan = route(router, torch.tensor([[[3.0, 0.0]]], dtype=torch.float64), [0])
    assert plan_rows(plan) == [(0, 0, 1.0), (0, 2, 1.0)]


def test_router_ten_classes_null_label_ten_is_not_routed() -> None:
    router = make_router()
    tokens = random_tensor(3, 2, 8, dtype=torch.float64)
    plan = route(router, tokens, [9, 10, 0])
    assert plan.stats.is_routed_B.tolist() == [True, False, True]
    assert sorted(plan.assignment.token_ids_N.tolist()) == [0, 1, 4, 5]


def test_router_gates_are_raw_scores_also_negative_ones() -> None:
    router = make_router(top_k=4)
    tokens = random_tensor(1, 3, 8, dtype=torch.float64)
    gates = route(router, tokens, [0]).assignment.gates_N
    assert (gates < 0).any()
    scores = cosine_scores(tokens, router.prototypes).flatten(0, 1)
    assert torch.equal(
        gates, scores.T.flatten()
    )  # all experts in order, each with its tokens in order


# Losses.


def test_router_losses_only_in_training_mode() -> None:
    router = make_router(balance_weight=1.0).eval()
    assert route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0]).aux_losses == {}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"rcl"}),
        ({"rcl_weight": 0.0}, set()),
        ({"balance_weight": 0.1}, {"rcl", "balance"}),
        ({"rcl_weight": 0.0, "balance_weight": 0.1}, {"balance"}),
    ],
)
def test_router_weight_zero_switches_a_loss_off(
    settings: dict[str, float], names: set[str]
) -> None:
    assert (
        set(
            route(
                make_router(**settings), random_tensor(1, 3, 8, dtype=torch.float64), [0]
            ).aux_losses
        )
        == names
    )


def test_router_weights_multiply_the_losses() -> None:
    tokens = random_tensor(2, 6, 8, dtype=torch.float64)
    one = route(make_router(rcl_weight=1.0, balance_weight=1.0), tokens, [0, 1]).aux_losses
    four = route(make_router(rcl_weight=4.0, balance_weight=0.5), tokens, [0, 1]).aux_losses
    assert one["rcl"] > 0
    assert torch.equal(four["rcl"], 4 * one["rcl"])
    assert torch.equal(four["balance"], 0.5 * one["balance"])


def test_router_unconditional_tokens_do_not_move_the_contrastive_loss() -> None:
    router = make_router()
    tokens = random_tensor(3, 6, 8, dtype=torch.float64)
    other = torch.cat([tokens[:1], tokens[1:2] * -3 + 1, tokens[2:]])
    losses = [route(router, batch, [0, NULL, 1]).aux_losses["rcl"] for batch in (tokens, other)]
    assert losses[0] > 0
    assert torch.equal(*losses)


@pytest.mark.parametrize("top_k", [1, 3])
def test_router_reduce_sum_halves_give_the_loss_of_the_whole_batch(top_k: int) -> None:
    router = make_router(top_k=top_k)
    tokens, labels = random_tensor(4, 3, 8, dtype=torch.float64), [0, NULL, 2, 3]
    whole = route(router, tokens, labels).aux_losses["rcl"]
    partial: list[Tensor] = []
    router.reduce_sum = lambda tensor: partial.append(tensor) or tensor
    halves = [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])]
    for half in halves:
        route(router, *half)
    assert len(partial) == 2  # one call each
    for rank, half in enumerate(halves):
        router.reduce_sum = lambda tensor, other=partial[1 - rank]: tensor + other
        torch.testing.assert_close(route(router, *half).aux_losses["rcl"], whole, **FLOAT64)


# Precision and gradients.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softmax"])
def test_router_bf16_tokens_are_routed_in_fp32(activation: str, autocast: bool) -> None:
    settings = {"top_k": 2, "activation": activation, "balance_weight": 1.0}
    router = make_router(dtype=torch.bfloat16, **settings)
    exact = make_router(dtype=torch.float32, **settings)
    exact.load_state_dict(router.state_dict())
    tokens = random_tensor(3, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plan = route(router, tokens, [0, NULL, 3])
    expected = route(exact, tokens.float(), [0, NULL, 3])
    assert plan.assignment.gates_N.dtype == torch.float32
    assert torch.equal(plan.assignment.gates_N, expected.assignment.gates_N)
    assert torch.equal(plan.assignment.token_ids_N, expected.assignment.token_ids_N)
    for name, loss in expected.aux_losses.items():
        assert plan.aux_losses[name].dtype == torch.float32
        assert torch.equal(plan.aux_losses[name], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_zero_tokens_have_finite_gradients(dtype: torch.dtype) -> None:
    router = make_router(dtype=dtype, balance_weight=1.0, top_k=2)
    tokens = random_tensor(2, 4, 8, dtype=dtype)
    tokens[0] = 0
    tokens.requires_grad_()
    plan = route(router, tokens, [0, 1])
    (plan.assignment.gates_N.sum() + sum(plan.aux_losses.values())).backward()
    assert tokens.grad.isfinite().all()
    assert router.prototypes.grad.isfinite().all()


def test_router_gradient_of_gates_reaches_chosen_prototypes_only() -> None:
    router = make_router(rcl_weight=0.0)
    tokens = router.prototypes[[1, 3]].detach()[None] + 0.01
    route(router, tokens, [0]).assignment.gates_N.sum().backward()
    moved = router.prototypes.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [False, True, False, True]


# Statistics.


@given(
    images=st.integers(1, 5),
    tokens=st.integers(1, 4),
    experts=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_stats_counts_add_up_to_routed_tokens_times_k(
    images: int, tokens: int, experts: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = make_router(num_experts=experts, top_k=top_k, dtype=torch.float32).eval()
    labels = data.draw(st.lists(st.sampled_from([1, NULL]), min_size=images, max_size=images))
    plan = route(router, random_tensor(images, tokens, 8, seed=seed), labels)
    per_sample = [0 if label == NULL else tokens * top_k for label in labels]
    assert plan.stats.tokens_per_expert_BE.sum(dim=1).tolist() == per_sample
    assert torch.equal(
        plan.stats.tokens_per_expert_BE.sum(dim=0), plan.assignment.tokens_per_expert_E
    )
    assert plan.assignment.token_ids_N.numel() == sum(per_sample)


def test_stats_hold_no_graph() -> None:
    plan = route(make_router(), random_tensor(1, 3, 8, dtype=torch.float64).requires_grad_(), [0])
    stats = plan.stats
    assert not any(
        t.requires_grad
        for t in (stats.tokens_per_expert_BE, stats.gate_sums_B, stats.prototype_similarity)
    )
    assert plan.assignment.gates_N.requires_grad


def test_router_scores_use_scale_and_activation() -> None:
    router = make_router(activation="sigmoid", score_scale=3.0, top_k=4)
    tokens = random_tensor(1, 2, 8, dtype=torch.float64)
    expected = activate(3.0 * cosine_scores(tokens, router.prototypes), "sigmoid").flatten(0, 1)
    assert torch.equal(route(router, tokens, [0]).assignment.gates_N, expected.T.flatten())
