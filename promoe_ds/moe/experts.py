"""Experts: feed-forwards of one hidden layer, GELU-tanh, with biases.

Letters: D width, F hidden width, E routed experts on all ranks, e those held here, R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """down(gelu_tanh(up(x))) with biases: the dense, shared and unconditional feed-forward.

    A sum of n such experts of width F is one of width n*F, so N_s shared or N_u unconditional experts (Eq. 5) are one
    module here.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_D: Tensor) -> Tensor:
        """Map (..., D) to (..., D); (0, D) passes too, with zero gradients for the parameters."""
        return self.down(F.gelu(self.up(x_D), approximate="tanh"))


class StackedExperts(nn.Module):
    """The routed experts held by one process, as stacked parameters.

    `first_expert` says which ones they are: local expert i is the routed expert first_expert + i. It names weights, for
    initialisation and conversion; the computation does not use it.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, *, backend: str = "grouped_mm", first_expert: int = 0) -> None:
        """Create uninitialised experts (`model.init` fills them).

        Args:
            backend: "grouped_mm" (grouped GEMM) or "loop" (one expert after the other; the reference).
        Raises: ValueError for another backend.
        """
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"expert backend {backend!r} is none of {', '.join(BACKENDS)}")
        self.backend = backend
        self.first_expert = first_expert
        self.up_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.down_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width))

    @property
    def num_local_experts(self) -> int:
        """e: experts held here."""
        return self.up_weight.shape[0]

    def forward(self, rows_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RD: sorted by local expert.
            tokens_per_expert_e: int64 counts with sum R; zeros are fine, also R = 0.
        Returns: (R, D).
        Gradient: reaches every parameter, zeros for an expert without rows.
        Sync: none with grouped_mm; one with loop.
        """
        return BACKENDS[self.backend](rows_RD, tokens_per_expert_e, self)


class _GroupedFeedForward(torch.autograd.Function):
    """All experts at once: two grouped GEMMs forward, four backward; biases added in place, their gradients by one GEMM.

    Written out because autograd's own version makes a temporary for every bias and sums its gradient row by row.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts_e: Tensor, up: Tensor, up_bias: Tensor, down: Tensor,
                down_bias: Tensor) -> Tensor:
        ends_e = counts_e.cumsum(0).to(torch.int32)
        experts = torch.arange(counts_e.numel(), device=counts_e.device)
        expert_R = torch.repeat_interleave(experts, counts_e, output_size=rows_RD.shape[0])
        pre_RF = F.grouped_mm(rows_RD, up.transpose(-2, -1), offs=ends_e).add_(up_bias.index_select(0, expert_R))
        hidden_RF = F.gelu(pre_RF, approximate="tanh")
        ctx.save_for_backward(rows_RD, pre_RF, hidden_RF, up, down, ends_e, expert_R)
        return F.grouped_mm(hidden_RF, down.transpose(-2, -1), offs=ends_e).add_(down_bias.index_select(0, expert_R))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, pre_RF, hidden_RF, up, down, ends_e, expert_R = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()  # grouped GEMM takes no expanded gradient, as that of a sum is
        membership_eR = F.one_hot(expert_R, up.shape[0]).T.to(grad_RD.dtype)
        grad_RF = torch.ops.aten.gelu_backward(F.grouped_mm(grad_RD, down, offs=ends_e), pre_RF, approximate="tanh")
        grad_down = F.grouped_mm(grad_RD.T, hidden_RF, offs=ends_e)
        grad_up = F.grouped_mm(grad_RF.T, rows_RD, offs=ends_e)
        grad_rows = F.grouped_mm(grad_RF, up, offs=ends_e) if ctx.needs_input_grad[0] else None
        return grad_rows, None, grad_up, membership_eR @ grad_RF, grad_down, membership_eR @ grad_RD


def _run_grouped(rows_RD: Tensor, counts_e: Tensor, experts: StackedExperts) -> Tensor:
    return _GroupedFeedForward.apply(rows_RD, counts_e, experts.up_weight, experts.up_bias, experts.down_weight,
                                     experts.down_bias)


def _run_loop(rows_RD: Tensor, counts_e: Tensor, experts: StackedExperts) -> Tensor:
    parameters = (experts.up_weight, experts.up_bias, experts.down_weight, experts.down_bias)
    outputs = []
    for rows, up, up_bias, down, down_bias in zip(rows_RD.split(counts_e.tolist()), *(p.unbind(0) for p in parameters),
                                                  strict=True):
        outputs.append(F.linear(F.gelu(F.linear(rows, up, up_bias), approximate="tanh"), down, down_bias))
    return torch.cat(outputs)


#: The implementations of `parallel.expert_backend`.
BACKENDS = {"grouped_mm": _run_grouped, "loop": _run_loop}
