"""The fused lines of a transformer block, as torch operations: modulated norm, gated residual.

Letters: B images, S tokens per image, D width. Shift, scale and gate may be parts of a wider
tensor: only their columns need be dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from promoe_ds.kernels.ops import fused_op, launch, power_of_two, sum_of_parts

#: Parts of an image's tokens whose sums are taken apart.
_PARTS = 8


def modulated_norm(
    x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """Return x, and its norm without weights, times 1 + scale, plus shift, in x's dtype.

    Args:
        is_centred: whether it is the layer norm or, without the mean taken away, the RMS norm.
    Gradient: reaches all three. What is computed from the x returned adds its gradient in the
    kernel of the norm's.  Sync: none.
    """
    return _Norm.apply(x_BSD.contiguous(), *_alike(shift_BD, scale_BD), eps, is_centred)


def residual_norm(
    x_BSD: Tensor,
    gate_BD: Tensor,
    y_BSD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    """Return x + gate * y, and its modulated norm, both in x's dtype; as `modulated_norm`.

    Gradient: reaches all five.  Sync: none.
    """
    return _ResidualNorm.apply(
        x_BSD.contiguous(),
        y_BSD.contiguous(),
        *_alike(gate_BD, shift_BD, scale_BD),
        eps,
        is_centred,
    )


def gated_residual(x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
    """Return x + gate * y in x's dtype.

    Gradient: reaches all three.  Sync: none.
    """
    return _GatedResidual.apply(x_BSD.contiguous(), gate_BD, y_BSD.contiguous())


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, *kind: Any) -> Any:
        ctx.save_for_backward(x, scale)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return x, _modulated_norm(x, shift, scale, *kind)

    @staticmethod
    def backward(ctx: Any, base: Tensor | None, grad: Tensor | None) -> Any:
        if grad is None:
            return base, None, None, None, None
        x, scale = ctx.saved_tensors
        base = None if base is None else base.contiguous()
        grad_x, sums = _modulated_norm_backward(grad.contiguous(), base, x, scale, *ctx.kind)
        return grad_x, *sums, None, None


class _ResidualNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *kind: Any
    ) -> Any:
        total, normed = _residual_norm(x, y, gate, shift, scale, *kind)
        ctx.save_for_backward(total, y, gate, scale)
        ctx.kind = kind
        return total, normed

    @staticmethod
    def backward(ctx: Any, base: Tensor, grad: Tensor) -> Any:
        grad_x, grad_y, (of_shift, of_scale, of_gate) = _residual_norm_backward(
            grad.contiguous(), base.contiguous(), *ctx.saved_tensors, *ctx.kind
        )
        return grad_x, grad_y, of_gate, of_shift, of_scale, None, None


class _GatedResidual(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return _gated_residual(x, gate, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_gate, grad_y = _gated_residual_backward(grad.contiguous(), *ctx.saved_tensors)
        return grad, grad_gate, grad_y


@fused_op("modulated_norm")
def _modulated_norm(
    x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, is_centred: bool
) -> Tensor:
    out = torch.empty_like(x_BSD)
    _run_norm(x_BSD, None, shift_BD, scale_BD, x_BSD, out, eps, is_centred)
    return out


@fused_op("residual_norm")
def _residual_norm(
    x_BSD: Tensor,
    y_BSD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x_BSD), torch.empty_like(x_BSD)
    _run_norm(x_BSD, (gate_BD, y_BSD), shift_BD, scale_BD, total, out, eps, is_centred)
    return total, out


def _run_norm(
    x_BSD: Tensor,
    line: tuple[Tensor, Tensor] | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    total_BSD: Tensor,
    out_BSD: Tensor,
    eps: float,
    is_centred: bool,
) -> None:
    """Run the norm's program; line: gate and y of a residual line before it."""
    batch, tokens, width = x_BSD.shape
    launch(
        "block_programs.modulated_norm",
        (batch * tokens,),
        x_BSD,
        *(line or (scale_BD, x_BSD)),
        shift_BD,
        scale_BD,
        total_BSD,
        out_BSD,
        scale_BD.stride(0),
        tokens,
        D=width,
        BLOCK=power_of_two(width),
        EPS=eps,
        IS_CENTRED=is_centred,
        HAS_RESIDUAL=line is not None,
    )


@fused_op("modulated_norm_backward")
def _modulated_norm_backward(
    grad_BSD: Tensor,
    base_BSD: Tensor | None,
    x_BSD: Tensor,
    scale_BD: Tensor,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x_BSD)
    sums = _run_norm_backward(
        grad_BSD, base_BSD, x_BSD, None, scale_BD, grad_x, grad_x, eps, is_centred
    )
    return grad_x, sums


@fused_op("residual_norm_backward")
def _residual_norm_backward(
    grad_BSD: Tensor,
    base_BSD: Tensor,
    total_BSD: Tensor,
    y_BSD: Tensor,
    gate_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_y = torch.empty_like(total_BSD), torch.empty_like(y_BSD)
    line = (gate_BD, y_BSD)
    sums = _run_norm_backward(
        grad_BSD, base_BSD, total_BSD, line, scale_BD, grad_x, grad_y, eps, is_centred
    )
    return grad_x, grad_y, sums


def _run_norm_backward(
    grad_BSD: Tensor,
    base_BSD: Tensor | None,
    x_BSD: Tensor,
    line: tuple[Tensor, Tensor] | None,
    scale_BD: Tensor,
    grad_x: Tensor,
    grad_y: Tensor,
    eps: float,
    is_centred: bool,
) -> Tensor:
    """Return the gradients of shift, scale and, with a residual line, its gate: (2 or 3, B, D)."""
    batch, tokens, width = x_BSD.shape
    quantities = 2 if line is None else 3
    partial = torch.empty(quantities, _PARTS, batch, width, device=x_BSD.device)
    launch(
        "block_programs.modulated_norm_backward",
        (batch, _PARTS),
        grad_BSD,
        grad_BSD if base_BSD is None else base_BSD,
        x_BSD,
        *(line or (scale_BD, x_BSD)),
        scale_BD,
        grad_x,
        grad_y,
        partial,
        scale_BD.stride(0),
        tokens,
        batch,
        D=width,
        PARTS=_PARTS,
        BLOCK=power_of_two(width),
        EPS=eps,
        IS_CENTRED=is_centred,
        HAS_BASE=base_BSD is not None,
        HAS_RESIDUAL=line is not None,
    )
    return sum_of_parts(partial, scale_BD.dtype)


@fused_op("gated_residual")
def _gated_residual(x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
    batch, tokens, width = x_BSD.shape
    out = torch.empty_like(x_BSD)
    launch(
        "block_programs.gated_residual",
        (batch * tokens,),
        x_BSD,
        gate_BD,
        y_BSD,
        out,
        gate_BD.stride(0),
        tokens,
        D=width,
        BLOCK=power_of_two(width),
    )
    return out


@fused_op("gated_residual_backward")
def _gated_residual_backward(
    grad_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = y_BSD.shape
    grad_y = torch.empty_like(y_BSD)
    partial = torch.empty(1, _PARTS, batch, width, device=y_BSD.device)
    launch(
        "block_programs.gated_residual_backward",
        (batch, _PARTS),
        grad_BSD,
        gate_BD,
        y_BSD,
        grad_y,
        partial,
        gate_BD.stride(0),
        tokens,
        batch,
        D=width,
        PARTS=_PARTS,
        BLOCK=power_of_two(width),
    )
    return sum_of_parts(partial, gate_BD.dtype)[0], grad_y


def _alike(*parts_BD: Tensor) -> tuple[Tensor, ...]:
    """Return all with the same strides, as parts of one tensor have them."""
    if len({part.stride() for part in parts_BD}) == 1:
        return parts_BD
    return tuple(part.contiguous() for part in parts_BD)
