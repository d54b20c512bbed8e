"""Experts: feed-forwards of one hidden layer, GELU-tanh with biases or SwiGLU without.

Letters: D width, F hidden width, E routed experts on all ranks, e those held here, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.kernels import expert_ops
from promoe_ds.kernels.choice import uses_triton
from promoe_ds.moe.joining import is_behind, join, parameters_behind
from promoe_ds.moe.products import BACKENDS, FusedGroupedGemm, Products, falls_back, row_major


class FeedForward(nn.Module):
    """down(gelu_tanh(up(x))) with biases: the dense, shared and unconditional feed-forward.

    A sum of n such experts of width F is one of width n*F, so N_s shared or N_u unconditional
    experts (Eq. 5) are one module here.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        #: Of bias and GELU, see `kernels.choice`; set from outside.
        self.kernels = "eager"

    def forward(self, x_D: Tensor) -> Tensor:
        """Map (..., D) to (..., D); (0, D) passes too, with zero gradients for the parameters."""
        if type(self.up) is nn.Linear and uses_triton(x_D, self.kernels):
            pre_F = F.linear(x_D, self.up.weight)
            hidden_RF = expert_ops.bias_gelu(pre_F.flatten(0, -2), self.up.bias[None], None)
            return self.down(hidden_RF.view_as(pre_F))
        return self.down(F.gelu(self.up(x_D), approximate="tanh"))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases: SwiGLU (Shazeer, 2020). Sums of n are one of n
    times the width, too.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map (..., D) to (..., D); (0, D) passes too, with zero gradients for the parameters."""
        return self.down(F.silu(self.gate(x_D)) * self.up(x_D))


#: Feed-forwards by expert type: dense, shared and unconditional ones.
FEED_FORWARDS: dict[str, type[nn.Module]] = {"gelu": FeedForward, "swiglu": GatedFeedForward}

#: Names of the stacked parameters by expert type.
EXPERT_PARAMETERS = {
    "gelu": ("up_weight", "up_bias", "down_weight", "down_bias"),
    "swiglu": ("gate_weight", "up_weight", "down_weight"),
}


def expert_shapes(expert_type: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of one expert."""
    shapes = {
        "gate_weight": (hidden, width),
        "up_weight": (hidden, width),
        "up_bias": (hidden,),
        "down_weight": (width, hidden),
        "down_bias": (width,),
    }
    return {name: shapes[name] for name in EXPERT_PARAMETERS[expert_type]}


class StackedExperts(nn.Module):
    """The routed experts held by one process, as stacked parameters.

    `first_expert` says which ones they are: local expert i is the routed expert first_expert + i.
    It names weights, for initialisation and conversion; the computation does not use it. A
    `kernel`, where the engine sets one, computes instead of the products here.
    """

    kernel: Callable[[StackedExperts, Tensor, Tensor], Tensor] | None = None
    up_weight: Tensor
    up_bias: Tensor
    gate_weight: Tensor
    down_weight: Tensor
    down_bias: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        expert_type: str = "gelu",
        backend: str = "grouped_mm",
        kernels: str = "eager",
    ) -> None:
        """Create uninitialised experts (`model.init` fills them).

        Args:
            expert_type: "gelu" (GELU-tanh, biases) or "swiglu" (no biases).
            backend: "grouped_mm" (grouped GEMM), "loop" (one expert after the other), or "auto":
                grouped GEMM but where torch would run its slow fallback.
            kernels: of biases and GELU, see `kernels.choice`.
        """
        super().__init__()
        self.expert_type, self.backend, self.kernels = expert_type, backend, kernels
        self.first_expert, self.num_local_experts = 0, num_experts
        for name, shape in expert_shapes(expert_type, width, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))

    def keep(self, first: int, count: int) -> None:
        """Keep the experts first ... first + count - 1 only, uninitialised: another process holds
        the others.
        """
        self.first_expert, self.num_local_experts = self.first_expert + first, count
        for name, parameter in list(self.named_parameters()):
            self.register_parameter(
                name, nn.Parameter(parameter.new_empty(count, *parameter.shape[1:]))
            )

    def is_followed_by(self, single: nn.Module) -> bool:
        """Whether a feed-forward of an expert's shape is in memory where one more expert would be,
        and is computed as one by grouped GEMM.
        """
        return (
            self.kernel is None
            and self.backend != "loop"
            and not falls_back(self.up_weight)
            and all(
                is_behind(getattr(self, name), *parameters_behind(single, [name]))
                for name in EXPERT_PARAMETERS[self.expert_type]
            )
        )

    def backend_for(self, rows_RD: Tensor) -> str:
        """Return the backend that multiplies rows of this dtype on their device."""
        if self.backend != "auto":
            return self.backend
        return "loop" if falls_back(rows_RD) else "grouped_mm"

    def forward(
        self, rows_RD: Tensor, tokens_per_expert_e: Tensor, last: nn.Module | None = None
    ) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RD: sorted by local expert.
            tokens_per_expert_e: int64 counts with sum R; zeros are fine, also R = 0.
            last: a feed-forward of an expert's shape that is one more expert, behind the others.
        Returns: (R, D).
        Gradient: reaches every parameter, zeros for an expert without rows.
        Sync: none with grouped_mm; one with loop.
        """
        rows_RD = at_autocast_dtype(rows_RD)
        if self.kernel is not None:
            return self.kernel(self, rows_RD, tokens_per_expert_e)
        backend = self.backend_for(rows_RD)
        make_products = BACKENDS[backend]
        if backend == "grouped_mm" and uses_triton(rows_RD, self.kernels):
            make_products = FusedGroupedGemm
        products = make_products(tokens_per_expert_e, rows_RD.shape[0])
        function = _ExpertFeedForward if self.expert_type == "gelu" else _GatedExpertFeedForward
        names = EXPERT_PARAMETERS[self.expert_type]
        stacks = [getattr(self, name) for name in names]
        weights = stacks if last is None else join(stacks, parameters_behind(last, names))
        return function.apply(rows_RD, *map(at_autocast_dtype, weights), products)


def at_autocast_dtype(tensor: Tensor) -> Tensor:
    """Return `tensor` in the dtype in which torch's autocast, where it is on, would multiply it."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _ExpertFeedForward(torch.autograd.Function):
    """down(gelu_tanh(up(x))) of every expert on its rows, with the backward pass written out.

    Autograd's own version makes a temporary for every bias and sums its gradient row by row. Here
    the hidden layer is freed while the weights' gradients are made.
    """

    clear_saved_tensors_on_access = True

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        products: Products,
    ) -> Tensor:
        pre_RF, hidden_RF = products.expand(rows_RD, up, up_bias)
        ctx.save_for_backward(rows_RD, pre_RF, hidden_RF, up, up_bias, down)
        ctx.products = products
        return products.linear(hidden_RF, down, down_bias)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, pre_RF, hidden_RF, up, up_bias, down = ctx.saved_tensors
        products = ctx.products
        grad_RD = row_major(grad_RD)
        grad_down = products.grad_weight(grad_RD, hidden_RF)
        del hidden_RF
        grad_RF, grad_up_bias = products.expand_backward(
            products.grad_input(grad_RD, down), pre_RF, up_bias
        )
        del pre_RF
        grad_rows = products.grad_input(grad_RF, up) if ctx.needs_input_grad[0] else None
        return (
            grad_rows,
            products.grad_weight(grad_RF, rows_RD),
            grad_up_bias,
            grad_down,
            products.grad_bias(grad_RD),
            None,
        )


class _GatedExpertFeedForward(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of every expert on its rows, with the backward pass written out,
    as above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        products: Products,
    ) -> Tensor:
        pre_RF, linear_RF = products.linear(rows_RD, gate), products.linear(rows_RD, up)
        ctx.save_for_backward(rows_RD, pre_RF, linear_RF, gate, up, down)
        ctx.products = products
        return products.linear(F.silu(pre_RF) * linear_RF, down)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, pre_RF, linear_RF, gate, up, down = ctx.saved_tensors
        products = ctx.products
        grad_RD = row_major(grad_RD)
        silu_RF = F.silu(pre_RF)
        grad_RF = products.grad_input(grad_RD, down)
        grad_linear_RF = grad_RF * silu_RF
        grad_pre_RF = torch.ops.aten.silu_backward(grad_RF * linear_RF, pre_RF)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = products.grad_input(grad_pre_RF, gate).add_(
                products.grad_input(grad_linear_RF, up)
            )
        return (
            grad_rows,
            products.grad_weight(grad_pre_RF, rows_RD),
            products.grad_weight(grad_linear_RF, rows_RD),
            products.grad_weight(grad_RD, silu_RF * linear_RF),
            None,
        )
