"""Step 2: cosine and linear scores and their activation, in fp32 whatever comes in."""

from __future__ import annotations

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


def test_scores_do_not_depend_on_lengths() -> None:
    tokens, prototypes = random_tensor(4, 8), random_tensor(3, 8, seed=1)
    # Powers of two change exponents only: equal to the last bit.
    assert torch.equal(
        cosine_scores(tokens * 16, prototypes / 8), cosine_scores(tokens, prototypes)
    )


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (8,)])
def test_scores_keep_leading_shape(shape: tuple[int, ...]) -> None:
    assert cosine_scores(random_tensor(*shape), random_tensor(5, 8)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize(
    ("tokens_dtype", "prototypes_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_scores_dtype_is_at_least_fp32(
    tokens_dtype: torch.dtype, prototypes_dtype: torch.dtype, expected: torch.dtype
) -> None:
    scores = cosine_scores(
        random_tensor(2, 8, dtype=tokens_dtype), random_tensor(3, 8, dtype=prototypes_dtype)
    )
    assert scores.dtype == expected


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_bf16_tokens_equal_those_of_the_same_numbers_in_fp32(autocast: bool) -> None:
    tokens, prototypes = (
        random_tensor(6, 16, dtype=torch.bfloat16),
        random_tensor(4, 16, seed=1, dtype=torch.bfloat16),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = cosine_scores(tokens, prototypes)
    assert torch.equal(scores, cosine_scores(tokens.float(), prototypes.float()))


def test_scores_fp32_tokens_are_not_rounded_by_autocast() -> None:
    tokens, prototypes = random_tensor(6, 16), random_tensor(4, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = cosine_scores(tokens, prototypes)
    assert torch.equal(scores, cosine_scores(tokens, prototypes))


def gradients(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    tokens, prototypes = tokens.clone().requires_grad_(), prototypes.clone().requires_grad_()
    scores = cosine_scores(tokens, prototypes)
    (scores * random_tensor(*scores.shape, seed=9)).sum().backward()
    return tokens.grad, prototypes.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_zero_token_scores_zero_with_finite_gradients(dtype: torch.dtype) -> None:
    tokens = random_tensor(3, 8, dtype=dtype)
    tokens[1] = 0
    prototypes = random_tensor(4, 8, seed=1, dtype=dtype)
    assert torch.equal(cosine_scores(tokens, prototypes)[1], torch.zeros(4))
    for gradient in gradients(tokens, prototypes):
        assert gradient.isfinite().all()


def test_scores_zero_prototype_scores_zero_with_finite_gradients() -> None:
    prototypes = random_tensor(4, 8, seed=1)
    prototypes[2] = 0
    tokens = random_tensor(3, 8)
    assert torch.equal(cosine_scores(tokens, prototypes)[:, 2], torch.zeros(3))
    for gradient in gradients(tokens, prototypes):
        assert gradient.isfinite().all()


def test_scores_gradient_is_that_of_finite_differences() -> None:
    tokens = random_tensor(3, 4, dtype=torch.float64).requires_grad_()
    prototypes = random_tensor(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, p: cosine_scores(t, p, 2.0), (tokens, prototypes))


def test_activate_identity_returns_the_scores_themselves() -> None:
    scores = random_tensor(2, 3)
    assert activate(scores, "identity") is scores


def test_activate_softmax_sums_to_one_over_experts() -> None:
    torch.testing.assert_close(
        activate(random_tensor(2, 5, 3), "softmax").sum(dim=-1), torch.ones(2, 5)
    )


def test_activate_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="activation 'relu' is none of identity, sigmoid, softmax"):
        activate(random_tensor(2, 3), "relu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_fp32_widens_but_never_narrows(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert at_least_fp32(torch.ones(2, dtype=dtype)).dtype == expected


# Linear scores.


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


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (8,)])
def test_linear_scores_keep_leading_shape(shape: tuple[int, ...]) -> None:
    assert linear_scores(random_tensor(*shape), random_tensor(5, 8)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize(
    ("tokens_dtype", "weight_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_scores_are_computed_in_at_least_fp32(
    tokens_dtype: torch.dtype, weight_dtype: torch.dtype, expected: torch.dtype, autocast: bool
) -> None:
    tokens, weight = (
        random_tensor(6, 16, dtype=tokens_dtype),
        random_tensor(4, 16, seed=1, dtype=weight_dtype),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = linear_scores(tokens, weight)
    assert scores.dtype == expected
    assert torch.equal(scores, tokens.to(expected) @ weight.to(expected).T)


def test_linear_scores_gradient_is_that_of_finite_differences() -> None:
    tokens = random_tensor(3, 4, dtype=torch.float64).requires_grad_()
    weight = random_tensor(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear_scores, (tokens, weight))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_activate_softmax_runs_over_the_dimension_asked_for(dim: int) -> None:
    scores = random_tensor(2, 3, 4)
    found = activate(scores, "softmax", dim=dim)
    torch.testing.assert_close(found.sum(dim=dim), torch.ones_like(found.sum(dim=dim)))
    torch.testing.assert_close(found, activate(scores.movedim(dim, -1), "softmax").movedim(-1, dim))


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_activate_elementwise_does_not_depend_on_the_dimension(activation: str) -> None:
    scores = random_tensor(2, 3, 4)
    assert torch.equal(activate(scores, activation, dim=0), activate(scores, activation))
