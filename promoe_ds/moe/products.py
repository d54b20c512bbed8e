"""Products of rows with the weights of their experts: grouped GEMM, fused or not, or a loop.

Letters: R rows sorted by expert, I and O widths in and out, F hidden width, e experts held here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.kernels import expert_ops


class Products(ABC):
    """Products of rows with the weights of their experts, and GELU between two of them."""

    @abstractmethod
    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        """Return each row times its expert's weight, plus its bias, (R, O)."""

    @abstractmethod
    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Return each expert's sum of rows, (e, O)."""

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


class GroupedGemm(Products):
    """Products over all experts at once, by grouped GEMM; the counts stay on the device."""

    def __init__(self, counts_e: Tensor, num_rows: int) -> None:
        self._counts_e, self._ends_e = counts_e, counts_e.cumsum(0).to(torch.int32)
        self._num_rows = num_rows

    @cached_property
    def _expert_R(self) -> Tensor:
        experts = torch.arange(len(self._counts_e), device=self._counts_e.device)
        return torch.repeat_interleave(experts, self._counts_e, output_size=self._num_rows)

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        """Return each row times its expert's weight, plus its bias, (R, O)."""
        product = F.grouped_mm(x_RI, weight_eOI.transpose(-2, -1), offs=self._ends_e)
        return product if bias_eO is None else product.add_(bias_eO.index_select(0, self._expert_R))

    def grad_input(self, grad_RO: Tensor, weight_eOI: Tensor) -> Tensor:
        """Return the gradient of the rows, (R, I)."""
        return F.grouped_mm(grad_RO, weight_eOI, offs=self._ends_e)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Return the gradient of the weights, (e, O, I): zeros for an expert without rows."""
        product = F.grouped_mm(grad_RO.T, x_RI, offs=self._ends_e)
        if not leaves_empty_groups_unwritten(product.device):
            return product
        return torch.where(self._counts_e[:, None, None] > 0, product, 0)

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Return each expert's sum of rows, (e, O)."""
        return F.one_hot(self._expert_R, len(self._counts_e)).T.to(grad_RO.dtype) @ grad_RO


class FusedGroupedGemm(GroupedGemm):
    """Grouped GEMM whose biases and GELU are one kernel that finds each row's expert."""

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        """Return each row times its expert's weight, plus its bias, (R, O)."""
        product = super().linear(x_RI, weight_eOI)
        if bias_eO is not None:
            expert_ops.add_bias(product, bias_eO, self._ends_e)
        return product

    def expand(self, rows_RD: Tensor, up: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
        """As plain operations do, but what is kept is without the bias."""
        pre_RF = self.linear(rows_RD, up)
        return pre_RF, expert_ops.bias_gelu(pre_RF, up_bias, self._ends_e)

    def expand_backward(
        self, grad_RF: Tensor, pre_RF: Tensor, up_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As plain operations do."""
        return expert_ops.bias_gelu_backward(grad_RF, pre_RF, up_bias, self._ends_e)

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Return each expert's sum of rows, (e, O)."""
        return expert_ops.sum_groups(grad_RO, self._ends_e)


def leaves_empty_groups_unwritten(device: torch.device) -> bool:
    """Whether grouped GEMM leaves a weight gradient without rows as it found the memory: so on
    devices of capability 10 (B200), where others write zeros (pytorch/pytorch#172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def falls_back(rows_RD: Tensor) -> bool:
    """Whether grouped GEMM would read the counts and multiply expert by expert, six times a layer
    and step: on GPUs for anything but bf16 on devices of capability 9 and 10.
    """
    return rows_RD.is_cuda and (
        rows_RD.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(rows_RD.device)[0] not in (9, 10)
    )


def row_major(grad_RD: Tensor) -> Tensor:
    """Return a gradient as grouped GEMM takes it. That of a sum is expanded, and `contiguous`
    leaves its strides of 0 where there are no rows.
    """
    if grad_RD.stride() == (grad_RD.shape[1], 1):
        return grad_RD
    return grad_RD.clone(memory_format=torch.contiguous_format)


class Loop(Products):
    """Products of one expert after the other, into slices of one result; the counts go to the
    host.
    """

    def __init__(self, counts_e: Tensor, num_rows: int) -> None:
        self._counts = counts_e.tolist()

    def linear(self, x_RI: Tensor, weight_eOI: Tensor, bias_eO: Tensor | None = None) -> Tensor:
        """Return each row times its expert's weight, plus its bias, (R, O)."""
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
        """Return the gradient of the rows, (R, I)."""
        result = grad_RO.new_empty(grad_RO.shape[0], weight_eOI.shape[2])
        for grad, weight, out in zip(
            self._rows(grad_RO), weight_eOI, self._rows(result), strict=True
        ):
            torch.mm(grad, weight, out=out)
        return result

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Return the gradient of the weights, (e, O, I): zeros for an expert without rows."""
        result = grad_RO.new_empty(len(self._counts), grad_RO.shape[1], x_RI.shape[1])
        for grad, x, out in zip(self._rows(grad_RO), self._rows(x_RI), result, strict=True):
            torch.mm(grad.T, x, out=out)
        return result

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Return each expert's sum of rows, (e, O)."""
        result = grad_RO.new_empty(len(self._counts), grad_RO.shape[1])
        for grad, out in zip(self._rows(grad_RO), result, strict=True):
            torch.sum(grad, dim=0, out=out)
        return result

    def _rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._counts)


#: The implementations of `parallel.expert_backend`.
BACKENDS: dict[str, Callable[[Tensor, int], Products]] = {
    "grouped_mm": GroupedGemm,
    "loop": Loop,
}
