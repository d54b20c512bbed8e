"""Where gradients go under ZeRO while the backward pass runs, replayed with tensors of the same sizes.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: gradients are copied into a bucket; a full bucket is reduced through
a flat copy; gradients of this rank's partition are kept. A parameter larger than the bucket is reduced alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from promoe_ds.analysis.plan.cluster import Layout
from promoe_ds.analysis.plan.trace import ShapeTrace


class GradientStaging:
    """Hooks the parameters of a network that is traced."""

    def __init__(self, network: nn.Module, layout: Layout, trace: ShapeTrace, *, kept: int) -> None:
        """Replay for gradients of which `kept` bytes stay with the rank."""
        self._layout, self._trace = layout, trace
        self._kept_elements, self._has_kept = kept // layout.number_bytes, False
        self._dtype = next(network.parameters()).dtype
        parameters = [p for p in network.parameters() if p.requires_grad]
        self._total = sum(p.numel() for p in parameters)
        self._filled = 0
        self._buffers: list[Tensor] = []
        self._waiting: list[nn.Parameter] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        layout = self._layout
        self._trace.label(parameter.grad, "gradients")
        if layout.zero_stage < 2:
            return
        if not self._buffers:
            size = min(layout.bucket, self._total) if layout.touched_only else layout.bucket
            count = 2 if layout.overlap and not layout.touched_only else 1
            self._buffers = [self._make(size, "buckets") for _ in range(count)]
        if self._filled + parameter.numel() > layout.bucket:
            self._reduce()
        self._filled += parameter.numel()
        if parameter.numel() > layout.bucket:
            self._waiting.append(parameter)
        else:
            parameter.grad = None

    def finish(self) -> None:
        """Reduce what is left, as the end of a backward pass does."""
        if self._layout.zero_stage == 2:
            self._reduce()
            self._buffers = []
        for parameter in self._waiting:
            parameter.grad = None

    def _reduce(self) -> None:
        if not self._filled:
            return
        if self._layout.touched_only:
            self._buffers.append(self._make(self._kept_elements * self._filled // self._total, "gradients"))
        elif not self._has_kept:
            self._buffers.append(self._make(self._kept_elements, "gradients"))
            self._has_kept = True
        self._make(min(self._filled, self._layout.bucket + max((p.numel() for p in self._waiting), default=0)), "buckets")
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting.clear()
        self._filled = 0

    def _make(self, elements: int, label: str) -> Tensor:
        return self._trace.label(torch.empty(elements, dtype=self._dtype), label)
