"""What the engine and the update do with a step's gradients, on tensors of the same sizes.

Under ZeRO the trainer's own `GradientSums` run, as on a GPU. With an offloaded optimizer DeepSpeed
sums instead: its buckets, which stay on the device, are counted beside, so that the plan is rather
too large.
Source without ZeRO: deepspeed 0.19.8, runtime/engine.py.
`tests/fake_cuda/test_planner.py` compares bytes and collectives with the engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends.deepspeed_private import OwnedSlice
from promoe_ds.backends.gradient_sums import GradientSums, Place, SumSettings
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.kernels.choice import uses_triton
from promoe_ds.planning.cluster import ClusterLayout
from promoe_ds.planning.trace import ShapeTrace
from promoe_ds.planning.zero import partition_size
from promoe_ds.training.clipping import global_grad_norm
from promoe_ds.training.ema import Ema, FusedUpdate
from promoe_ds.training.health import HealthWatch

#: Parts of a step beside its passes: gradients that are reduced while the backward pass runs, and
#: after it; the update; the gathering of the weights.
BESIDE, AFTER, UPDATE, WEIGHTS = "gradients beside", "gradients after", "update", "weights"
#: Numbers that DeepSpeed without ZeRO reduces at once.
_REDUCED_AT_ONCE = 500_000_000


@dataclass(frozen=True)
class ReplayGroup:
    """A parameter group and the ranks that it is partitioned over."""

    parameters: list[nn.Parameter]
    replicas: dist.ProcessGroup

    @property
    def sizes(self) -> tuple[list[int], int]:
        """The elements of its parameters, and the number of ranks."""
        return [p.numel() for p in self.parameters], dist.get_world_size(self.replicas)


class _TracedSums(GradientSums):
    """The trainer's sums of gradients, seen by a trace."""

    trace: ShapeTrace

    def __init__(self, places: Sequence[Place], settings: SumSettings) -> None:
        super().__init__(places, settings, self._reduce_traced)

    def continue_step(self) -> None:
        """Find the sums of an earlier pass."""
        for place in self._places:
            self.flat_sum(place.group)
        self._arrived.update(self._places)

    def _reduce_traced(self, bucket: Tensor, ranks: dist.ProcessGroup) -> Any:
        dist.all_reduce(self.trace.label(bucket, "buckets"), group=ranks)
        return SimpleNamespace(wait=lambda: None)

    def flat_sum(self, group: int) -> Tensor:
        return self.trace.label(super().flat_sum(group), "gradients")


class EngineReplay:
    """Replays what happens to the gradients of a module beside and after its backward pass."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ReplayGroup],
        layout: ClusterLayout,
        settings: OptimizerConfig,
    ) -> None:
        """Hook the module's parameters, and make its states."""
        self._layout, self._groups = layout, groups
        parameters = [p for group in groups for p in group.parameters]
        self._dtype = parameters[0].dtype
        self._owned = [partition_size(*group.sizes) for group in groups]
        self._weights = [
            torch.empty(size * group.sizes[1], dtype=self._dtype)
            for size, group in zip(self._owned, groups, strict=True)
        ]
        self._places: dict[nn.Parameter, Place] = {}
        for number in range(len(groups)):
            self._lay(number)
        self._make_states(parameters, settings)
        self._sums = self._make_sums() if layout.zero_stage > 0 else None
        self._health = HealthWatch(module, hooks=self._sums is None)
        self._norms: list[Tensor] = []
        self._deepspeed_buckets: Tensor | None = None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _lay(self, number: int) -> None:
        """Lay a group's parameters into its partitions, one behind the other: rank 0's first."""
        group, size = self._groups[number], self._owned[number]
        ends = accumulate(p.numel() for p in group.parameters)
        for parameter, end in zip(group.parameters, ends, strict=True):
            start = end - parameter.numel()
            owned = min(end, size) - start
            part = OwnedSlice(parameter, 0, start, owned) if owned > 0 else None
            self._places[parameter] = Place(parameter, group.replicas, number, part)

    def _make_sums(self) -> _TracedSums:
        layout = self._layout
        settings = SumSettings(
            partitions=self._owned,
            bucket=layout.bucket,
            overlaps=layout.overlap,
            at_end=layout.zero_stage == 1,
            sent_as=self._dtype,
            kept_as=self._dtype,
        )
        return _TracedSums(list(self._places.values()), settings)

    def _make_states(self, parameters: list[nn.Parameter], settings: OptimizerConfig) -> None:
        """Make the optimizer as the trainer does, with all its state."""
        self._masters = (
            [nn.Parameter(torch.empty(size)) for size in self._owned]
            if self._layout.zero_stage > 0
            else parameters
        )
        self._optimizer = torch.optim.AdamW([{"params": [p]} for p in self._masters], fused=True)
        self._ema = Ema(self._optimizer, settings.averages)
        for parameter in self._masters:
            names = ("exp_avg", "exp_avg_sq", *settings.averages)
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                **{name: torch.empty_like(parameter.detach()) for name in names},
            }

    def start(self, trace: ShapeTrace) -> None:
        """Be seen by a trace, which counts none of the states."""
        self._trace = trace
        if self._sums is not None:
            self._sums.trace = trace
        kept = (each for one in self._optimizer.state.values() for each in one.values())
        trace.know([*self._weights, *self._masters, *kept])

    def begin_backward(self, loss: Tensor) -> None:
        """Take note of the loss; find the gradients of an earlier pass, where there was one."""
        self._health.see_loss(loss)
        layout = self._layout
        if layout.offload:
            buckets = torch.empty((1 + layout.overlap) * layout.bucket, dtype=self._dtype)
            self._deepspeed_buckets = self._trace.label(buckets, "buckets")
        if layout.zero_stage == 2 and layout.accumulation > 1:
            self._sums.continue_step()

    def _take(self, parameter: nn.Parameter) -> None:
        self._trace.label(parameter.grad, "gradients")
        if self._sums is not None:
            with self._trace.during(BESIDE):
                self._sums.take(self._places[parameter])

    @torch.no_grad()
    def finish_backward(self) -> None:
        """Reduce what is left."""
        if self._sums is not None:
            with self._trace.during(AFTER):
                norms = self._sums.end_pass()
                self._sums.end_step()
            self._norms = list(norms.values())
            self._health.see_norms([place.parameter for place in norms], self._norms)
        self._health.end_step().is_bad()
        self._deepspeed_buckets = None
        if self._sums is None and self._layout.world_size > 1:
            with self._trace.during(AFTER):
                self._reduce_without_zero()

    def _reduce_without_zero(self) -> None:
        for group in self._groups:
            parts: list[list[Tensor]] = [[]]
            for parameter in group.parameters:
                if sum(each.numel() for each in parts[-1]) > _REDUCED_AT_ONCE:
                    parts.append([])
                parts[-1].append(parameter.grad.view(-1))
            for gradients in parts:
                flat = self._trace.label(torch.cat(gradients), "buckets")
                dist.all_reduce(flat, group=group.replicas)
                flat.mul_(1 / self._layout.world_size)
                for gradient in gradients:
                    gradient.copy_(flat[: len(gradient)])

    @torch.no_grad()
    def update(self, kernels: str) -> None:
        """Clip and update, where the device does so, and gather the weights."""
        with self._trace.during(UPDATE):
            if self._layout.zero_stage == 0:
                norm = global_grad_norm(self._masters, None)
                nn.utils.clip_grads_with_norm_(self._masters, 1.0, norm)
                self._optimizer.step()
                return
            if not self._layout.offload:
                self._update_partitions(kernels)
        # Its name until torch 2.12.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._trace.during(WEIGHTS):
            for group, own, weights in zip(self._groups, self._owned, self._weights, strict=True):
                if len(weights) > own:
                    gather(weights, weights[:own], group=group.replicas)

    def _update_partitions(self, kernels: str) -> None:
        # A group's own weights stand for its kept gradients: as many numbers of the same dtype.
        own = [weights[:size] for weights, size in zip(self._weights, self._owned, strict=True)]
        adam: Any = self._optimizer  # torch's AdamW reads two attributes that it does not declare
        is_one = self._layout.world_size == self._layout.accumulation == 1
        norms = self._norms if is_one else [_norm(flat) for flat in own]
        torch.stack(norms).square().sum().sqrt()
        adam.found_inf, adam.grad_scale = torch.zeros(()), torch.ones(())
        update = FusedUpdate(adam, self._ema) if uses_triton(own[0], kernels) else None
        for group, (gradient, master) in enumerate(zip(own, self._masters, strict=True)):
            if update is not None:
                update(group, gradient, gradient, adam.found_inf, adam.grad_scale)
                continue
            master.grad = self._trace.label(gradient.to(torch.float32), "gradients")
            adam.step()
            master.grad = None
            gradient.copy_(master)


def _norm(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat, dtype=torch.float32)
