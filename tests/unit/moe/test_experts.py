"""Feed-forwards and stacked experts of both types: grouped GEMM against the loop, both against
plain torch operations.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promoe_ds.errors import ConfigError
from promoe_ds.model import build_model, initialise
from promoe_ds.moe import FeedForward, StackedExperts
from promoe_ds.moe.experts import EXPERT_PARAMETERS, FEED_FORWARDS, GatedFeedForward, expert_shapes

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
    experts: StackedExperts, counts: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return output and all gradients of a weighted sum."""
    rows = random_tensor(sum(counts), WIDTH, seed=1, dtype=dtype).requires_grad_()
    experts.zero_grad()
    output = experts(rows, torch.tensor(counts))
    (output * random_tensor(*output.shape, seed=2, dtype=dtype)).sum().backward()
    return {
        "output": output.detach(),
        "rows": rows.grad,
        **{name: p.grad for name, p in experts.named_parameters()},
    }


def plain(experts: StackedExperts, rows_RD: Tensor, counts: list[int]) -> Tensor:
    """Return every expert's output on its rows, by operations that autograd knows."""
    parts = []
    for expert, x in enumerate(rows_RD.split(counts)):
        p = {
            name: getattr(experts, name)[expert] for name in EXPERT_PARAMETERS[experts.expert_type]
        }
        if experts.expert_type == "swiglu":
            gate = x @ p["gate_weight"].T
            parts.append((gate * torch.sigmoid(gate) * (x @ p["up_weight"].T)) @ p["down_weight"].T)
        else:
            hidden = torch.nn.functional.gelu(
                x @ p["up_weight"].T + p["up_bias"], approximate="tanh"
            )
            parts.append(hidden @ p["down_weight"].T + p["down_bias"])
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
def test_experts_equal_plain_operations_in_output_and_gradients(
    expert_type: str, counts: list[int], backend: str, dtype: torch.dtype, atol: float
) -> None:
    experts = make_experts(backend, expert_type).to(dtype)
    found = run(experts, counts, dtype)
    rows = random_tensor(sum(counts), WIDTH, seed=1, dtype=dtype).requires_grad_()
    experts.zero_grad()
    output = plain(experts, rows, counts)
    (output * random_tensor(*output.shape, seed=2, dtype=dtype)).sum().backward()
    expected = {
        "output": output,
        "rows": rows.grad,
        **{name: p.grad for name, p in experts.named_parameters()},
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The same products, summed in another order.
        torch.testing.assert_close(
            found[name], value, rtol=atol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@every_type
@every_count
def test_experts_grouped_mm_equals_loop_in_output_and_gradients(
    expert_type: str, counts: list[int]
) -> None:
    grouped, loop = (
        run(make_experts("grouped_mm", expert_type), counts),
        run(make_experts("loop", expert_type), counts),
    )
    assert grouped.keys() == loop.keys()
    for name, value in loop.items():
        torch.testing.assert_close(
            grouped[name], value, **FLOAT32, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@every_type
@every_count
def test_experts_gradient_of_expert_without_tokens_is_zero_not_none(
    expert_type: str, backend: str, counts: list[int]
) -> None:
    gradients = run(make_experts(backend, expert_type), counts)
    for name in EXPERT_PARAMETERS[expert_type]:
        for expert, count in enumerate(counts):
            assert bool(gradients[name][expert].any()) == (count > 0), f"{name} of expert {expert}"


@every_type
@every_count
def test_experts_loop_equals_one_feed_forward_each(expert_type: str, counts: list[int]) -> None:
    experts = make_experts("loop", expert_type)
    rows = random_tensor(sum(counts), WIDTH, seed=1)
    parts = []
    for expert, part in enumerate(rows.split(counts)):
        single = FEED_FORWARDS[expert_type](WIDTH, HIDDEN)
        single.load_state_dict(
            {name.replace("_", "."): weight[expert] for name, weight in experts.named_parameters()}
        )
        parts.append(single(part))
    # The same products, but adding the bias before or after a rounding.
    torch.testing.assert_close(
        experts(rows, torch.tensor(counts)), torch.cat(parts), rtol=1e-5, atol=1e-6
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
def test_experts_gradient_is_that_of_finite_differences(expert_type: str) -> None:
    experts = make_experts("loop", expert_type).double()
    names = [name for name, _ in experts.named_parameters()]
    rows = random_tensor(4, WIDTH, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda rows_RD, *values: torch.func.functional_call(
            experts, dict(zip(names, values, strict=True)), (rows_RD, torch.tensor([1, 0, 2, 1]))
        ),
        (rows, *experts.parameters()),
    )


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


def test_experts_do_not_change_their_input() -> None:
    rows = random_tensor(4, WIDTH)
    before = rows.clone()
    make_experts("grouped_mm")(rows, torch.tensor([1, 0, 2, 1]))
    assert torch.equal(rows, before)


def test_experts_first_expert_does_not_change_the_computation() -> None:
    experts = make_experts("grouped_mm")
    rows, counts = random_tensor(4, WIDTH), torch.tensor([1, 1, 1, 1])
    before = experts(rows, counts)
    experts.first_expert = 8
    assert torch.equal(experts(rows, counts), before)
    assert experts.num_local_experts == 4


def test_experts_unknown_backend_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match="expert backend 'cuda' is none of grouped_mm, loop"):
        StackedExperts(2, WIDTH, HIDDEN, backend="cuda")
    with pytest.raises(ValueError, match="expert type 'relu' is none of gelu, swiglu"):
        StackedExperts(2, WIDTH, HIDDEN, expert_type="relu")


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
    assert small_config(routing={"expert_width": 8}).expert_backend == "grouped_mm"
    network = build_model(config)
    initialise(network, 0)
    assert network(random_tensor(1, 1, 4, 4), torch.tensor([1.0]), torch.tensor([0])).shape == (
        1,
        2,
        4,
        4,
    )


def test_feed_forward_of_double_width_is_the_sum_of_two() -> None:
    first, second = (randomise(FeedForward(WIDTH, HIDDEN).double(), seed) for seed in (1, 2))
    both = FeedForward(WIDTH, 2 * HIDDEN).double()
    with torch.no_grad():
        both.up.weight.copy_(torch.cat([first.up.weight, second.up.weight]))
        both.up.bias.copy_(torch.cat([first.up.bias, second.up.bias]))
        both.down.weight.copy_(torch.cat([first.down.weight, second.down.weight], dim=1))
        both.down.bias.copy_(first.down.bias + second.down.bias)
    x = random_tensor(5, WIDTH, dtype=torch.float64)
    # The same products, summed in another order.
    torch.testing.assert_close(both(x), first(x) + second(x), rtol=1e-12, atol=1e-12)


def test_gated_feed_forward_of_double_width_is_the_sum_of_two() -> None:
    first, second = (randomise(GatedFeedForward(WIDTH, HIDDEN).double(), seed) for seed in (1, 2))
    both = GatedFeedForward(WIDTH, 2 * HIDDEN).double()
    both.load_state_dict(
        {
            name: torch.cat([value, second.state_dict()[name]], dim=int(name.startswith("down")))
            for name, value in first.state_dict().items()
        }
    )
    x = random_tensor(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(both(x), first(x) + second(x), rtol=1e-12, atol=1e-12)  # as above


def test_gated_feed_forward_by_hand() -> None:
    module = GatedFeedForward(1, 2)
    module.load_state_dict(
        {
            "gate.weight": torch.tensor([[2.0], [-1.0]]),
            "up.weight": torch.tensor([[3.0], [0.5]]),
            "down.weight": torch.tensor([[1.0, 10.0]]),
        }
    )
    silu = [2.0 / (1 + math.exp(-2.0)), -1.0 / (1 + math.exp(1.0))]
    assert module(torch.tensor([[1.0]])).item() == pytest.approx(
        silu[0] * 3.0 + 10.0 * silu[1] * 0.5
    )


@every_type
def test_feed_forward_no_rows_gives_zero_gradients(expert_type: str) -> None:
    module = randomise(FEED_FORWARDS[expert_type](WIDTH, HIDDEN))
    output = module(torch.zeros(0, WIDTH))
    assert output.shape == (0, WIDTH)
    output.sum().backward()
    for parameter in module.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
