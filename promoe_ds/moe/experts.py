"""Experts: feed-forwards of one hidden layer, GELU-tanh with biases or SwiGLU without.

Letters: D width, F hidden width, E routed experts on all ranks, e those held here, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.kernels import ops
from promoe_ds.kernels.choice import uses_triton


class FeedForward(nn.Module):
    """down(gelu_tanh(up(x))) with biases: the dense, shared and unconditional feed-forward.

    A sum of n such experts of width F is one of width n*F, so N_s shared or N_u unconditional
    experts (Eq. 5) are one module here.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map (..., D) to (..., D); (0, D) passes too, with zero gradients for the parameters."""
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
        first_expert: int = 0,
    ) -> None:
        """Create uninitialised experts (`model.init` fills them).

        Args:
            expert_type: "gelu" (GELU-tanh, biases) or "swiglu" (no biases).
            backend: "grouped_mm" (grouped GEMM), "loop" (one expert after the other), or "auto":
                grouped GEMM but where torch would run its slow fallback.
            kernels: of biases and GELU, see `kernels.choice`.
        """
        super().__init__()
        self.expert_type, self.backend, self.first_expert = expert_type, backend, first_expert
        self.kernels = kernels
        self.num_local_experts = num_experts
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

    def forward(self, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RD: sorted by local expert.
            tokens_per_expert_e: int64 counts with sum R; zeros are fine, also R = 0.
        Returns: (R, D).
        Gradient: reaches every parameter, zeros for an expert without rows.
        Sync: none with grouped_mm; one with loop.
        """
        rows_RD = at_autocast_dtype(rows_RD)
        if self.kernel is not None:
            return self.kernel(self, rows_RD, tokens_per_expert_e)
        backend = self.backend
        if backend == "auto":
            backend = "loop" if _falls_back(rows_RD) else "grouped_mm"
        make_products = BACKENDS[backend]
        if backend == "grouped_mm" and uses_triton(rows_RD, self.kernels):
            make_products = _FusedGroupedGemm
        products = make_products(tokens_per_expert_e, rows_RD.shape[0])
        function = _ExpertFeedForward if self.expert_type == "gelu" else _GatedExpertFeedForward
        names = EXPERT_PARAMETERS[self.expert_type]
        return function.apply(
            rows_RD, *(at_autocast_dtype(getattr(self, name)) for name in names), products
        )


def at_autocast_dtype(tensor: Tensor) -> Tensor:
    """Return `tensor` in the dtype in which torch's autocast, where it is on, would multiply it."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _Products(ABC):
    """Products of rows with the weights of their experts, and GELU between two of them."""

    @abstractmethod
    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def grad_bias(self, grad_RO: Tensor) -> Tensor: ...

    def expand(self, rows_RD: Tensor, up: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `expand_backward` needs and gelu_tanh(up(rows)), (R, F) both."""
        pre_RF = self.linear(rows_RD, up, up_bias)
        return pre_RF, F.gelu(pre_RF, approximate="tanh")

    def expand_backward(
        self, grad_RF: Tensor, pre_RF: Tensor, up_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients before GELU, (R, F), and of the biases."""
        grad_RF = torch.ops.aten.gelu_backward(grad_RF, pre_RF, approximate="tanh")
        return grad_RF, self.grad_bias(grad_RF)


class _GroupedGemm(_Products):
    """Products over all experts at once, by grouped GEMM; the counts stay on the device."""

    def __init__(self, counts_e: Tensor, num_rows: int) -> None:
        self._counts_e, self._ends_e = counts_e, counts_e.cumsum(0).to(torch.int32)
        self._num_rows = num_rows

    @cached_property
    def _expert_R(self) -> Tensor:
        experts = torch.arange(len(self._counts_e), device=self._counts_e.device)
        return torch.repeat_interleave(experts, self._counts_e, output_size=self._num_rows)

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        product = F.grouped_mm(x_RI, weight_eOI.transpose(-2, -1), offs=self._ends_e)
        return product if bias_eO is None else product.add_(bias_eO.index_select(0, self._expert_R))

    def grad_input(self, grad_RO: Tensor, weight_eOI: Tensor) -> Tensor:
        return F.grouped_mm(grad_RO, weight_eOI, offs=self._ends_e)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        product = F.grouped_mm(grad_RO.T, x_RI, offs=self._ends_e)
        if not _leaves_empty_groups_unwritten(product.device):
            return product
        return torch.where(self._counts_e[:, None, None] > 0, product, 0)

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        return F.one_hot(self._expert_R, len(self._counts_e)).T.to(grad_RO.dtype) @ grad_RO


class _FusedGroupedGemm(_GroupedGemm):
    """Grouped GEMM whose biases and GELU are one kernel that finds each row's expert."""

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        product = super().linear(x_RI, weight_eOI)
        if bias_eO is not None:
            ops.add_bias(product, bias_eO, self._ends_e)
        return product

    def expand(self, rows_RD: Tensor, up: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
        pre_RF = self.linear(rows_RD, up)
        return pre_RF, ops.bias_gelu(pre_RF, up_bias, self._ends_e)

    def expand_backward(
        self, grad_RF: Tensor, pre_RF: Tensor, up_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = ops.bias_gelu_backward(
            grad_RF, pre_RF, up_bias, self._ends_e
        )
        return gradients

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        total: Tensor = ops.sum_groups(grad_RO, self._ends_e)
        return total


def _leaves_empty_groups_unwritten(device: torch.device) -> bool:
    """Whether grouped GEMM leaves a weight gradient without rows as it found the memory: so on
    devices of capability 10 (B200), where others write zeros (pytorch/pytorch#172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def _falls_back(rows_RD: Tensor) -> bool:
    """Whether grouped GEMM would read the counts and multiply expert by expert, six times a layer
    and step: on GPUs for anything but bf16 on devices of capability 9 and 10.
    """
    return rows_RD.is_cuda and (
        rows_RD.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(rows_RD.device)[0] not in (9, 10)
    )


def _row_major(grad_RD: Tensor) -> Tensor:
    """Return a gradient as grouped GEMM takes it. That of a sum is expanded, and `contiguous`
    leaves its strides of 0 where there are no rows.
    """
    if grad_RD.stride() == (grad_RD.shape[1], 1):
        return grad_RD
    return grad_RD.clone(memory_format=torch.contiguous_format)


class _Loop(_Products):
    """Products of one expert after the other, into slices of one result; the counts go to the
    host.
    """

    def __init__(self, counts_e: Tensor, num_rows: int) -> None:
        self._counts = counts_e.tolist()

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        result = x_RI.new_empty(x_RI.shape[0], weight_eOI.shape[1])
        biases = bias_eO if bias_eO is not None else [None] * len(self._counts)
        for x, weight, bias, out in zip(
            self._rows(x_RI), weight_eOI, biases, self._rows(result), strict=True
        ):
            (
                torch.mm(x, weight.T, out=out)
                if bias is None
                else torch.addmm(bias, x, weight.T, out=out)
            )
        return result

    def grad_input(self, grad_RO: Tensor, weight_eOI: Tensor) -> Tensor:
        result = grad_RO.new_empty(grad_RO.shape[0], weight_eOI.shape[2])
        for grad, weight, out in zip(
            self._rows(grad_RO), weight_eOI, self._rows(result), strict=True
        ):
            torch.mm(grad, weight, out=out)
        return result

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        result = grad_RO.new_empty(len(self._counts), grad_RO.shape[1], x_RI.shape[1])
        for grad, x, out in zip(self._rows(grad_RO), self._rows(x_RI), result, strict=True):
            torch.mm(grad.T, x, out=out)
        return result

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        result = grad_RO.new_empty(len(self._counts), grad_RO.shape[1])
        for grad, out in zip(self._rows(grad_RO), result, strict=True):
            torch.sum(grad, dim=0, out=out)
        return result

    def _rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._counts)


class _ExpertFeedForward(torch.autograd.Function):
    """down(gelu_tanh(up(x))) of every expert on its rows, with the backward pass written out.

    Autograd's own version makes a temporary for every bias and sums its gradient row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        products: _Products,
    ) -> Tensor:
        pre_RF, hidden_RF = products.expand(rows_RD, up, up_bias)
        ctx.save_for_backward(rows_RD, pre_RF, hidden_RF, up, up_bias, down)
        ctx.products = products
        return products.linear(hidden_RF, down, down_bias)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, pre_RF, hidden_RF, up, up_bias, down = ctx.saved_tensors
        products = ctx.products
        grad_RD = _row_major(grad_RD)
        grad_RF, grad_up_bias = products.expand_backward(
            products.grad_input(grad_RD, down), pre_RF, up_bias
        )
        grad_rows = products.grad_input(grad_RF, up) if ctx.needs_input_grad[0] else None
        return (
            grad_rows,
            products.grad_weight(grad_RF, rows_RD),
            grad_up_bias,
            products.grad_weight(grad_RD, hidden_RF),
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
        products: _Products,
    ) -> Tensor:
        pre_RF, linear_RF = products.linear(rows_RD, gate), products.linear(rows_RD, up)
        ctx.save_for_backward(rows_RD, pre_RF, linear_RF, gate, up, down)
        ctx.products = products
        return products.linear(F.silu(pre_RF) * linear_RF, down)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, pre_RF, linear_RF, gate, up, down = ctx.saved_tensors
        products = ctx.products
        grad_RD = _row_major(grad_RD)
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


#: The implementations of `parallel.expert_backend`.
BACKENDS: dict[str, Callable[[Tensor, int], _Products]] = {
    "grouped_mm": _GroupedGemm,
    "loop": _Loop,
}
