"""Triton's programs, in its interpreter where there is no GPU, against plain torch operations."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs triton: pip install triton")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from promoe_ds.kernels import expert_ops, ops, update_ops
from promoe_ds.moe.dispatch import add_weighted_rows
from promoe_ds.routing.assignment import Assignment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: One rounding to the dtype of the result, where the eager code may round once, too.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}
every_dtype = pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype)[6:])
#: Tokens, width, experts, rows a token; the last expert and some tokens are without rows.
SIZES = [(1, 24, 2, 1), (37, 72, 4, 1), (20, 40, 5, 2), (19, 136, 5, 3)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def _assignment(size: tuple[int, int, int, int]) -> Assignment:
    """K experts of each token but every fifth; none chooses the last expert."""
    num_tokens, _, experts, top_k = size
    generator = torch.Generator().manual_seed(1)
    routed = [token for token in range(num_tokens) if token % 5 != 3]
    choices = torch.rand(len(routed), experts - 1, generator=generator).argsort(dim=1)
    pairs = sorted(
        (int(e), t) for t, row in zip(routed, choices[:, :top_k], strict=True) for e in row
    )
    counts = torch.bincount(torch.tensor([e for e, _ in pairs]), minlength=experts)
    return Assignment(
        token_ids_N=torch.tensor([t for _, t in pairs], device=DEVICE),
        gates_N=_draw(len(pairs), seed=2),
        tokens_per_expert_E=counts.to(DEVICE),
    )


def _gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = _draw(*output.shape, seed=9, dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def _same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, index
        scale = max([1.0, *other.float().abs().flatten().tolist()])
        torch.testing.assert_close(
            one.float() / scale,
            other.float() / scale,
            **CLOSE[dtype],
            msg=lambda t, i=index: f"{i}: {t}",
        )


@every_dtype
@every_size
def test_combine_adds_weighted_rows(size, dtype) -> None:
    assignment, (num_tokens, width, _, _) = _assignment(size), size
    places = ops.rows_of_tokens(assignment.token_ids_N, num_tokens)
    results = []
    for fused in (True, False):
        base = _draw(num_tokens, width, seed=3, dtype=dtype).requires_grad_()
        rows = _draw(len(assignment.gates_N), width, seed=4, dtype=dtype).requires_grad_()
        gates = assignment.gates_N.clone().requires_grad_()
        if fused:
            output = ops.combine(base, rows, gates, assignment.token_ids_N, places)
        else:
            own = Assignment(assignment.token_ids_N, gates, assignment.tokens_per_expert_E)
            output = add_weighted_rows(base.clone(), rows, own)
        results.append(_gradients(output, base, rows, gates))
    _same(*results, dtype)


@every_dtype
@every_size
def test_select_rows_sums_a_token_s_gradients(size, dtype) -> None:
    assignment, (num_tokens, width, _, _) = _assignment(size), size
    places = ops.rows_of_tokens(assignment.token_ids_N, num_tokens)
    tokens = _draw(num_tokens, width, seed=3, dtype=dtype).requires_grad_()
    fused = ops.select_rows(tokens, assignment.token_ids_N, places)
    exact = tokens.double().index_select(0, assignment.token_ids_N)
    expected = [value.to(dtype) for value in _gradients(exact, tokens)]
    _same(_gradients(fused, tokens), expected, dtype)


@every_dtype
@pytest.mark.parametrize("counts", [[3, 0, 5, 33, 0], [0, 0, 0], [1], [0, 40]], ids=str)
def test_bias_and_gelu_find_the_expert_of_each_row(counts, dtype) -> None:
    rows, width = sum(counts), 136
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.tensor(counts, device=DEVICE))
    pre = _draw(rows, width, seed=5, dtype=dtype).requires_grad_()
    bias = _draw(len(counts), width, seed=6, dtype=dtype).requires_grad_()
    exact = F.gelu(pre.double() + bias.double()[expert], approximate="tanh")
    grad = _draw(rows, width, seed=9, dtype=dtype)
    expected = [exact, *torch.autograd.grad((exact * grad.double()).sum(), (pre, bias))]
    found = [
        expert_ops.bias_gelu(pre.detach(), bias.detach(), ends),
        *expert_ops.bias_gelu_backward(grad, pre.detach(), bias.detach(), ends),
    ]
    _same(found, [value.detach().to(dtype) for value in expected], dtype)
    if len(counts) == 1:  # all rows of one expert, as in a feed-forward of its own
        alone = expert_ops.bias_gelu(pre, bias, None)
        gradients = torch.autograd.grad(alone, (pre, bias), grad)
        _same([alone.detach(), *gradients], found, dtype)
    added = pre.detach().clone()
    expert_ops.add_bias(added, bias.detach(), ends)
    _same([added], [pre.detach() + bias.detach()[expert]], dtype)
    sums = torch.zeros(len(counts), width, dtype=torch.float64, device=DEVICE)
    _same(
        [expert_ops.sum_groups(grad, ends)],
        [sums.index_add_(0, expert, grad.double()).to(dtype)],
        dtype,
    )


@pytest.mark.parametrize("name", ["combine", "select_rows"])
def test_operations_are_whole_for_tracing_and_compiling(name) -> None:
    """Shapes without values, no mutation, gradients: what torch.compile and a trace rely on."""
    size = SIZES[1]
    assignment, (num_tokens, width, _, _) = _assignment(size), size
    places = ops.rows_of_tokens(assignment.token_ids_N, num_tokens)
    tokens = _draw(num_tokens, width, seed=3).requires_grad_()
    where = (places.order_N, places.starts_T)
    arguments = {
        "combine": (
            tokens,
            _draw(len(assignment.gates_N), width, seed=4).requires_grad_(),
            assignment.gates_N.requires_grad_(),
            assignment.token_ids_N,
            *where,
        ),
        "select_rows": (tokens, assignment.token_ids_N, *where),
    }
    torch.library.opcheck(
        getattr(torch.ops.promoe_ds, name).default,
        arguments[name],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_another_number_of_rows_is_not_compiled_anew() -> None:
    """As the unconditional expert's with parallel.compile, which change from batch to batch."""
    bias, compiled = _draw(1, 24, seed=1), []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled.append(module)
        return module.forward

    @torch.compile(backend=backend, dynamic=True)
    def run(rows: Tensor, tokens: Tensor, ids: Tensor, ends: Tensor) -> tuple:
        expert_ops.bias_gelu(rows, bias, None)
        order, starts = torch.arange(0), ids.new_zeros(tokens.shape[0] + 1)
        ops._combine(tokens, rows, rows[:, 0], ids, order, starts)
        ops._sum_by_expert(tokens, ids, ends)
        return expert_ops.bias_gelu_backward(rows, rows, bias, None)

    for rows in (5, 7, 11):
        ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        tokens, ends = _draw(rows + 1, 24, seed=2), torch.tensor([rows], device=DEVICE)
        run(_draw(rows, 24, seed=3), tokens, ids, ends)
    assert len(compiled) == 1


@pytest.mark.parametrize("averages", [0, 1, 2])
@every_dtype
def test_update_equals_torch_s_adamw_and_leaves_a_bad_step_out(dtype, averages) -> None:
    count, betas = 1500, (0.9, 0.999)
    weights = _draw(count, seed=1).requires_grad_()
    own = weights.detach().clone()
    optimizer = torch.optim.AdamW([weights], lr=0.01, betas=betas, weight_decay=0.1)
    state = {name: torch.zeros_like(own) for name in ("exp_avg", "exp_avg_sq")}
    kept = [own.clone() for _ in range(averages)]
    expected, pulls = [own.clone() for _ in range(averages)], [0.25, 0.5][:averages]
    out = torch.empty(count, dtype=dtype, device=DEVICE)
    for step in range(1, 4):
        grad = _draw(count, seed=10 + step, dtype=dtype)
        weights.grad = grad.float() / 2.0
        optimizer.step()
        for average, pull in zip(expected, pulls, strict=True):
            average.lerp_(weights.detach(), pull)
        corrections = [1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5]
        for is_bad in (1.0, 0.0):
            scalars = torch.tensor([is_bad, 2.0, *corrections], device=DEVICE)
            update_ops.adamw(
                own, *state.values(), kept, out, grad, scalars, pulls, 0.01, [*betas], 1e-8, 0.1
            )
    _same([own, *kept], [weights.detach(), *expected], torch.float32)
    moments = optimizer.state[weights]
    _same(list(state.values()), [moments[name] for name in state], torch.float32)
    _same([out], [own.to(dtype)], dtype)  # Triton's interpreter rounds towards zero
