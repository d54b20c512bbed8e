"""Contrastive losses (Eq. 6) and load balancing: by hand, at their edges, on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing.losses import (
    expert_choice_contrastive_loss,
    load_balance_loss,
    routing_contrastive_loss,
)

from ..builders import random_tensor
from . import oracles
from .plans import NEAR

TAU = 0.07
#: Sums in another order.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def with_gradients(
    loss: Callable[..., Tensor], tokens: Tensor, chosen: Tensor, prototypes: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a contrastive loss and its gradients on tokens and prototypes."""
    tokens, prototypes = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
    value = loss(tokens, chosen, prototypes, TAU, **kwargs)
    value.backward()
    return value.detach(), tokens.grad, prototypes.grad


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
    membership = random_membership(tokens, experts, density, seed)
    loss = routing_contrastive_loss(tokens_TD, membership.double(), prototypes_ED, temperature)
    expected = oracles.contrastive_loss(
        tokens_TD.tolist(), membership.tolist(), prototypes_ED.tolist(), temperature
    )
    assert loss.item() == pytest.approx(expected, **NEAR)


def random_membership(tokens: int, experts: int, density: float, seed: int) -> Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize(
    ("loss", "tokens", "chosen"),
    [
        (routing_contrastive_loss, torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(2)),
        (
            expert_choice_contrastive_loss,
            torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]),
            torch.tensor([[[0], [1]]]),
        ),
    ],
    ids=["token choice", "expert choice"],
)
def test_contrast_by_hand(loss: Callable[..., Tensor], tokens: Tensor, chosen: Tensor) -> None:
    # Each prototype has cosine 1 with its own centroid and 0 with the other: log(1 + e^-1).
    value = loss(tokens, chosen, torch.tensor([[1.0, 0.0], [0.0, 5.0]]), temperature=1.0)
    torch.testing.assert_close(value, torch.log(1 + torch.exp(torch.tensor(-1.0))))


@pytest.mark.parametrize("members", [[[], [], []], [[2], [2], [2]], [[], [0], []]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rcl_fewer_than_two_active_is_exactly_zero_without_gradient(
    members: list[list[int]], dtype: torch.dtype
) -> None:
    membership = torch.tensor([[expert in one for expert in range(4)] for one in members])
    loss, *gradients = with_gradients(
        routing_contrastive_loss,
        random_tensor(3, 8, dtype=dtype),
        membership,
        random_tensor(4, 8, seed=1, dtype=dtype),
    )
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("loss", "whole_on_every_rank"),
    [(routing_contrastive_loss, True), (expert_choice_contrastive_loss, False)],
    ids=["token choice", "expert choice"],
)
@given(first=st.integers(0, 3), second=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_contrast_of_two_uneven_ranks_equals_that_of_the_whole_batch(
    loss: Callable[..., Tensor], whole_on_every_rank: bool, first: int, second: int, seed: int
) -> None:
    """Per token, each rank computes the whole loss and the prototypes' whole gradient, which an
    average keeps; per sample, each row counts once and the ranks' gradients add up.
    """
    samples = first + second
    tokens = random_tensor(samples, 4, 3, seed=seed, dtype=torch.float64)
    prototypes = random_tensor(3, 3, seed=seed + 1, dtype=torch.float64)
    chosen = random_tensor(samples, 3, 4, seed=seed + 2).argsort(dim=-1)[..., :2]
    if loss is routing_contrastive_loss:
        tokens, chosen = tokens[:, 0], random_membership(samples, 3, 0.4, seed).double()
    halves = [(tokens[:first], chosen[:first]), (tokens[first:], chosen[first:])]
    partial: list[Tensor] = []
    for half in halves:
        with_gradients(
            loss,
            *half,
            prototypes,
            reduce_sum=lambda tensor: partial.append(tensor.detach().clone()) or tensor,
        )
    whole, token_gradient, prototype_gradient = with_gradients(loss, tokens, chosen, prototypes)
    values, token_gradients, prototype_gradients = zip(
        *(
            with_gradients(
                loss, *half, prototypes, reduce_sum=lambda tensor, other=other: tensor + other
            )
            for half, other in zip(halves, reversed(partial), strict=True)
        ),
        strict=True,
    )
    for value in values:
        torch.testing.assert_close(value, whole, **FLOAT64)
    torch.testing.assert_close(torch.cat(token_gradients), token_gradient, **FLOAT64)
    total = prototype_gradients[0] + prototype_gradients[1]
    expected = prototype_gradient * (2 if whole_on_every_rank else 1)
    torch.testing.assert_close(total, expected, **FLOAT64)


# Load balancing.


@pytest.mark.parametrize("level", ["batch", "sample"])
@pytest.mark.parametrize(("counts", "expected"), [([2, 2, 2, 2], 1), ([0, 0, 0, 8], 4)])
def test_balance_is_one_for_even_load_and_e_for_a_single_expert(
    level: str, counts: list[int], expected: int
) -> None:
    probabilities = torch.tensor(counts).expand(2, 8, 4) / 8
    loss = load_balance_loss(
        probabilities,
        torch.tensor([counts] * 2),
        torch.tensor([True, True]),
        top_k=1,
        level=level,
        scores_are_probabilities=True,
    )
    assert loss == expected


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
