"""DiT-MoE's router against loops, and its choices at their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..builders import random_tensor
from . import oracles_methods
from .plans import NULL, Case, cases, make_router, plan_rows, route


def check_against_oracle(case: Case, **settings: Any) -> None:
    router = case.router("dit_moe", **settings)
    case.check(
        router,
        oracles_methods.linear_gate(
            case.batch,
            router.gate_weight.tolist(),
            top_k=case.top_k,
            balance_weight=router.settings.balance_weight,
            level=router.settings.balance_level,
        ),
    )


@given(case=cases(), level=st.sampled_from(["batch", "sample"]))
def test_linear_gate_any_batch_equals_oracle(case: Case, level: str) -> None:
    check_against_oracle(case, balance_level=level)


def test_linear_gate_gates_are_probabilities_of_all_experts_not_of_the_chosen() -> None:
    router = make_router("dit_moe", top_k=4)
    plan = route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0])
    torch.testing.assert_close(plan.stats.gate_sums_B, torch.full((1,), 3.0, dtype=torch.float64))
    fewer = make_router("dit_moe", top_k=2)
    assert (
        route(fewer, random_tensor(1, 3, 8, dtype=torch.float64), [0]).stats.gate_sums_B.item()
        < 3.0
    )


def test_linear_gate_longer_token_has_a_sharper_gate() -> None:
    # Unlike a cosine, the logit grows with the token.
    router = make_router("dit_moe", top_k=1)
    tokens = random_tensor(1, 4, 8, dtype=torch.float64)
    gates = [sorted(plan_rows(route(router, scale * tokens, [0]))) for scale in (1.0, 3.0)]
    assert all(long[2] > short[2] for short, long in zip(*gates, strict=True))


def test_linear_gate_balance_weight_zero_has_no_loss() -> None:
    assert (
        route(
            make_router("dit_moe", balance_weight=0.0),
            random_tensor(1, 3, 8, dtype=torch.float64),
            [0],
        ).aux_losses
        == {}
    )


def test_linear_gate_all_tokens_on_one_expert_have_the_greatest_balance_loss() -> None:
    router = make_router("dit_moe", top_k=1, balance_weight=1.0)
    tokens = random_tensor(2, 3, 8, dtype=torch.float64).abs()
    with torch.no_grad():
        router.gate_weight[1] = 50.0
    plan = route(router, tokens, [0, 1])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0, 6, 0, 0]
    assert plan.aux_losses["balance"].item() == pytest.approx(4.0)


def test_linear_gate_null_samples_do_not_move_the_balance_loss() -> None:
    router = make_router("dit_moe")
    tokens = random_tensor(3, 4, 8, dtype=torch.float64)
    other = torch.cat([tokens[:1], 5 - tokens[1:2], tokens[2:]])
    losses = [route(router, batch, [0, NULL, 1]).aux_losses["balance"] for batch in (tokens, other)]
    assert torch.equal(*losses)
