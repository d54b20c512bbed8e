"""What DeepSpeed's engine and the update do in a step, replayed on tensors of the same sizes.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and runtime/engine.py: gradients are copied
into a bucket; a full one is averaged, through a flat copy where it holds several ranks' parts, and
this rank's part is copied back and kept. A parameter larger than the bucket is reduced alone.
Where the device decides about updates, the trainer's own `GradientSums` run instead.
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
from promoe_ds.planning.zero import States, partition_size
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

    def __init__(self, places: Sequence[Place], settings: SumSettings, trace: ShapeTrace) -> None:
        self._trace = trace
        super().__init__(places, settings, self._reduce_traced)

    def continue_step(self) -> None:
        """Find the sums of an earlier pass."""
        for place in self._places:
            self.flat_sum(place.group)
        self._arrived.update(self._places)

    def _reduce_traced(self, bucket: Tensor, ranks: dist.ProcessGroup) -> Any:
        dist.all_reduce(self._trace.label(bucket, "buckets"), group=ranks)
        return SimpleNamespace(wait=lambda: None)

    def flat_sum(self, group: int) -> Tensor:
        return self._trace.label(super().flat_sum(group), "gradients")


class EngineReplay:
    """Replays what happens to the gradients of a module beside and after its backward pass."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ReplayGroup],
        layout: ClusterLayout,
        states: States,
        settings: OptimizerConfig,
        trace: ShapeTrace,
    ) -> None:
        """Hook the module's parameters, and make its states, which the trace does not count."""
        self._layout, self._groups, self._trace = layout, groups, trace
        parameters = [p for group in groups for p in group.parameters]
        self._total, self._dtype = sum(p.numel() for p in parameters), parameters[0].dtype
        whole = states.weights if layout.zero_stage == 1 else 0
        self._kept = (states.gradients - whole) // layout.number_bytes
        self._owned = [partition_size(*group.sizes) for group in groups]
        self._weights = [
            torch.empty(size * group.sizes[1], dtype=self._dtype)
            for size, group in zip(self._owned, groups, strict=True)
        ]
        self._places: dict[nn.Parameter, Place] = {}
        self._touched: dict[nn.Parameter, range] = {}
        for number in range(len(groups)):
            self._lay(number)
        self._make_states(parameters, settings)
        self._buckets: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._earlier: Tensor | None = None
        self._waiting: list[nn.Parameter] = []
        decides = layout.decides_on_device
        self._health = HealthWatch(module, hooks=not decides)
        self._sums = self._make_sums() if decides else None
        self._norms: list[Tensor] = []
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
            self._touched[parameter] = range(start // size, (end - 1) // size + 1)

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
        return _TracedSums(list(self._places.values()), settings, self._trace)

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
        kept = (each for one in self._optimizer.state.values() for each in one.values())
        self._trace.know([*self._weights, *self._masters, *kept])

    def begin_backward(self, loss: Tensor) -> None:
        """Take note of the loss; find the gradients of an earlier pass, where there was one."""
        self._health.see_loss(loss)
        if self._layout.accumulation > 1 and self._layout.zero_stage == 2:
            if self._sums is not None:
                self._sums.continue_step()
            else:
                self._earlier = self._make(self._kept, "gradients")

    def _take(self, parameter: nn.Parameter) -> None:
        layout, gradient = self._layout, parameter.grad
        self._trace.label(gradient, "gradients")
        if layout.zero_stage == 0:
            return
        if self._sums is not None:
            with self._trace.during(BESIDE):
                self._sums.take(self._places[parameter])
            return
        if not self._buckets:
            count = 2 if layout.overlap else 1
            self._buckets = [self._make(layout.bucket, "buckets") for _ in range(count)]
        filled = sum(p.numel() for p in self._waiting)
        if filled + parameter.numel() > layout.bucket:
            self._reduce(BESIDE)
        self._waiting.append(parameter)
        if parameter.numel() <= layout.bucket:
            with self._trace.during(BESIDE):
                self._buckets[0][: parameter.numel()].copy_(gradient.view(-1))
            self._let_go(parameter)

    def _let_go(self, parameter: nn.Parameter) -> None:
        if self._layout.zero_stage == 2:
            parameter.grad = None

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
        if self._sums is not None:
            return
        if self._layout.zero_stage > 0:
            self._reduce(AFTER)
            if self._earlier is not None:
                own = sum(p.numel() for p, place in self._places.items() if place.part)
                with self._trace.during(AFTER):
                    self._earlier[:own].add_(self._earlier[:own])
        elif self._layout.world_size > 1:
            with self._trace.during(AFTER):
                self._reduce_without_zero()
        self._buckets.clear()

    @torch.no_grad()
    def _reduce(self, part: str) -> None:
        """Average a bucket, or one larger parameter, over the ranks; keep this rank's part."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        filled = sum(p.numel() for p in waiting)
        # A CPU maps pages of kept gradients as they come.
        if self._layout.on_cpu or not self._gradients:
            share = filled if self._layout.on_cpu else self._total
            self._gradients.append(self._make(self._kept * share // self._total, "gradients"))
        is_alone = filled > self._layout.bucket
        flat = waiting[-1].grad.view(-1) if is_alone else self._buckets[0][:filled]
        with self._trace.during(part):
            flat.div_(self._layout.world_size)
            places = [self._places[p] for p in waiting]
            for ranks in dict.fromkeys(place.ranks for place in places):
                same = [place for place in places if place.ranks is ranks]
                self._reduce_over(ranks, flat, same, are_all=len(same) == len(places))
        for parameter in waiting:
            self._let_go(parameter)

    def _reduce_over(
        self,
        ranks: dist.ProcessGroup,
        flat: Tensor,
        places: list[Place],
        *,
        are_all: bool,
    ) -> None:
        tensors = [flat[: place.parameter.numel()] for place in places]
        touched = {partition for place in places for partition in self._touched[place.parameter]}
        reduced = flat
        if len(touched) > 1 or not are_all:
            reduced = self._trace.label(torch.cat(tensors), "buckets")
        dist.all_reduce(reduced, group=ranks)
        for tensor, place in zip(tensors, places, strict=True):
            if place.part:
                own = place.part.numel
                tensor[:own].copy_(reduced[:own])  # into the bucket,
                tensor.copy_(tensor)  # and from there to what is kept

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
        update = None
        if self._sums is not None:
            is_one = self._layout.world_size == self._layout.accumulation == 1
            norms = self._norms if is_one else [_norm(flat) for flat in own]
            torch.stack(norms).square().sum().sqrt()
            adam.found_inf, adam.grad_scale = torch.zeros(()), torch.ones(())
            update = FusedUpdate(adam, self._ema) if uses_triton(own[0], kernels) else None
        else:
            for gradient in own:
                _norm(gradient)
        for group, (gradient, master) in enumerate(zip(own, self._masters, strict=True)):
            if update is not None:
                update(group, gradient, gradient, adam.found_inf, adam.grad_scale)
                continue
            flat = gradient
            if self._sums is None:
                flat = self._trace.label(torch.cat([gradient, gradient[:0]]), "gradients")
            master.grad = self._trace.label(flat.to(torch.float32), "gradients")
            del flat
            adam.step()
            master.grad = None
            gradient.copy_(master)

    def _make(self, elements: int, label: str) -> Tensor:
        return self._trace.label(torch.empty(elements, dtype=self._dtype), label)


def _norm(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat, dtype=torch.float32)
