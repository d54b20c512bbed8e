"""The update of a flat tensor as one torch operation: AdamW, moving averages, weights out."""

from __future__ import annotations

from torch import Tensor

from promoe_ds.kernels.ops import fused_op, launch

#: Numbers that one program updates.
_UPDATED = 1024


@fused_op("adamw", changes=("weights_N", "exp_avg_N", "exp_avg_sq_N", "averages", "out_N"))
def adamw(
    weights_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    averages: list[Tensor],
    out_N: Tensor,
    grad_N: Tensor,
    scalars: Tensor,
    pulls: list[float],
    lr: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
) -> None:
    """Make one AdamW update of flat fp32 weights, their moving averages, and the weights as the
    network has them, reading each number once.

    Args:
        averages: two at most; each moves by its part of `pulls` towards the new weights.
        out_N: takes the weights; grad_N: in any dtype.
        scalars: fp32 on the device: 1 to change nothing, the divisor of the gradient,
            1 - beta1^t, sqrt(1 - beta2^t).
    """
    count = weights_N.numel()
    launch(
        "block_programs.adamw",
        (-(-count // _UPDATED),),
        weights_N,
        exp_avg_N,
        exp_avg_sq_N,
        grad_N,
        out_N,
        *[*averages, weights_N, weights_N][:2],
        scalars,
        lr,
        *betas,
        eps,
        weight_decay,
        *[*pulls, 0.0, 0.0][:2],
        count,
        AVERAGES=len(averages),
        BLOCK=_UPDATED,
    )
