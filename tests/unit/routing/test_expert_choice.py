"""Expert choice within each sample, by prototypes and by a linear gate, against loops; its
contrastive loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.errors import RoutingError
from promoe_ds.routing.losses import expert_choice_contrastive_loss
from promoe_ds.routing.router import choose_tokens, expert_capacity

from ..builders import random_tensor
from . import oracles_methods
from .plans import NEAR, NULL, Case, cases, make_router, plan_rows, route

TAU = 0.07


def check_prototypes(case: Case, **settings: Any) -> None:
    router = case.router("expert_choice", **settings)
    values = router.settings
    case.check(
        router,
        oracles_methods.prototype_expert_choice(
            case.batch,
            router.prototypes.tolist(),
            top_k=case.top_k,
            scale=values.score_scale,
            activation=values.activation,
            rcl_weight=values.rcl_weight,
            temperature=values.rcl_temperature,
        ),
    )


@given(
    case=cases(),
    activation=st.sampled_from(["identity", "sigmoid", "softmax"]),
    scale=st.sampled_from([0.5, 1.0, 4.0]),
    temperature=st.sampled_from([TAU, 1.0]),
)
def test_prototypes_any_batch_equals_oracle(
    case: Case, activation: str, scale: float, temperature: float
) -> None:
    check_prototypes(
        case, activation=activation, score_scale=scale, rcl_temperature=temperature, rcl_weight=0.5
    )


@given(case=cases(all_experts_in_reach=True))
def test_linear_any_batch_equals_oracle(case: Case) -> None:
    router = case.router("ec_dit")
    case.check(
        router,
        oracles_methods.linear_expert_choice(
            case.batch, router.gate_weight.tolist(), top_k=case.top_k
        ),
    )


# Capacity.


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity"),
    [
        (256, 12, 1, 21),
        (256, 12, 3, 64),
        (4, 4, 4, 4),
        (3, 4, 1, 0),
    ],
)
def test_capacity_is_the_floor_of_the_even_share(
    tokens: int, experts: int, top_k: int, capacity: int
) -> None:
    assert expert_capacity(tokens, experts, top_k) == capacity


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


@pytest.mark.parametrize("method", ["expert_choice", "ec_dit"])
def test_every_expert_takes_equally_many_of_every_routed_sample(method: str) -> None:
    plan = route(make_router(method), random_tensor(3, 6, 8, dtype=torch.float64), [0, NULL, 1])
    assert plan.stats.tokens_per_expert_BE.tolist() == [[3] * 4, [0] * 4, [3] * 4]


def test_prototypes_share_below_one_token_takes_one() -> None:
    plan = route(
        make_router("expert_choice", top_k=1), random_tensor(2, 3, 8, dtype=torch.float64), [0, 1]
    )
    assert plan.assignment.tokens_per_expert_E.tolist() == [2, 2, 2, 2]


def test_linear_share_below_one_token_is_refused() -> None:
    with pytest.raises(
        RoutingError,
        match=(
            "top_k=1 of 3 tokens gives each of num_experts=4 experts less than one: raise top_k "
            "or lower num_experts"
        ),
    ):
        route(make_router("ec_dit", top_k=1), random_tensor(1, 3, 8, dtype=torch.float64), [0])


@pytest.mark.parametrize("method", ["expert_choice", "ec_dit"])
def test_top_k_equal_to_number_of_experts_sends_every_token_everywhere(method: str) -> None:
    plan = route(
        make_router(method, top_k=4), random_tensor(2, 3, 8, dtype=torch.float64), [3, NULL]
    )
    assert [row[:2] for row in plan_rows(plan)] == [
        (token, expert) for expert in range(4) for token in range(3)
    ]


def test_prototypes_softmax_runs_over_the_tokens() -> None:
    router = make_router("expert_choice", top_k=4, activation="softmax")
    gates = route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0]).assignment.gates_N
    torch.testing.assert_close(gates.view(4, 3).sum(dim=1), torch.ones(4, dtype=torch.float64))


def test_linear_softmax_runs_over_the_experts() -> None:
    gates = route(
        make_router("ec_dit", top_k=4), random_tensor(1, 3, 8, dtype=torch.float64), [0]
    ).assignment.gates_N
    torch.testing.assert_close(gates.view(4, 3).sum(dim=0), torch.ones(3, dtype=torch.float64))


def test_choose_tokens_by_hand() -> None:
    scores = torch.tensor([[[0.1, 0.9], [0.7, 0.2], [0.4, 0.3]]])
    gates, chosen = choose_tokens(scores, 2)
    assert chosen.tolist() == [[[1, 2], [0, 2]]]
    assert torch.equal(gates, torch.tensor([[[0.7, 0.4], [0.9, 0.3]]]))


def test_prototypes_weight_zero_has_no_loss_and_calls_no_collective() -> None:
    router = make_router("expert_choice", rcl_weight=0.0)
    router.reduce_sum = lambda tensor: pytest.fail("reduce_sum was called")
    assert route(router, random_tensor(1, 4, 8, dtype=torch.float64), [0]).aux_losses == {}


def test_prototypes_all_unconditional_calls_the_collective_all_the_same() -> None:
    """Other ranks may have routed samples: a rank without any must not leave them waiting."""
    router, calls = make_router("expert_choice"), []
    router.reduce_sum = lambda tensor: calls.append(tensor.tolist()) or tensor
    assert (
        route(router, random_tensor(2, 4, 8, dtype=torch.float64), [NULL, NULL]).aux_losses["rcl"]
        == 0
    )
    assert calls == [[0.0, 0.0]]


# Contrastive loss.


def random_choice(samples: int, tokens: int, experts: int, capacity: int, seed: int) -> Tensor:
    return random_tensor(samples, experts, tokens, seed=seed).argsort(dim=-1)[..., :capacity]


def contrast(
    tokens: Tensor, chosen: Tensor, prototypes: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients on tokens and prototypes."""
    tokens, prototypes = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
    loss = expert_choice_contrastive_loss(tokens, chosen, prototypes, TAU, **kwargs)
    loss.backward()
    return loss.detach(), tokens.grad, prototypes.grad


@given(
    samples=st.integers(0, 3),
    tokens=st.integers(1, 5),
    width=st.integers(1, 5),
    experts=st.integers(1, 5),
    temperature=st.sampled_from([TAU, 1.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_contrast_any_choice_equals_oracle(
    samples: int,
    tokens: int,
    width: int,
    experts: int,
    temperature: float,
    seed: int,
    data: st.DataObject,
) -> None:
    chosen = random_choice(samples, tokens, experts, data.draw(st.integers(1, tokens)), seed)
    tokens_BSD = random_tensor(samples, tokens, width, seed=seed + 1, dtype=torch.float64)
    prototypes = random_tensor(experts, width, seed=seed + 2, dtype=torch.float64)
    loss = expert_choice_contrastive_loss(tokens_BSD, chosen, prototypes, temperature)
    expected = oracles_methods.expert_choice_contrast(
        tokens_BSD.tolist(), chosen.tolist(), prototypes.tolist(), temperature
    )
    assert loss.item() == pytest.approx(expected, **NEAR)


def test_contrast_by_hand() -> None:
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    loss = expert_choice_contrastive_loss(
        tokens, torch.tensor([[[0], [1]]]), torch.eye(2), temperature=1.0
    )
    # Each prototype has cosine 1 with its own centroid and 0 with the other: log(1 + e^-1).
    torch.testing.assert_close(loss, torch.log(1 + torch.exp(torch.tensor(-1.0))))


def test_contrast_gradient_is_that_of_finite_differences() -> None:
    tokens = random_tensor(2, 4, 3, dtype=torch.float64).requires_grad_()
    prototypes = random_tensor(3, 3, seed=1, dtype=torch.float64).requires_grad_()
    chosen = random_choice(2, 4, 3, 2, seed=2)
    assert torch.autograd.gradcheck(
        lambda t, p: expert_choice_contrastive_loss(t, chosen, p, 0.5), (tokens, prototypes)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrast_without_samples_is_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    loss, tokens, prototypes = contrast(
        torch.zeros(0, 4, 8, dtype=dtype),
        torch.zeros(0, 3, 2, dtype=torch.int64),
        random_tensor(3, 8, dtype=dtype),
    )
    assert loss == 0
    assert tokens.shape == (0, 4, 8)
    assert torch.equal(prototypes, torch.zeros_like(prototypes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrast_zero_tokens_have_finite_gradients(dtype: torch.dtype) -> None:
    tokens = random_tensor(2, 4, 8, dtype=dtype)
    tokens[0] = 0
    loss, *gradients = contrast(
        tokens, random_choice(2, 4, 3, 2, seed=1), random_tensor(3, 8, seed=1, dtype=dtype)
    )
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_contrast_bf16_input_is_computed_in_fp32(autocast: bool) -> None:
    tokens, prototypes = (
        random_tensor(2, 4, 8, dtype=torch.bfloat16),
        random_tensor(3, 8, seed=1, dtype=torch.bfloat16),
    )
    chosen = random_choice(2, 4, 3, 2, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = expert_choice_contrastive_loss(tokens, chosen, prototypes, TAU)
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, expert_choice_contrastive_loss(tokens.float(), chosen, prototypes.float(), TAU)
    )


@given(first=st.integers(0, 2), second=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_contrast_two_ranks_have_the_mean_over_all_rows(first: int, second: int, seed: int) -> None:
    """Uneven ranks: each row counts once, and the ranks' gradients add up to those of the whole
    batch.
    """
    tokens = random_tensor(first + second, 4, 3, seed=seed, dtype=torch.float64)
    prototypes = random_tensor(3, 3, seed=seed + 1, dtype=torch.float64)
    chosen = random_choice(first + second, 4, 3, 2, seed + 2)
    halves = [(tokens[:first], chosen[:first]), (tokens[first:], chosen[first:])]
    partial: list[Tensor] = []
    for half in halves:
        contrast(
            *half,
            prototypes,
            reduce_sum=lambda tensor: partial.append(tensor.detach().clone()) or tensor,
        )
    whole, token_gradient, prototype_gradient = contrast(tokens, chosen, prototypes)
    results = [
        contrast(
            *half, prototypes, reduce_sum=lambda tensor, other=partial[1 - rank]: tensor + other
        )
        for rank, half in enumerate(halves)
    ]
    close = {"rtol": 1e-11, "atol": 1e-11}
    for loss, _, _ in results:
        torch.testing.assert_close(loss, whole, **close)
    torch.testing.assert_close(
        torch.cat([gradient for _, gradient, _ in results]), token_gradient, **close
    )
    torch.testing.assert_close(results[0][2] + results[1][2], prototype_gradient, **close)
