"""Experts that choose: capacities (EC-DiT), and thresholds of the batch pool (DiffMoE)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from promoe_ds.routing.batch_pool import capacity_loss, move_thresholds, observe_thresholds
from promoe_ds.routing.router import expert_capacity, scheduled_top_k

from ..builders import random_tensor
from .plans import NULL, make_router, route


def test_capacity_rounds_as_published_for_all_sizes() -> None:
    """`int((S / E) * K)`, in fp64: vectorised over S and K, our function for every size where that
    is no exact floor.
    """
    tokens_S1 = np.arange(1, 1025)[:, None]
    inexact = 0
    for experts in range(1, 129):
        top_k_K = np.arange(1, experts + 1)
        published_SK = ((tokens_S1 / experts) * top_k_K).astype(np.int64)
        for s, k in zip(*np.nonzero(published_SK != tokens_S1 * top_k_K // experts), strict=True):
            assert expert_capacity(int(s) + 1, experts, int(k) + 1) == published_SK[s, k]
            inexact += 1
        half = (experts + 1) // 2
        assert [expert_capacity(s, experts, half) for s in range(1, 1025)] == published_SK[
            :, half - 1
        ].tolist()
    assert expert_capacity(196, 22, 11) == 97 and inexact > 1000


@pytest.mark.parametrize("schedule", [None, (0, 0), (0, 3), (2, 2), (3, 10)])
def test_scheduled_top_k_is_that_of_a_counter_of_steps(schedule: tuple[int, int] | None) -> None:
    """The published models count their training passes from -1, a step before each."""
    count = -1
    for step in range(14):
        count, expected = count + 1, 2.0
        if schedule is not None and count <= schedule[0]:
            expected = 12.0
        elif schedule is not None and count <= schedule[1]:
            left = (schedule[1] - count) / (schedule[1] - schedule[0])
            expected = 2 + 10 * left
        assert scheduled_top_k(step, 12, 2, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["ec_dit", "diff_moe"])
def test_capacity_falls_with_the_steps_of_training_and_not_in_evaluation(method: str) -> None:
    router, tokens = make_router(method, capacity_schedule=(1, 5)), random_tensor(2, 6, 8)
    tokens, taken = tokens.double(), {}
    for step in (0, 1, 2, 3, 5, 6):
        router.step = step
        plan = route(router, tokens, [0, 1])
        taken[step] = plan.assignment.tokens_per_expert_E.tolist()
        if step < 2:  # all tokens for all experts, and the lowest score is that of the last
            gates = plan.assignment.gates_N.view(4, 12).sum(dim=0)
            torch.testing.assert_close(gates, torch.ones_like(gates))
    # Of 12 tokens, or of 6 in each of two images, by four experts: K = 4, 4, 3.5, 3, 2, 2.
    samples = 2 if method == "ec_dit" else 1
    expected = [samples * math.floor(12 / samples / 4 * k) for k in (4, 4, 3.5, 3, 2, 2)]
    assert list(taken.values()) == [[each] * 4 for each in expected]
    router.step, plain = 0, make_router(method)
    assert torch.equal(
        route(router.eval(), tokens, [0, 1]).assignment.token_ids_N,
        route(plain.eval(), tokens, [0, 1]).assignment.token_ids_N,
    )


def test_batch_pool_of_too_few_tokens_leaves_every_expert_without() -> None:
    router = make_router("diff_moe", top_k=1)
    plan = route(router, random_tensor(2, 3, 8, dtype=torch.float64), [0, NULL])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0] * 4
    assert plan.observation.tolist() == [0.0] * 5
    assert plan.aux_losses["capacity"] > 0  # the predictor learns from tokens that nobody took, too


def test_predictor_and_routing_do_not_move_each_other() -> None:
    router = make_router("diff_moe")
    tokens = random_tensor(2, 4, 8, dtype=torch.float64).requires_grad_()
    plan = route(router, tokens, [0, 1])
    plan.aux_losses["capacity"].backward()
    assert tokens.grad is None and router.gate_weight.grad is None
    assert all(parameter.grad.any() for parameter in router.predictor.parameters())
    router.zero_grad()
    plan.assignment.gates_N.sum().backward()
    assert all(parameter.grad is None for parameter in router.predictor.parameters())


# Thresholds, of Expert Race too.


@pytest.mark.parametrize("method", ["diff_moe", "expert_race"])
def test_thresholds_move_once_towards_the_mean_of_the_passes_that_had_tokens(method: str) -> None:
    router = make_router(method, threshold_decay=0.9)
    (threshold,) = router.buffers()
    before, seen = threshold.clone(), []
    for seed, labels in enumerate([[0, 1], [NULL, NULL], [NULL, 3]]):
        tokens = random_tensor(2, 4, 8, seed=seed, dtype=torch.float64)
        seen.append(route(router, tokens, labels).observation)
    assert not seen[1].any()
    router.update_running_state(sum(seen))
    mean = (seen[0] + seen[2])[:-1] / 2
    torch.testing.assert_close(threshold, 0.9 * before + 0.1 * mean, rtol=1e-12, atol=1e-12)


def test_thresholds_steps_too_small_for_bf16_still_count() -> None:
    router = make_router("diff_moe", dtype=torch.bfloat16)
    router.thresholds.fill_(0.5)
    for _ in range(20):
        router.update_running_state(torch.tensor([0.51] * 4 + [1.0]))
    # 0.5 + 0.05 * 0.01 rounds to 0.5 in bf16, however often.
    assert router.thresholds.tolist() == pytest.approx([0.51 - 0.01 * 0.95**20] * 4, rel=1e-5)


def test_capacity_loss_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4]]).requires_grad_()
    loss = capacity_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert loss == 1e4
    assert logits.grad.tolist() == [[0.5, -0.5]]


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
