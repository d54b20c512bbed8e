"""Token choices sorted by expert, with their counts and the rows of each token, as one operation.

Letters: B images, S tokens per image, K choices per token, T = B*S, E experts, N rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from promoe_ds.kernels.ops import TokenRows, fused_op, launch, power_of_two

#: Choices that one program sorts at a time, and gates whose gradient it moves.
_CHOICES, _GATES = 64, 1024


class SortedChoices(NamedTuple):
    """The list (`routing.assignment.Assignment`), and each image's counts and sums of gates."""

    gates_N: Tensor
    token_ids_N: Tensor
    places: TokenRows
    tokens_per_expert_E: Tensor
    counts_BE: Tensor
    gate_sums_BE: Tensor


def sort_choices(
    gates_BSK: Tensor,
    ids_BSK: Tensor,
    is_routed_B: Tensor,
    num_listed: int,
    num_experts: int,
    *,
    joins: bool = False,
) -> SortedChoices:
    """Sort every routed image's choices by expert, within an expert in token order.

    Args:
        num_listed: images whose choices are listed: the routed ones, or all with `joins`.
        joins: whether every choice of the others is the last expert, with gate 1.
    Gradient: reaches the routed images' gates.  Sync: none.
    """
    gates_N, tokens, order, starts, counts_E, counts_BE, sums_BE = _sort_choices(
        gates_BSK.contiguous(), ids_BSK.contiguous(), is_routed_B, num_listed, num_experts, joins
    )
    return SortedChoices(gates_N, tokens, TokenRows(order, starts), counts_E, counts_BE, sums_BE)


@fused_op("sort_choices")
def _sort_choices(
    gates_BSK: Tensor,
    ids_BSK: Tensor,
    is_routed_B: Tensor,
    num_listed: int,
    num_experts: int,
    joins: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, top_k = ids_BSK.shape
    rows = num_listed * tokens * top_k
    gates_N, gate_sums_BE = gates_BSK.new_empty(rows), gates_BSK.new_empty(batch, num_experts)
    sizes = rows, rows, batch * tokens + 1, num_experts
    token_ids_N, order_N, starts_T, counts_E = map(ids_BSK.new_empty, sizes)
    counts_BE = ids_BSK.new_empty(batch, num_experts)
    shape = {
        "CHOICES": tokens * top_k,
        "E": num_experts,
        "BLOCK_E": max(16, power_of_two(num_experts)),
        "ROWS": _CHOICES,
        "JOINS": joins,
    }
    launch(
        "sort_programs.count_choices",
        (batch,),
        ids_BSK,
        gates_BSK,
        is_routed_B,
        counts_BE,
        gate_sums_BE,
        **shape,
    )
    launch(
        "sort_programs.place_choices",
        (batch,),
        ids_BSK,
        gates_BSK,
        is_routed_B,
        counts_BE,
        token_ids_N,
        gates_N,
        order_N,
        starts_T,
        counts_E,
        batch,
        K=top_k,
        **shape,
    )
    return gates_N, token_ids_N, order_N, starts_T, counts_E, counts_BE, gate_sums_BE


@fused_op("sort_choices_backward")
def _sort_choices_backward(
    grad_N: Tensor, order_N: Tensor, starts_T: Tensor, is_routed_B: Tensor, top_k: int
) -> Tensor:
    choices = (starts_T.shape[0] - 1) * top_k
    grad_C = grad_N.new_empty(choices)
    launch(
        "sort_programs.place_choices_backward",
        (-(-choices // _GATES),),
        grad_N,
        order_N,
        starts_T,
        is_routed_B,
        grad_C,
        choices,
        K=top_k,
        CHOICES=choices // is_routed_B.shape[0],
        BLOCK=_GATES,
    )
    return grad_C


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3], inputs[2])
    ctx.shape = inputs[1].shape
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_N: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad_N is None:
        return None, None, None, None, None, None
    grad_C = _sort_choices_backward(grad_N.contiguous(), *ctx.saved_tensors, ctx.shape[-1])
    return grad_C.view(ctx.shape), None, None, None, None, None


_sort_choices.register_autograd(_differentiate, setup_context=_save)
