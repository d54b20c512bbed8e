"""Decisions about updates in place of ZeRO 1 and 2: by the host, or on the device."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.backends.deepspeed_private import read_private
from promoe_ds.backends.reduction_private import GradientReducer, See
from promoe_ds.private_names import moved


class UpdateGate:
    """Decides in place of ZeRO's own scan for overflow whether an update is made."""

    def __init__(self, zero_optimizer: Any) -> None:
        """Answer for a ZeRO 1 or 2 optimizer from now on."""
        for name in ("overflow", "check_grad_overflow", "check_overflow"):
            read_private(zero_optimizer, name)
        self._optimizer, self._skip, self._was_asked = zero_optimizer, False, False
        zero_optimizer.check_grad_overflow = True
        zero_optimizer.check_overflow = self._answer

    def set(self, *, skip: bool) -> None:
        """Say before an update whether to skip it."""
        self._skip, self._was_asked = skip, False

    def confirm(self) -> None:
        """Check after an update that ZeRO has asked.

        Raises: ConfigError if it did not: then a step that is not finite would have been taken.
        """
        if not self._was_asked:
            raise moved("deepspeed", "call of DeepSpeedZeroOptimizer.check_overflow within step")

    def _answer(self, partition_gradients: bool = True) -> None:
        self._was_asked = True
        self._optimizer.overflow = self._skip


_STAGE: Any = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
#: What `DeviceGate` takes of a step of ZeRO.
_OF_A_STEP = (
    "_global_grad_norm",
    "clip_grad",
    "scaled_global_norm",
    "unscale_and_clip_grads",
    "allgather_bucket_size",
    "bit16_groups_flat",
    "check_grad_overflow",
    "dp_process_group",
    "micro_step_id",
    "nccl_start_alignment_factor",
    "parallel_partitioned_bit16_groups",
    "real_dp_process_group",
)


class FlatUpdate(Protocol):
    """What updates the flat weights of a parameter group, see `train.ema.FusedUpdate`."""

    def is_ready(self) -> bool:
        """Whether all state exists."""

    def __call__(
        self, group: int, grad_N: Tensor, out_N: Tensor, is_bad: Tensor, divisor: Tensor
    ) -> None:
        """Update a group and write its weights to `out_N`."""


class DeviceGate:
    """Decides on the device about updates under ZeRO 1 and 2, and clips: torch's fused AdamW reads
    both there.

    ZeRO reads its norm several times, takes it in fp64, and waits for the whole device; none of it
    is left.
    """

    def __init__(self, zero_optimizer: Any, see: See, update: FlatUpdate | None = None) -> None:
        """Answer for a ZeRO 1 or 2 optimizer, whose state is on the device, from now on.

        Args:
            see: gets every gradient's norm on this rank, see `GradientReducer`.
            update: updates the weights in place of AdamW wherever it is ready.
        """
        for name in _OF_A_STEP:
            read_private(zero_optimizer, name)
        self._zero, self._update = zero_optimizer, update
        self._adam = read_private(zero_optimizer, "optimizer")
        self._is_bad = torch.zeros((), device=read_private(zero_optimizer, "device"))
        self._was_asked = False
        self._gradients = GradientReducer(zero_optimizer, see)
        #: The mean over ranks is taken where a gradient is divided anyway.
        self._ranks = dist.get_world_size(zero_optimizer.dp_process_group)
        zero_optimizer.check_grad_overflow = False
        zero_optimizer.scaled_global_norm = self._norm
        zero_optimizer.unscale_and_clip_grads = self._scale
        self._plain_step, zero_optimizer.step = zero_optimizer.step, self._step

    def set(self, is_bad: Tensor) -> None:
        """Say before an update whether anything was not finite, on any rank: 0 or 1, fp32."""
        self._is_bad, self._was_asked = is_bad, False

    def confirm(self) -> tuple[Tensor, Tensor]:
        """Check after an update that ZeRO has asked; return the gradients' norm and whether the
        update was left out, scalars on the device.

        Raises: ConfigError if it did not: then a step that is not finite would have been taken.
        """
        if not self._was_asked:
            raise moved(
                "deepspeed", "call of DeepSpeedZeroOptimizer.unscale_and_clip_grads within step"
            )
        return self._zero._global_grad_norm, self._adam.found_inf

    def _norm(self, norm_type: float = 2) -> Tensor:
        """Return the norm of the mean gradient.  Collectives: one, if there are other ranks."""
        total = torch.stack(self._gradients.own_norms()).square().sum()
        if self._ranks > 1:
            dist.all_reduce(total, group=self._zero.dp_process_group)
        return total.sqrt() / self._ranks

    def _scale(self, gradients: Any, norm: Tensor) -> None:
        self._was_asked = True
        self._adam.found_inf = torch.maximum(self._is_bad, (~torch.isfinite(norm)).float())
        divisor = torch.full_like(norm, self._ranks)
        if self._zero.clip_grad > 0:
            divisor = ((norm + 1e-6) * (self._ranks / self._zero.clip_grad)).clamp(min=self._ranks)
        self._adam.grad_scale = divisor

    def _step(self, closure: Any = None) -> None:
        """Step as ZeRO does; with `update`, without its copies of gradients and weights in other
        dtypes.
        """
        if self._update is None or not self._update.is_ready():
            # ZeRO would read the norm; `_scale` looks at it on the device.
            reading, _STAGE.is_invalid_grad_norm = _STAGE.is_invalid_grad_norm, lambda norm: False
            try:
                self._plain_step(closure)
            finally:
                _STAGE.is_invalid_grad_norm = reading
            return
        zero = self._zero
        zero.micro_step_id, zero.overflow = -1, False  # as ZeRO begins a step
        zero._global_grad_norm = self._norm()
        self._scale(None, zero._global_grad_norm)
        for group, weights in enumerate(zero.parallel_partitioned_bit16_groups):
            rank = dist.get_rank(group=zero.real_dp_process_group[group])
            self._update(
                group,
                self._gradients.take_sum(group),
                weights[rank].data,
                self._adam.found_inf,
                self._adam.grad_scale,
            )
        _STAGE.all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
