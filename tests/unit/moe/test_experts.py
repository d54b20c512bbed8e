"""Stacked experts of both types and backends compared with one feed-forward each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promoe_ds.errors import ConfigError
from promoe_ds.model import build_model, initialise
from promoe_ds.moe import StackedExperts
from promoe_ds.moe.experts import EXPERT_PARAMETERS, FEED_FORWARDS, expert_shapes

from ..builders import random_tensor, randomise, small_config

WIDTH, HIDDEN = 8, 12
COUNTS = {
    "even": [3, 3, 3, 3],
    "an expert without tokens": [4, 0, 5, 1],
    "all tokens on one expert": [0, 0, 11, 0],
    "first and last without tokens": [0, 7, 2, 0],
    "skewed": [1, 60, 2, 1],
    "one row": [0, 1, 0, 0],
    "no rows": [0, 0, 0, 0],
}
#: The two backends add the same products in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


every_type = pytest.mark.parametrize("expert_type", FEED_FORWARDS)
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())


def make_experts(backend: str, expert_type: str = "gelu", seed: int = 0) -> StackedExperts:
    return randomise(
        StackedExperts(4, WIDTH, HIDDEN, expert_type=expert_type, backend=backend), seed
    )


def run(
    experts: StackedExperts,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    one_by_one: bool = False,
) -> dict[str, Tensor]:
    """Return output and all gradients of a weighted sum."""
    rows = random_tensor(sum(counts), WIDTH, seed=1, dtype=dtype).requires_grad_()
    experts.zero_grad()
    if one_by_one:
        output = feed_forwards(experts, rows, counts)
    else:
        output = experts(rows, torch.tensor(counts))
    (output * random_tensor(*output.shape, seed=2, dtype=dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "rows": rows.grad, **gradients}


def feed_forwards(experts: StackedExperts, rows_RD: Tensor, counts: list[int]) -> Tensor:
    """Return every expert's output on its rows, by one feed-forward each that autograd knows."""
    single, parts = FEED_FORWARDS[experts.expert_type](WIDTH, HIDDEN), []
    for expert, rows in enumerate(rows_RD.split(counts)):
        state = {
            name.replace("_", "."): value[expert] for name, value in experts.named_parameters()
        }
        parts.append(torch.func.functional_call(single, state, (rows,)))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("backend", "dtype", "atol"),
    [
        ("loop", torch.float64, 1e-13),
        ("loop", torch.float32, 1e-5),
        ("grouped_mm", torch.float32, 1e-5),
    ],
)
@every_type
@every_count
def test_experts_equal_one_feed_forward_each_in_output_and_gradients(
    expert_type: str, counts: list[int], backend: str, dtype: torch.dtype, atol: float
) -> None:
    """Gradients of an expert without rows are zeros, not None."""
    experts = make_experts(backend, expert_type).to(dtype)
    found, expected = run(experts, counts, dtype), run(experts, counts, dtype, one_by_one=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The same products, summed in another order.
        torch.testing.assert_close(
            found[name], value, rtol=atol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@every_type
def test_experts_bf16_is_near_fp32_in_output_and_gradients(expert_type: str, backend: str) -> None:
    exact, half = (
        randomise(StackedExperts(4, WIDTH, 16, expert_type=expert_type, backend=backend))
        for _ in range(2)
    )
    expected, found = run(exact, [4, 0, 5, 1]), run(half.bfloat16(), [4, 0, 5, 1], torch.bfloat16)
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        # bf16 keeps 8 bits: some roundings of half a percent of the largest number.
        atol = 0.03 * value.abs().max().item()
        torch.testing.assert_close(
            found[name].float(),
            value,
            rtol=0.03,
            atol=atol,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@every_type
def test_experts_grouped_mm_takes_the_expanded_gradient_of_a_plain_sum(expert_type: str) -> None:
    gradients = []
    for backend in ("grouped_mm", "loop"):
        experts = make_experts(backend, expert_type)
        experts(random_tensor(4, WIDTH), torch.tensor([1, 0, 2, 1])).sum().backward()
        gradients.append([parameter.grad for parameter in experts.parameters()])
    for grouped, loop in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, loop, **FLOAT32)


@every_type
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_experts_take_a_transposed_gradient(expert_type: str, backend: str) -> None:
    weights, gradients = random_tensor(WIDTH, 10, seed=2), []
    for transposed in (weights.T, weights.T.contiguous()):
        experts, rows = (
            make_experts(backend, expert_type),
            random_tensor(10, WIDTH, seed=1).requires_grad_(),
        )
        experts(rows, torch.tensor([4, 0, 5, 1])).backward(transposed)
        gradients.append([rows.grad, *(parameter.grad for parameter in experts.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@every_type
def test_experts_rows_that_need_no_gradient_still_train_the_experts(expert_type: str) -> None:
    needed, unneeded = (
        make_experts("grouped_mm", expert_type),
        make_experts("grouped_mm", expert_type),
    )
    counts = torch.tensor([1, 0, 2, 1])
    needed(random_tensor(4, WIDTH).requires_grad_(), counts).square().sum().backward()
    unneeded(random_tensor(4, WIDTH), counts).square().sum().backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(needed.parameters(), unneeded.parameters(), strict=True)
    )


@every_type
def test_expert_shapes_are_those_of_one_feed_forward(expert_type: str) -> None:
    single = FEED_FORWARDS[expert_type](WIDTH, HIDDEN)
    expected = {
        name.replace(".", "_"): tuple(parameter.shape)
        for name, parameter in single.named_parameters()
    }
    assert expert_shapes(expert_type, WIDTH, HIDDEN) == expected
    assert tuple(expected) == EXPERT_PARAMETERS[expert_type]


def test_experts_width_that_grouped_mm_cannot_take_is_refused_or_looped() -> None:
    """Rows of 16 bytes are what grouped GEMM wants; a width that it cannot take is known before the
    first step.
    """
    with pytest.raises(ConfigError, match="must be multiples of 8; change them or use loop"):
        small_config(routing={"expert_width": 6}, parallel={"expert_backend": "grouped_mm"})
    config = small_config(routing={"expert_width": 6})
    assert config.expert_backend == "loop"
    assert small_config(routing={"expert_width": 8}).expert_backend == "auto"
    network = build_model(config)
    initialise(network, 0)
    assert network(random_tensor(1, 1, 4, 4), torch.tensor([1.0]), torch.tensor([0])).shape == (
        1,
        2,
        4,
        4,
    )


@every_type
def test_feed_forward_of_double_width_is_the_sum_of_two(expert_type: str) -> None:
    kind = FEED_FORWARDS[expert_type]
    first, second = (randomise(kind(WIDTH, HIDDEN).double(), seed) for seed in (1, 2))
    both, other = kind(WIDTH, 2 * HIDDEN).double(), second.state_dict()
    both.load_state_dict(
        {
            name: (
                value + other[name]
                if name == "down.bias"
                else torch.cat([value, other[name]], dim=int(name == "down.weight"))
            )
            for name, value in first.state_dict().items()
        }
    )
    x = random_tensor(5, WIDTH, dtype=torch.float64)
    # The same products, summed in another order.
    torch.testing.assert_close(both(x), first(x) + second(x), rtol=1e-12, atol=1e-12)


@every_type
def test_feed_forward_no_rows_gives_zero_gradients(expert_type: str) -> None:
    module = randomise(FEED_FORWARDS[expert_type](WIDTH, HIDDEN))
    output = module(torch.zeros(0, WIDTH))
    assert output.shape == (0, WIDTH)
    output.sum().backward()
    for parameter in module.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
