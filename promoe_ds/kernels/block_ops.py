"""The fused lines of a transformer block, as torch operations: modulated norm, gated residual.

Letters: B images, S tokens per image, D width. Shift, scale and gate may be parts of a wider
tensor: only their columns need be dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from promoe_ds.kernels.ops import fused_op, power_of_two

#: Parts of an image's tokens whose sums are taken apart.
_PARTS = 8


def modulated_norm(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """Return the layer norm of x without weights, times 1 + scale, plus shift, in x's dtype.

    Gradient: reaches all three.  Sync: none.
    """
    result: Tensor = _modulated_norm(x_BSD.contiguous(), shift_BD, scale_BD, eps)
    return result


def gated_residual(x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
    """Return x + gate * y in x's dtype.

    Gradient: reaches all three.  Sync: none.
    """
    result: Tensor = _gated_residual(x_BSD.contiguous(), gate_BD, y_BSD.contiguous())
    return result


@fused_op("modulated_norm")
def _modulated_norm(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    from promoe_ds.kernels import block_programs

    batch, tokens, width = x_BSD.shape
    out = torch.empty_like(x_BSD)
    shift_BD, scale_BD = _alike(shift_BD, scale_BD)
    block_programs.modulated_norm[(batch * tokens,)](
        x_BSD,
        shift_BD,
        scale_BD,
        out,
        shift_BD.stride(0),
        tokens,
        D=width,
        BLOCK=power_of_two(width),
        EPS=eps,
    )
    return out


@_modulated_norm.register_fake
def _(x_BSD, shift_BD, scale_BD, eps):
    return torch.empty_like(x_BSD)


@fused_op("modulated_norm_backward")
def _modulated_norm_backward(
    grad_BSD: Tensor, x_BSD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from promoe_ds.kernels import block_programs

    batch, tokens, width = x_BSD.shape
    grad_x = torch.empty_like(x_BSD)
    partial = torch.empty(2, _PARTS, batch, width, device=x_BSD.device)
    block_programs.modulated_norm_backward[(batch, _PARTS)](
        grad_BSD,
        x_BSD,
        scale_BD,
        grad_x,
        partial,
        scale_BD.stride(0),
        tokens,
        batch,
        D=width,
        PARTS=_PARTS,
        BLOCK=power_of_two(width),
        EPS=eps,
    )
    of_shift, of_scale = partial.sum(dim=1).to(scale_BD.dtype)
    return grad_x, of_shift.clone(), of_scale.clone()


@_modulated_norm_backward.register_fake
def _(grad_BSD, x_BSD, scale_BD, eps):
    small = scale_BD.new_empty(scale_BD.shape)
    return torch.empty_like(x_BSD), small, small.clone()


def _save_for_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BSD, _, scale_BD, ctx.eps = inputs
    ctx.save_for_backward(x_BSD, scale_BD)


def _differentiate_norm(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
    return *_modulated_norm_backward(grad_BSD.contiguous(), *ctx.saved_tensors, ctx.eps), None


_modulated_norm.register_autograd(_differentiate_norm, setup_context=_save_for_norm)


@fused_op("gated_residual")
def _gated_residual(x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
    from promoe_ds.kernels import block_programs

    batch, tokens, width = x_BSD.shape
    out = torch.empty_like(x_BSD)
    block_programs.gated_residual[(batch * tokens,)](
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


@_gated_residual.register_fake
def _(x_BSD, gate_BD, y_BSD):
    return torch.empty_like(x_BSD)


@fused_op("gated_residual_backward")
def _gated_residual_backward(
    grad_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    from promoe_ds.kernels import block_programs

    batch, tokens, width = y_BSD.shape
    grad_y = torch.empty_like(y_BSD)
    partial = torch.empty(_PARTS, batch, width, device=y_BSD.device)
    block_programs.gated_residual_backward[(batch, _PARTS)](
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
    return partial.sum(dim=0).to(gate_BD.dtype), grad_y


@_gated_residual_backward.register_fake
def _(grad_BSD, gate_BD, y_BSD):
    return gate_BD.new_empty(gate_BD.shape), torch.empty_like(y_BSD)


def _save_for_residual(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_residual(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, ...]:
    grad_BSD = grad_BSD.contiguous()
    return grad_BSD, *_gated_residual_backward(grad_BSD, *ctx.saved_tensors)


_gated_residual.register_autograd(_differentiate_residual, setup_context=_save_for_residual)


def _alike(shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the same strides, as parts of one tensor have them."""
    if shift_BD.stride() == scale_BD.stride():
        return shift_BD, scale_BD
    return shift_BD.contiguous(), scale_BD.contiguous()
