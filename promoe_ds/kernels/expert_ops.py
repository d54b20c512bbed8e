"""The experts' biases and GELU as torch operations that find the expert of each row.

Letters: R, N rows sorted by expert, E experts, F hidden width, D width; `ends_E` are running sums
of rows per expert. Without gradients: `moe.experts` writes its backward pass out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from promoe_ds.kernels.ops import COLUMNS, LIBRARY, ROWS, fused_op, sum_in_parts


@fused_op("bias_gelu")
def bias_gelu(pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> Tensor:
    """Return gelu_tanh(pre + bias of the row's expert), (R, F); without gradient, see
    `bias_gelu_backward`.
    """
    out = torch.empty_like(pre_RF)
    _add_bias(pre_RF, bias_EF, ends_E, out, has_gelu=True)
    return out


@bias_gelu.register_fake
def _(pre_RF, bias_EF, ends_E):
    return torch.empty_like(pre_RF)


@fused_op("bias_gelu_backward")
def bias_gelu_backward(
    grad_RF: Tensor, pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of pre, (R, F), and of the biases, (E, F)."""
    from promoe_ds.kernels import programs

    grad_pre, grad_bias = torch.empty_like(pre_RF), torch.empty_like(bias_EF)
    experts, width = bias_EF.shape
    programs.bias_gelu_backward[(experts, -(-width // COLUMNS))](
        grad_RF,
        pre_RF,
        bias_EF,
        ends_E,
        grad_pre,
        grad_bias,
        F=width,
        ROWS=ROWS,
        BLOCK=COLUMNS,
    )
    return grad_pre, grad_bias


@bias_gelu_backward.register_fake
def _(grad_RF, pre_RF, bias_EF, ends_E):
    return torch.empty_like(pre_RF), torch.empty_like(bias_EF)


@torch.library.custom_op(f"{LIBRARY}::add_bias", mutates_args=("rows_RF",))
def add_bias(rows_RF: Tensor, bias_EF: Tensor, ends_E: Tensor) -> None:
    """Add to each row the bias of its expert, in place."""
    _add_bias(rows_RF, bias_EF, ends_E, rows_RF, has_gelu=False)


@add_bias.register_fake
def _(rows_RF, bias_EF, ends_E):
    return None


@fused_op("sum_groups")
def sum_groups(rows_ND: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum of each expert's rows, (E, D) in the rows' dtype; a bias's gradient."""
    return sum_in_parts(rows_ND, None, ends_E, rows_ND.dtype)


@sum_groups.register_fake
def _(rows_ND, ends_E):
    return rows_ND.new_empty(len(ends_E), rows_ND.shape[1])


def _add_bias(
    pre_RF: Tensor, bias_EF: Tensor, ends_E: Tensor, out_RF: Tensor, *, has_gelu: bool
) -> None:
    from promoe_ds.kernels import programs

    rows, width = pre_RF.shape
    if rows:
        programs.add_bias[(-(-rows // ROWS), -(-width // COLUMNS))](
            pre_RF,
            bias_EF,
            ends_E,
            out_RF,
            rows,
            F=width,
            E=len(ends_E),
            ROWS=ROWS,
            BLOCK=COLUMNS,
            HAS_GELU=has_gelu,
        )
