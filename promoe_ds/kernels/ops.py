"""The fused operations as torch knows them: with shapes for tracing and compiling, and gradients.

Letters: T tokens, D width, N rows sorted by expert, E experts, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

LIBRARY = "promoe_ds"
#: Parts into which sums over tokens are split, so that all of a GPU's processors have work.
PARTS = 16
ROWS, COLUMNS = 16, 128
#: Parts that are summed at a time.
_SUMMED = 8

_HAS_VALUES = ContextVar("has_values", default=True)


@dataclass(frozen=True)
class TokenRows:
    """The rows of each token: those of token t are order_N[starts_T[t] : starts_T[t + 1]], (T + 1)
    starts.
    """

    order_N: Tensor
    starts_T: Tensor


def rows_of_tokens(token_ids_N: Tensor, num_tokens: int) -> TokenRows:
    """Return where the rows of each token are.  Sync: none."""
    sorted_N, order_N = token_ids_N.sort(stable=True)
    tokens = torch.arange(num_tokens + 1, device=token_ids_N.device)
    return TokenRows(order_N, torch.searchsorted(sorted_N, tokens))


def combine(
    base_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor, places: TokenRows
) -> Tensor:
    """Return base plus the gate-weighted rows of each token, (T, D) in base's dtype; summed in
    fp32.

    Gradient: reaches base, rows and gates.  Sync: none.
    """
    return _combine(
        base_TD.contiguous(),
        rows_ND.contiguous(),
        gates_N,
        token_ids_N,
        places.order_N,
        places.starts_T,
    )


def select_rows(tokens_TD: Tensor, token_ids_N: Tensor, places: TokenRows) -> Tensor:
    """Return each row's token, (N, D).

    Gradient: the sum over a token's rows in fp32, without atomic additions.  Sync: none.
    """
    return _select_rows(tokens_TD, token_ids_N, places.order_N, places.starts_T)


def sum_by_expert(
    tokens_TD: Tensor, token_ids_N: Tensor, ends_E: Tensor, places: TokenRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens, for two uses, and the sum of every expert's, (E, D) in fp32 (Eq. 6's
    centroids times counts); rows behind the last end are in no sum.

    Gradient: reaches the tokens. What is computed from the tokens returned adds its gradient in
    the kernel of the sums'.  Sync: none.
    """
    return _SumAndTokens.apply(
        tokens_TD.contiguous(), token_ids_N, ends_E, places.order_N, places.starts_T
    )


# Each operation: what it computes, and its gradient.


def fused_op(name: str, changes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator of an operation of ours: of a function that makes its results and calls
    `launch` to fill them.

    On tensors without values, as tracing and compiling have them, the same function makes the
    results, and nothing is launched. It asks for `shape[0]`: `len` would fix the shape, and every
    other number of rows would be compiled anew.
    Args:
        changes: names of the arguments that it writes to.
    """

    def define(compute: Callable[..., Any]) -> Any:
        operation = torch.library.custom_op(f"{LIBRARY}::{name}", compute, mutates_args=changes)

        @operation.register_fake
        def make_results(*args: Any) -> Any:
            token = _HAS_VALUES.set(False)
            try:
                return compute(*args)
            finally:
                _HAS_VALUES.reset(token)

        return operation

    return define


def launch(program: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a Triton program, named FILE.PROGRAM, over a grid; nothing over an empty one."""
    if _HAS_VALUES.get() and all(grid):
        file, _, name = program.partition(".")
        getattr(import_module(f"promoe_ds.kernels.{file}"), name)[grid](*arguments, **constants)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is no less: a block of columns."""
    return 1 << max(0, number - 1).bit_length()


@fused_op("combine")
def _combine(
    base_TD: Tensor,
    rows_ND: Tensor,
    gates_N: Tensor,
    token_ids_N: Tensor,
    order_N: Tensor,
    starts_T: Tensor,
) -> Tensor:
    out, width = torch.empty_like(base_TD), base_TD.shape[1]
    launch(
        "programs.combine",
        (base_TD.shape[0],),
        rows_ND,
        gates_N,
        base_TD,
        order_N,
        starts_T,
        out,
        D=width,
        BLOCK=power_of_two(width),
        HAS_GATES=True,
        HAS_BASE=True,
    )
    return out


@fused_op("combine_backward")
def _combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, gates_N: Tensor, token_ids_N: Tensor
) -> tuple[Tensor, Tensor]:
    grad_rows, grad_gates = torch.empty_like(rows_ND), torch.empty_like(gates_N)
    rows, width = rows_ND.shape
    launch(
        "programs.combine_backward",
        (rows,),
        grad_TD,
        rows_ND,
        gates_N,
        token_ids_N,
        grad_rows,
        grad_gates,
        D=width,
        BLOCK=power_of_two(width),
    )
    return grad_rows, grad_gates


def _save_for_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, rows_ND, gates_N, token_ids_N, _, _ = inputs
    ctx.save_for_backward(rows_ND, gates_N, token_ids_N)


def _differentiate_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows, grad_gates = _combine_backward(grad_TD.contiguous(), *ctx.saved_tensors)
    return grad_TD, grad_rows, grad_gates, None, None, None


_combine.register_autograd(_differentiate_combine, setup_context=_save_for_combine)


@fused_op("select_rows")
def _select_rows(
    tokens_TD: Tensor, token_ids_N: Tensor, order_N: Tensor, starts_T: Tensor
) -> Tensor:
    return tokens_TD.index_select(0, token_ids_N)


@fused_op("sum_rows_of_tokens")
def _sum_rows_of_tokens(rows_ND: Tensor, order_N: Tensor, starts_T: Tensor) -> Tensor:
    width = rows_ND.shape[1]
    out = rows_ND.new_empty(starts_T.shape[0] - 1, width)
    launch(
        "programs.combine",
        (out.shape[0],),
        rows_ND,
        rows_ND,
        out,
        order_N,
        starts_T,
        out,
        D=width,
        BLOCK=power_of_two(width),
        HAS_GATES=False,
        HAS_BASE=False,
    )
    return out


def _save_for_select(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate_select(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    return _sum_rows_of_tokens(grad_ND.contiguous(), *ctx.saved_tensors), None, None, None


_select_rows.register_autograd(_differentiate_select, setup_context=_save_for_select)


def sum_in_parts(
    rows_D: Tensor, ids_N: Tensor | None, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the sum of each expert's rows, given themselves or by their ids, (E, D) in `dtype`."""
    width, experts = rows_D.shape[1], ends_E.shape[0]
    partial = torch.empty(1, PARTS, experts, width, device=rows_D.device)
    launch(
        "programs.sum_rows_by_expert",
        (experts, -(-width // COLUMNS), PARTS),
        rows_D,
        ids_N if ids_N is not None else ends_E,
        ends_E,
        partial,
        D=width,
        E=experts,
        PARTS=PARTS,
        ROWS=ROWS,
        BLOCK=COLUMNS,
        HAS_IDS=ids_N is not None,
    )
    return sum_of_parts(partial, dtype)[0]


def sum_of_parts(partial_QP: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the second dimension of fp32 numbers, in `dtype`."""
    quantities, parts = partial_QP.shape[:2]
    out = partial_QP.new_empty(quantities, *partial_QP.shape[2:], dtype=dtype)
    launch(
        "programs.sum_parts",
        (-(-out[0].numel() // COLUMNS), quantities),
        partial_QP,
        out,
        parts,
        out[0].numel(),
        ROWS=_SUMMED,
        BLOCK=COLUMNS,
    )
    return out


class _SumAndTokens(Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_TD: Tensor,
        token_ids_N: Tensor,
        ends_E: Tensor,
        order_N: Tensor,
        starts_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(order_N, starts_T, ends_E)
        ctx.dtype = tokens_TD.dtype
        ctx.set_materialize_grads(False)
        sums_ED = _sum_by_expert(tokens_TD, token_ids_N, ends_E)
        return tokens_TD, tokens_TD.view_as(tokens_TD), sums_ED

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *passed, grad_ED = grads
        bases = [grad.contiguous() for grad in passed if grad is not None]
        if grad_ED is None:
            return sum(bases) if bases else None, None, None, None, None
        grad_ED = grad_ED.contiguous()
        grad_TD = _spread_to_tokens(grad_ED, *ctx.saved_tensors, bases, ctx.dtype)
        return grad_TD, None, None, None, None


@fused_op("sum_by_expert")
def _sum_by_expert(tokens_TD: Tensor, token_ids_N: Tensor, ends_E: Tensor) -> Tensor:
    return sum_in_parts(tokens_TD, token_ids_N, ends_E, torch.float32)


@fused_op("spread_to_tokens")
def _spread_to_tokens(
    values_ED: Tensor,
    order_N: Tensor,
    starts_T: Tensor,
    ends_E: Tensor,
    bases_TD: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    width = values_ED.shape[1]
    out = values_ED.new_empty(starts_T.shape[0] - 1, width, dtype=dtype)
    launch(
        "programs.spread_to_tokens",
        (out.shape[0],),
        values_ED,
        order_N,
        starts_T,
        ends_E,
        *[*bases_TD, out, out][:2],
        out,
        D=width,
        E=ends_E.shape[0],
        BLOCK=power_of_two(width),
        BASES=len(bases_TD),
    )
    return out
