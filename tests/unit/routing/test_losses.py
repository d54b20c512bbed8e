"""Routing contrastive loss (Eq. 6) and load balancing against loops, and at their edges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing.losses import load_balance_loss, routing_contrastive_loss

from ..builders import random_tensor
from . import oracles

TAU = 0.07
#: Sums in another order than the oracle's; cosines are divided by tau = 0.07, sums taken over a
# few terms.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def members(experts: list[list[int]], num_experts: int) -> Tensor:
    """Return the membership matrix of tokens that belong to the given experts."""
    membership = torch.zeros(len(experts), num_experts)
    for token, chosen in enumerate(experts):
        membership[token, chosen] = 1.0
    return membership


def contrastive(
    tokens: Tensor, membership: Tensor, prototypes: Tensor, **kwargs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients on tokens and prototypes."""
    tokens, prototypes = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
    loss = routing_contrastive_loss(tokens, membership, prototypes, TAU, **kwargs)
    loss.backward()
    return loss.detach(), tokens.grad, prototypes.grad


# Contrastive.


@given(
    tokens=st.integers(1, 8),
    width=st.integers(1, 5),
    experts=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.07, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_rcl_any_membership_equals_oracle(
    tokens: int, width: int, experts: int, density: float, temperature: float, seed: int
) -> None:
    tokens_TD = random_tensor(tokens, width, seed=seed, dtype=torch.float64)
    prototypes_ED = random_tensor(experts, width, seed=seed + 1, dtype=torch.float64)
    membership = (
        torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density
    )
    loss = routing_contrastive_loss(tokens_TD, membership.double(), prototypes_ED, temperature)
    expected = oracles.contrastive_loss(
        tokens_TD.tolist(), membership.tolist(), prototypes_ED.tolist(), temperature
    )
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), **FLOAT64)


def test_rcl_by_hand() -> None:
    tokens = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss = routing_contrastive_loss(
        tokens, torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 5.0]]), temperature=1.0
    )
    # Each prototype has cosine 1 with its own centroid and 0 with the other: log(1 + e^-1).
    torch.testing.assert_close(loss, torch.log(1 + torch.exp(torch.tensor(-1.0))))


@pytest.mark.parametrize(
    ("chosen", "active"), [([[], [], []], 0), ([[2], [2], [2]], 1), ([[], [0], []], 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rcl_fewer_than_two_active_is_exactly_zero_without_gradient(
    chosen: list[list[int]], active: int, dtype: torch.dtype
) -> None:
    membership = members(chosen, 4)
    assert int((membership.sum(dim=0) > 0).sum()) == active
    loss, *gradients = contrastive(
        random_tensor(3, 8, dtype=dtype), membership, random_tensor(4, 8, seed=1, dtype=dtype)
    )
    assert loss == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_rcl_expert_without_tokens_plays_no_part() -> None:
    tokens, prototypes = (
        random_tensor(4, 8, dtype=torch.float64),
        random_tensor(4, 8, seed=1, dtype=torch.float64),
    )
    membership = members([[0], [2], [2], [0]], 4)
    loss, _, gradient = contrastive(tokens, membership, prototypes)
    fewer, _, fewer_gradient = contrastive(tokens, membership[:, [0, 2]], prototypes[[0, 2]])
    torch.testing.assert_close(loss, fewer, **FLOAT64)
    torch.testing.assert_close(gradient[[0, 2]], fewer_gradient, **FLOAT64)
    assert torch.equal(gradient[[1, 3]], torch.zeros(2, 8, dtype=torch.float64))


def test_rcl_token_outside_every_centroid_gets_no_gradient() -> None:
    _, gradient, _ = contrastive(
        random_tensor(3, 8), members([[0], [], [1]], 2), random_tensor(2, 8, seed=1)
    )
    assert torch.equal(gradient[1], torch.zeros(8))
    assert gradient[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rcl_zero_tokens_have_finite_gradients(dtype: torch.dtype) -> None:
    tokens = random_tensor(4, 8, dtype=dtype)
    tokens[:2] = 0  # the whole centroid of expert 0 is zero
    loss, *gradients = contrastive(
        tokens, members([[0], [0], [1], [2]], 3), random_tensor(3, 8, seed=1, dtype=dtype)
    )
    assert loss.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_rcl_bf16_input_is_computed_in_fp32(autocast: bool) -> None:
    tokens, prototypes = (
        random_tensor(6, 16, dtype=torch.bfloat16),
        random_tensor(3, 16, seed=1, dtype=torch.bfloat16),
    )
    membership = members([[0], [1], [2], [0], [1], [2]], 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = routing_contrastive_loss(tokens, membership, prototypes, TAU)
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, routing_contrastive_loss(tokens.float(), membership, prototypes.float(), TAU)
    )


def test_rcl_gradient_is_that_of_finite_differences() -> None:
    tokens = random_tensor(5, 4, dtype=torch.float64).requires_grad_()
    prototypes = random_tensor(3, 4, seed=1, dtype=torch.float64).requires_grad_()
    membership = members([[0], [1], [0, 1], [], [1]], 3).double()
    assert torch.autograd.gradcheck(
        lambda t, p: routing_contrastive_loss(t, membership, p, 0.5), (tokens, prototypes)
    )


def test_rcl_reduce_sum_is_called_once_with_sums_and_counts() -> None:
    seen = []

    def record(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    tokens = random_tensor(3, 4)
    routing_contrastive_loss(
        tokens, members([[0], [2], [2]], 3), random_tensor(3, 4, seed=1), TAU, record
    )
    assert len(seen) == 1
    assert seen[0].shape == (3, 5)
    assert seen[0][:, -1].tolist() == [1, 0, 2]


@given(first=st.integers(0, 6), second=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_rcl_two_halves_with_summing_reduce_sum_equal_the_whole_batch(
    first: int, second: int, seed: int
) -> None:
    tokens = random_tensor(first + second, 4, seed=seed, dtype=torch.float64)
    prototypes = random_tensor(3, 4, seed=seed + 1, dtype=torch.float64)
    membership = (
        torch.rand(first + second, 3, generator=torch.Generator().manual_seed(seed)) < 0.4
    ).double()
    halves = [(tokens[:first], membership[:first]), (tokens[first:], membership[first:])]
    partial: list[Tensor] = []
    for half in halves:
        contrastive(*half, prototypes, reduce_sum=_recorder(partial))
    whole, token_gradient, prototype_gradient = contrastive(tokens, membership, prototypes)
    results = [
        contrastive(*half, prototypes, reduce_sum=_adder(partial[1 - rank]))
        for rank, half in enumerate(halves)
    ]
    for loss, _, gradient in results:
        torch.testing.assert_close(loss, whole, **FLOAT64)
        # Each rank computes the whole loss, hence the prototypes' whole gradient; averaging the
        # ranks keeps it.
        torch.testing.assert_close(gradient, prototype_gradient, **FLOAT64)
    torch.testing.assert_close(
        torch.cat([gradient for _, gradient, _ in results]), token_gradient, **FLOAT64
    )


def _recorder(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def record(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    return record


def _adder(other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor + other


# Load balancing.


@given(
    samples=st.integers(1, 4),
    tokens=st.integers(1, 4),
    experts=st.integers(1, 4),
    level=st.sampled_from(["batch", "sample"]),
    probabilities=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_balance_any_routing_equals_oracle(
    samples: int,
    tokens: int,
    experts: int,
    level: str,
    probabilities: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, experts))
    is_routed = data.draw(st.lists(st.booleans(), min_size=samples, max_size=samples))
    scores = random_tensor(samples, tokens, experts, seed=seed, dtype=torch.float64)
    scores = scores.softmax(dim=-1) if probabilities else scores
    chosen = torch.nn.functional.one_hot(scores.topk(top_k).indices, experts).sum(dim=(1, 2))
    counts = chosen * torch.tensor(is_routed)[:, None]
    loss = load_balance_loss(
        scores,
        counts,
        torch.tensor(is_routed),
        top_k=top_k,
        level=level,
        scores_are_probabilities=probabilities,
    )
    expected = oracles.balance_loss(
        scores.tolist(),
        counts.tolist(),
        is_routed,
        top_k=top_k,
        level=level,
        scores_are_probabilities=probabilities,
    )
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), **FLOAT64)


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_balance_even_load_is_one(level: str) -> None:
    counts = torch.full((2, 4), 2)
    loss = load_balance_loss(
        torch.zeros(2, 8, 4),
        counts,
        torch.tensor([True, True]),
        top_k=1,
        level=level,
        scores_are_probabilities=False,
    )
    assert loss == 1


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_balance_all_tokens_on_one_expert_is_the_number_of_experts(level: str) -> None:
    scores = torch.zeros(2, 8, 4)
    scores[..., 3] = 1.0
    loss = load_balance_loss(
        scores,
        torch.tensor([[0, 0, 0, 8]] * 2),
        torch.tensor([True, True]),
        top_k=1,
        level=level,
        scores_are_probabilities=True,
    )
    assert loss == 4


def test_balance_levels_differ_when_samples_compensate_each_other() -> None:
    # Each sample uses one expert, the batch uses both evenly.
    scores = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    counts, routed = torch.tensor([[1, 0], [0, 1]]), torch.tensor([True, True])
    levels = {
        level: (
            load_balance_loss(
                scores, counts, routed, top_k=1, level=level, scores_are_probabilities=True
            ).item()
        )
        for level in ("batch", "sample")
    }
    assert levels == {"batch": 1.0, "sample": 2.0}


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_balance_all_unconditional_is_zero_with_finite_gradient(level: str) -> None:
    scores = random_tensor(2, 3, 4).requires_grad_()
    loss = load_balance_loss(
        scores,
        torch.zeros(2, 4, dtype=torch.int64),
        torch.tensor([False, False]),
        top_k=1,
        level=level,
        scores_are_probabilities=False,
    )
    loss.backward()
    assert loss == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_balance_unrouted_sample_plays_no_part(level: str) -> None:
    scores = random_tensor(3, 4, 2, dtype=torch.float64).requires_grad_()
    counts = torch.tensor([[3, 1], [0, 0], [2, 2]])
    settings = {"top_k": 1, "level": level, "scores_are_probabilities": False}
    loss = load_balance_loss(scores, counts, torch.tensor([True, False, True]), **settings)
    loss.backward()
    alone = load_balance_loss(
        scores[[0, 2]], counts[[0, 2]], torch.tensor([True, True]), **settings
    )
    torch.testing.assert_close(loss, alone, **FLOAT64)
    assert torch.equal(scores.grad[1], torch.zeros(4, 2, dtype=torch.float64))
    assert scores.grad[0].abs().sum() > 0
