"""DiffMoE's router against loops: the pool, the predictor and its loss, the running thresholds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing import BatchPoolRouter
from promoe_ds.routing.batch_pool import capacity_loss, move_thresholds, observe_thresholds

from ..builders import random_tensor
from . import oracles, oracles_methods
from .plans import NEAR, NULL, Case, cases, make_router, plan_rows, route


def predictor(router: BatchPoolRouter) -> oracles_methods.Predictor:
    up, down = router.predictor.up, router.predictor.down
    return oracles_methods.Predictor(
        up.weight.tolist(), up.bias.tolist(), down.weight.tolist(), down.bias.tolist()
    )


@given(case=cases())
def test_batch_pool_any_batch_equals_oracle(case: Case) -> None:
    router = case.router("diff_moe")
    case.check(
        router,
        oracles_methods.batch_pool(
            case.batch,
            router.gate_weight.tolist(),
            predictor(router),
            router.thresholds.tolist(),
            top_k=case.top_k,
            capacity_weight=router.settings.capacity_weight,
            training=case.training,
        ),
    )


# The choice.


def test_batch_pool_an_expert_may_take_all_its_tokens_from_one_sample() -> None:
    router = make_router("diff_moe", top_k=1)
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    tokens[0] = router.gate_weight[2].detach() * 20
    plan = route(router, tokens, [0, 1])
    assert plan.stats.tokens_per_expert_BE[:, 2].tolist() == [
        2,
        0,
    ]  # 8 tokens, 4 experts: 2 slots each
    assert plan.assignment.tokens_per_expert_E.tolist() == [2, 2, 2, 2]


def test_batch_pool_without_null_samples_is_smaller() -> None:
    tokens = random_tensor(4, 4, 8, dtype=torch.float64)
    counts = [
        route(
            make_router("diff_moe", top_k=1),
            tokens,
            [0, NULL, 1, NULL],
            unconditional=unconditional,
        ).assignment.tokens_per_expert_E.tolist()
        for unconditional in (True, False)
    ]
    assert counts == [[2] * 4, [4] * 4]


def test_batch_pool_of_too_few_tokens_leaves_every_expert_without() -> None:
    router = make_router("diff_moe", top_k=1)
    plan = route(router, random_tensor(2, 3, 8, dtype=torch.float64), [0, NULL])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0] * 4
    assert plan.observation.tolist() == [0.0] * 5
    assert plan.aux_losses["capacity"] > 0  # the predictor learns from tokens that nobody took, too


@pytest.mark.parametrize(
    ("thresholds", "counts"),
    [
        ([0.0] * 4, [6] * 4),
        ([1.0] * 4, [0] * 4),
        ([0.0, 1.0, 0.0, 1.0], [6, 0, 6, 0]),
    ],
)
def test_batch_pool_evaluation_takes_as_many_as_exceed_the_threshold(
    thresholds: list[float], counts: list[int]
) -> None:
    router = make_router("diff_moe").eval()
    router.thresholds.copy_(torch.tensor(thresholds))
    plan = route(router, random_tensor(2, 3, 8, dtype=torch.float64), [0, 1])
    assert plan.assignment.tokens_per_expert_E.tolist() == counts


def test_batch_pool_evaluation_takes_by_score_not_by_prediction() -> None:
    router = make_router("diff_moe", top_k=1).eval()
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    logits = router.predictor(tokens.flatten(0, 1))
    router.thresholds.copy_(logits.sigmoid().sort(dim=0).values[-3])  # two tokens exceed each
    scores = (tokens.flatten(0, 1) @ router.gate_weight.T).softmax(dim=-1)
    best = [
        (token, expert)
        for expert in range(4)
        for token in sorted(scores[:, expert].topk(2).indices.tolist())
    ]
    assert [row[:2] for row in plan_rows(route(router, tokens, [0, 1]))] == best


def test_batch_pool_evaluation_depends_on_the_other_samples() -> None:
    """By design, as published: the number of tokens is the pool's, and so is their order."""
    router = make_router("diff_moe").eval()
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    alone = route(router, tokens[:1], [0]).stats.tokens_per_expert_BE[0]
    assert not torch.equal(route(router, tokens, [0, 1]).stats.tokens_per_expert_BE[0], alone)


# The predictor.


def test_predictor_loss_moves_neither_tokens_nor_gate() -> None:
    router = make_router("diff_moe")
    tokens = random_tensor(2, 4, 8, dtype=torch.float64).requires_grad_()
    route(router, tokens, [0, 1]).aux_losses["capacity"].backward()
    assert tokens.grad is None and router.gate_weight.grad is None
    assert all(parameter.grad.any() for parameter in router.predictor.parameters())


def test_gates_do_not_move_the_predictor() -> None:
    router = make_router("diff_moe")
    route(
        router, random_tensor(2, 4, 8, dtype=torch.float64), [0, 1]
    ).assignment.gates_N.sum().backward()
    assert all(parameter.grad is None for parameter in router.predictor.parameters())


@given(tokens=st.integers(0, 4), experts=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_capacity_loss_equals_oracle(tokens: int, experts: int, seed: int) -> None:
    logits = random_tensor(tokens, experts, seed=seed, dtype=torch.float64)
    chosen = (random_tensor(tokens, experts, seed=seed + 1, dtype=torch.float64) > 0).double()
    terms = [
        -torch.tensor(oracles.sigmoid(z if y else -z)).log().item()
        for row, taken in zip(logits.tolist(), chosen.tolist(), strict=True)
        for z, y in zip(row, taken, strict=True)
    ]
    expected = sum(terms) / len(terms) if terms else 0.0
    assert capacity_loss(logits, chosen).item() == pytest.approx(expected, rel=1e-6)


def test_capacity_loss_gradient_is_that_of_finite_differences() -> None:
    logits = random_tensor(3, 2, dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: capacity_loss(z, chosen), (logits,))


def test_capacity_loss_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4]]).requires_grad_()
    loss = capacity_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss == 1e4
    assert logits.grad.tolist() == [[0.5, -0.5]]


# Thresholds.


def observations(tokens: list[Tensor], router: BatchPoolRouter, labels: list[int]) -> list[Tensor]:
    return [route(router, batch, labels).observation for batch in tokens]


def test_thresholds_of_one_pass_move_a_twentieth_of_the_way_to_the_lowest_chosen_prediction() -> (
    None
):
    router = make_router("diff_moe")
    tokens, before = random_tensor(2, 4, 8, dtype=torch.float64), router.thresholds.clone()
    lowest = (
        router.predictor(tokens.flatten(0, 1)).sigmoid().sort(dim=0, descending=True).values[3]
    )  # 4 slots each
    router.update_running_state(route(router, tokens, [0, 1]).observation)
    torch.testing.assert_close(
        router.thresholds, 0.95 * before + 0.05 * lowest.detach(), rtol=1e-12, atol=1e-12
    )


def test_thresholds_of_several_passes_move_once_towards_their_mean() -> None:
    router = make_router("diff_moe")
    before = router.thresholds.clone()
    seen = observations(
        [random_tensor(2, 4, 8, seed=seed, dtype=torch.float64) for seed in range(3)],
        router,
        [0, 1],
    )
    router.update_running_state(torch.stack(seen).sum(dim=0))
    mean = torch.stack([observation[:-1] for observation in seen]).mean(dim=0)
    torch.testing.assert_close(
        router.thresholds, 0.95 * before + 0.05 * mean, rtol=1e-12, atol=1e-12
    )


def test_thresholds_pass_without_tokens_does_not_count() -> None:
    router, other = make_router("diff_moe"), make_router("diff_moe")
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    (seen,), (nothing,) = (
        observations([tokens], router, [0, 1]),
        observations([tokens], router, [NULL, NULL]),
    )
    router.update_running_state(seen + nothing)
    other.update_running_state(seen)
    assert torch.equal(router.thresholds, other.thresholds)


def test_thresholds_without_any_tokens_stay() -> None:
    router = make_router("diff_moe")
    before = router.thresholds.clone()
    router.update_running_state(
        route(router, random_tensor(2, 4, 8, dtype=torch.float64), [NULL, NULL]).observation
    )
    assert torch.equal(router.thresholds, before)


@pytest.mark.parametrize(
    ("decay", "expected"), [(0.95, [0.405, 0.23]), (0.0, [0.5, 0.8]), (0.5, [0.45, 0.5])]
)
def test_move_thresholds_by_hand(decay: float, expected: list[float]) -> None:
    thresholds = torch.tensor([0.4, 0.2])
    total = sum(
        observe_thresholds(torch.tensor(lowest), any_chosen=True)
        for lowest in ([0.6, 1.0], [0.4, 0.6])
    )
    assert total.tolist() == [1.0, pytest.approx(1.6), 2.0]
    move_thresholds(thresholds, total, decay)
    assert thresholds.tolist() == pytest.approx(expected, rel=1e-6)


def test_observe_thresholds_nothing_chosen_is_all_zero() -> None:
    assert observe_thresholds(torch.tensor([0.6, 1.0]), any_chosen=False).tolist() == [
        0.0,
        0.0,
        0.0,
    ]


def test_thresholds_move_in_place_and_keep_their_dtype() -> None:
    router = make_router("diff_moe", dtype=torch.bfloat16)
    place = router.thresholds
    router.update_running_state(torch.tensor([0.5] * 4 + [1.0]))
    assert router.thresholds is place and place.dtype == torch.float32


def test_thresholds_steps_too_small_for_bf16_still_count() -> None:
    router = make_router("diff_moe", dtype=torch.bfloat16)
    router.thresholds.fill_(0.5)
    for _ in range(20):
        router.update_running_state(torch.tensor([0.51] * 4 + [1.0]))
    # 0.5 + 0.05 * 0.01 rounds to 0.5 in bf16, however often.
    assert router.thresholds.tolist() == pytest.approx(
        [0.51 - 0.01 * 0.95**20] * 4, **{**NEAR, "rel": 1e-5}
    )
