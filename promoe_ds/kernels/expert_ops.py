"""The experts' biases and GELU as torch operations that find the expert of each row.

Letters: R, N rows sorted by expert, E experts, F hidden width, D width; `ends_E` are running sums
of rows per expert. The routed experts' backward pass is written out in `moe.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promoe_ds.kernels.ops import (
    COLUMNS,
    PARTS,
    ROWS,
    fused_op,
    launch,
    sum_in_parts,
    sum_of_parts,
)


@fused_op("bias_gelu")
def bias_gelu(pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor | None) -> Tensor:
    """Return gelu_tanh(pre + bias of the row's expert), (R, F). Without ends there is one expert.

    Gradient: reaches pre and biases.  Sync: none.
    """
    out = torch.empty_like(pre_RF)
    _add_bias(pre_RF, bias_EF, ends_E, out, has_gelu=True)
    return out


@fused_op("bias_gelu_backward")
def bias_gelu_backward(
    grad_RF: Tensor, pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of pre, (R, F), and of the biases, (E, F)."""
    grad_pre, (experts, width) = torch.empty_like(pre_RF), bias_EF.shape
    partial = torch.empty(1, PARTS, experts, width, device=pre_RF.device)
    launch(
        "programs.bias_gelu_backward",
        (experts, -(-width // COLUMNS), PARTS),
        grad_RF,
        pre_RF,
        bias_EF,
        bias_EF if ends_E is None else ends_E,
        grad_pre,
        partial,
        pre_RF.shape[0],
        F=width,
        E=experts,
        PARTS=PARTS,
        ROWS=ROWS,
        BLOCK=COLUMNS,
        HAS_ENDS=ends_E is not None,
    )
    return grad_pre, sum_of_parts(partial, bias_EF.dtype)[0]


def _save_for_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
    return *bias_gelu_backward(grad_RF.contiguous(), *ctx.saved_tensors), None


bias_gelu.register_autograd(_differentiate_gelu, setup_context=_save_for_gelu)


@fused_op("add_bias", changes=("rows_RF",))
def add_bias(rows_RF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> None:
    """Add to each row the bias of its expert, in place."""
    _add_bias(rows_RF, bias_EF, ends_E, rows_RF, has_gelu=False)


@fused_op("sum_groups")
def sum_groups(rows_ND: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum of each expert's rows, (E, D) in the rows' dtype; a bias's gradient."""
    return sum_in_parts(rows_ND, None, ends_E, rows_ND.dtype)


def _add_bias(
    pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor | None, out_RF: Tensor, *, has_gelu: bool
) -> None:
    rows, width = pre_RF.shape
    launch(
        "programs.add_bias",
        (-(-rows // ROWS), -(-width // COLUMNS)),
        pre_RF,
        bias_EF,
        bias_EF if ends_E is None else ends_E,
        out_RF,
        rows,
        F=width,
        E=bias_EF.shape[0],
        ROWS=ROWS,
        BLOCK=COLUMNS,
        HAS_GELU=has_gelu,
        HAS_ENDS=ends_E is not None,
    )
