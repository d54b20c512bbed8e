"""Step 2: cosine and linear scores and their activation, in fp32 whatever comes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing.scores import activate, at_least_fp32, cosine_scores, linear_scores

from ..builders import random_tensor
from . import oracles

#: Sums in another order than the oracle's.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
ACTIVATIONS = ("identity", "sigmoid", "softmax")


@given(
    tokens=st.integers(1, 6),
    width=st.integers(1, 5),
    experts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.5, 1.0, 10.0]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_scores_any_sizes_equal_oracle(
    tokens: int, width: int, experts: int, seed: int, scale: float, activation: str
) -> None:
    tokens_TD = random_tensor(tokens, width, seed=seed, dtype=torch.float64)
    prototypes_ED = random_tensor(experts, width, seed=seed + 1, dtype=torch.float64)
    scores = activate(cosine_scores(tokens_TD, prototypes_ED, scale), activation)
    expected = [
        oracles.scores(token, prototypes_ED.tolist(), scale, activation)
        for token in tokens_TD.tolist()
    ]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), **FLOAT64)


def test_scores_by_hand() -> None:
    tokens = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    prototypes = torch.tensor([[5.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8, -0.6], [0.0, -1.0, 0.0]])
    torch.testing.assert_close(
        cosine_scores(tokens, prototypes), expected, rtol=0, atol=1e-7
    )  # 0.6 is no binary number


each_score = pytest.mark.parametrize("score", [cosine_scores, linear_scores])


@each_score
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("tokens_dtype", "weight_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_scores_are_those_of_the_same_numbers_in_at_least_fp32(
    score: Callable[[Tensor, Tensor], Tensor],
    tokens_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    expected: torch.dtype,
    autocast: bool,
) -> None:
    tokens = random_tensor(6, 16, dtype=tokens_dtype)
    weight = random_tensor(4, 16, seed=1, dtype=weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = score(tokens, weight)
    assert scores.dtype == at_least_fp32(tokens).dtype == expected
    # Cosines normalise their prototypes in fp32, whatever the tokens are.
    exact = weight.float() if score is cosine_scores else weight.to(expected)
    assert torch.equal(scores, score(tokens.to(expected), exact))


@each_score
def test_scores_gradient_is_that_of_finite_differences(
    score: Callable[[Tensor, Tensor], Tensor],
) -> None:
    tokens = random_tensor(3, 4, dtype=torch.float64).requires_grad_()
    weight = random_tensor(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(score, (tokens, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_zero_vectors_are_zero_with_finite_gradients(dtype: torch.dtype) -> None:
    tokens, prototypes = random_tensor(3, 8, dtype=dtype), random_tensor(4, 8, seed=1, dtype=dtype)
    tokens[1], prototypes[2] = 0, 0
    for vectors in (tokens, prototypes):
        vectors.requires_grad_()
    scores = cosine_scores(tokens, prototypes)
    assert not scores[1].any() and not scores[:, 2].any()
    (scores * random_tensor(3, 4, seed=9)).sum().backward()
    assert tokens.grad.isfinite().all() and prototypes.grad.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate_runs_over_the_dimension_asked_for(activation: str, dim: int) -> None:
    scores = random_tensor(2, 3, 4)
    found = activate(scores, activation, dim=dim)
    torch.testing.assert_close(
        found, activate(scores.movedim(dim, -1), activation).movedim(-1, dim)
    )
    if activation == "softmax":
        torch.testing.assert_close(found.sum(dim=dim), torch.ones_like(found.sum(dim=dim)))


@given(
    tokens=st.integers(0, 6),
    width=st.integers(1, 5),
    experts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_linear_scores_any_sizes_equal_oracle(
    tokens: int, width: int, experts: int, seed: int
) -> None:
    tokens_TD = random_tensor(tokens, width, seed=seed, dtype=torch.float64)
    weight = random_tensor(experts, width, seed=seed + 1, dtype=torch.float64)
    expected = [oracles.linear(token, weight.tolist()) for token in tokens_TD.tolist()]
    torch.testing.assert_close(
        linear_scores(tokens_TD, weight),
        torch.tensor(expected, dtype=torch.float64).view(tokens, experts),
        **FLOAT64,
    )
