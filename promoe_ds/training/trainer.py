"""The trainer of one rank: model, experts' shards, optimizer, DeepSpeed engine; and one step of
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.backends.apex import build_apex_adam, check_apex
from promoe_ds.backends.deepspeed_private import (
    ZeroPartitions,
    build_engine,
    make_expert_groups,
)
from promoe_ds.backends.expert_parallel import mark_experts, shard_experts, share_centroids
from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.backends.te_layers import use_transformer_engine
from promoe_ds.backends.te_support import require_transformer_engine
from promoe_ds.backends.zero_private import DeviceGate, UpdateGate
from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.config import DeepSpeedPlan, RunConfig, plan_batches
from promoe_ds.config.optimizer import OptimizerConfig, learning_rate
from promoe_ds.data import LatentDataset, largest_bucket, sample_indices
from promoe_ds.data.dataset import DrawnLatents
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.host_memory import keep_freed_memory
from promoe_ds.distributed.host_topology import check_placement
from promoe_ds.errors import ConfigError
from promoe_ds.kernels.choice import can_run, uses_triton
from promoe_ds.logs import get_logger
from promoe_ds.model import build_model, freeze, initialise
from promoe_ds.model.dit import DiT
from promoe_ds.training.clipping import global_grad_norm
from promoe_ds.training.ema import Ema, FusedUpdate
from promoe_ds.training.health import HealthWatch, StepHealth, agree
from promoe_ds.training.loader import BatchLoader, Place
from promoe_ds.training.router_state import RouterState, give_superclasses, seed_centroids
from promoe_ds.training.routing_log import RoutingAccumulator
from promoe_ds.training.step import (
    StepResult,
    TrainingModule,
    TrainingOutput,
    Verdict,
    autocast_context,
)

_LOG = get_logger("trainer")

#: How the unconditional expert is computed, by `DiT.join_unconditional`.
_UNCONDITIONAL = {
    True: "one more group of the routed experts' product: every step has one shape",
    False: "by itself, if there is one",
}
#: Samples of the first batch that routers may start from.
_STARTING_SAMPLES = 32
#: Samples of the first batches whose normalisation is checked.
_CHECKED_SAMPLES = 64


class Trainer:
    """All that one rank trains with. `step` and `samples_seen` count what is done."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_plan: DeepSpeedPlan,
        context: DistributedContext,
        dataset: LatentDataset,
    ) -> None:
        """Build model and engine; every rank calls this together.

        Weights are a function of the seed, not of the layout.
        Raises: ConfigError for what is not installed, or not where the recipe needs it.
        """
        _require_libraries(config, deepspeed_plan, context.device)
        self.config, self.deepspeed_plan, self.context = config, deepspeed_plan, context
        self.dataset, self.batches = dataset, plan_batches(config, context.world_size)
        has_zero, is_alone = deepspeed_plan.zero_stage > 0, context.world_size == 1
        if is_alone and not has_zero and context.device.type == "cpu":
            keep_freed_memory()  # under ZeRO 2 this costs memory (docs/measured/performance.md)
        network, self.expert_group = _build_sharded_network(config, deepspeed_plan, context)
        compute = (
            use_transformer_engine(network, config, context.device)
            if config.precision.uses_transformer_engine
            else autocast_context(config, context.device.type)
        )
        self.network, self.module = network, TrainingModule(network, compute).train()
        optimizer = _build_optimizer(
            self.module, config.optimizer, deepspeed_plan, is_sharded=self.expert_group is not None
        )
        self.ema = Ema(optimizer, config.optimizer.averages)
        self.engine = build_engine(
            self.module,
            optimizer,
            deepspeed_plan.json,
            RecordingStorage(background=config.train.async_checkpoint),
        )
        # apex's optimizer does not read the device's decision: the host waits for each step.
        uses_apex = config.optimizer.implementation == "apex"
        on_device = decides_on_device(context, deepspeed_plan) and not uses_apex
        self._gate = UpdateGate(self.engine.optimizer) if has_zero and not on_device else None
        self._device_gate = None
        fuses = uses_triton(next(self.module.parameters()), config.parallel.kernels)
        if fuses:  # after ZeRO has laid the weights where they stay
            _LOG.info("unconditional expert: %s", _UNCONDITIONAL[network.join_unconditional()])
        self._health = HealthWatch(self.module, hooks=not on_device)
        if on_device:
            update = FusedUpdate(optimizer, self.ema) if fuses else None
            self._device_gate = DeviceGate(self.engine.optimizer, self._health.see_norms, update)
        #: How many results may be unread while training continues.
        self.results_behind = int(on_device)
        self.routing = RoutingAccumulator(config, network, context)
        self._router_state = RouterState(network)
        give_superclasses(network, config)
        self.loader = BatchLoader(dataset, self.module.objective, config, self.batches, context)
        #: Asked once a step; where one rank answers yes, all learn of it in that step's result.
        self.shutdown_requested: Callable[[], bool] = bool
        self.step = self.samples_seen = 0

    def start_routers(self) -> None:
        """Start routers that learn from data, before the first step of a run: the same on any
        number of ranks.
        """
        slots = range(min(self.batches.global_batch, _STARTING_SAMPLES))
        objective = self.module.objective
        place = Place(self.step, self.samples_seen)
        batch = self.loader.make(place, slots).to(self.context.device)
        # Their own condition: dropout could leave no sample for the centroids to start from.
        condition = self.loader.samples(place, slots)[1].to(self.context.device)
        with self.routing.waits_paused():
            seed_centroids(
                self.network,
                condition,
                objective.noised(batch),
                objective.timestep(batch),
                self.config.train.seed,
            )

    def check_latents(self) -> None:
        """Compare the first latents with what normalised ones are like: rank 0 reads them for all.

        Raises: DataError, on every rank, if they are scaled twice, never, or as another
            autoencoder's.
        """
        dataset, start = largest_bucket(self.dataset), self.samples_seen
        if isinstance(dataset, DrawnLatents) and self.config.data.check_latents:
            indices = sample_indices(
                len(dataset), seed=self.config.train.seed, start=start, count=_CHECKED_SAMPLES
            )
            positions = np.arange(start, start + _CHECKED_SAMPLES)
            self.context.on_main(lambda: dataset.check(dataset.take(indices, positions)[0]))

    @contextmanager
    def averaged_network(self) -> Iterator[DiT]:
        """Yield the network in evaluation mode with the first average of the weights, or, before
        the first update, what it would start from; all ranks call this together.

        Collectives: ZeRO's gathering of the weights, twice.
        """
        self._swap_averages()
        self.network.eval()
        try:
            yield self.network
        finally:
            self.network.train()
            self._swap_averages()

    def _swap_averages(self) -> None:
        self.ema.swap()
        if self.deepspeed_plan.zero_stage > 0:
            ZeroPartitions(self.engine.optimizer).write_back()

    def train_step(self) -> StepResult:
        """Run one optimizer step; all ranks skip it together where a loss or gradient is not
        finite.

        On a GPU under ZeRO the device decides and the result is read later: the host never waits
        for the step.
        """
        lr = self._follow_schedules()
        terms: dict[str, torch.Tensor] = {}
        for micro_step in range(self.batches.accumulation):
            output = self._forward_and_backward(micro_step)
            for name, value in output.terms.items():
                terms[name] = terms.get(name, 0.0) + value.detach() / self.batches.accumulation
            if micro_step < self.batches.accumulation - 1:
                self.engine.step()
        health = self._health.end_step()
        flags = agree(health.is_bad(), self.shutdown_requested())
        decide = self._decide_here if self._device_gate is None else self._decide_on_device
        read = decide(health, flags)
        self.step += 1
        self.samples_seen += self.batches.global_batch
        return StepResult(terms, lr, read)

    def _decide_here(self, health: StepHealth, flags: Tensor) -> Callable[[], Verdict]:
        """Read what was found, then update or skip.  Sync: two."""
        step, (is_bad, stop) = self.step, flags.tolist()
        problem = health.describe(step, self.context) if is_bad else ""
        if self._gate is None:
            norm = self._clip(skip=bool(problem))
            self.engine.step()
        else:
            self._gate.set(skip=bool(problem))
            self.engine.step()
            self._gate.confirm()
            norm = self.engine.get_global_grad_norm()
        verdict = self._verdict(step, float(norm), problem, stop)
        self._router_state.update_running_state(skip=bool(verdict.problem))
        return lambda: verdict

    def _decide_on_device(self, health: StepHealth, flags: Tensor) -> Callable[[], Verdict]:
        """Update where nothing was found; what was, and the norm, come to the host later.  Sync:
        none.
        """
        step = self.step
        self._device_gate.set(flags[0])
        self.engine.step()
        norm, skip = self._device_gate.confirm()
        self._router_state.update_running_state(skip=skip)
        values = torch.cat([flags, norm.view(1)])
        on_host = torch.empty(values.shape, pin_memory=values.is_cuda)
        on_host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event() if values.is_cuda else None
        if arrived is not None:
            arrived.record()

        def read() -> Verdict:
            if arrived is not None:
                arrived.synchronize()
            is_bad, stop, norm = on_host.tolist()
            problem = health.describe(step, self.context) if is_bad else ""
            return self._verdict(step, norm, problem, stop)

        return read

    def _verdict(self, step: int, norm: float, problem: str, stop: float) -> Verdict:
        if not problem and not math.isfinite(norm):
            # Every gradient is finite, their norm overflows: the update was left out as well.
            problem = f"step {step}: the norm of all gradients is not finite"
        return Verdict(float("nan") if problem else norm, problem, stop_requested=bool(stop))

    def _follow_schedules(self) -> float:
        lr = learning_rate(self.step, self.config.train.max_steps, self.config.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.ema.updates = self.step
        self._router_state.begin_step(self.step)
        return lr

    def _forward_and_backward(self, micro_step: int) -> TrainingOutput:
        place = Place(self.step, self.samples_seen, micro_step)
        batch = self.loader.take(place).to(self.context.device)
        output = self.engine(batch)
        self._health.see_loss(output.loss)
        self.engine.backward(output.loss)
        self.routing.add(output.plans, batch.sigma_B, batch.condition.group_B, batch.latent_size)
        self._router_state.add(output.plans)
        return output

    def _clip(self, *, skip: bool) -> Tensor:
        """Clip the gradients, or drop them where the update is skipped; return their norm."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = global_grad_norm(parameters, self.expert_group)
        skip = skip or not bool(torch.isfinite(norm))
        self.engine.optimizer.overflow = skip  # by which DeepSpeed counts the updates left out
        if skip:
            for parameter in parameters:
                parameter.grad = None  # no optimizer touches what has no gradient
        elif (max_norm := self.config.optimizer.max_grad_norm) > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def decides_on_device(context: DistributedContext, plan: DeepSpeedPlan) -> bool:
    """Whether the device decides about updates: a GPU, under ZeRO, with the optimizer beside it."""
    return context.device.type == "cuda" and plan.zero_stage > 0 and not plan.offloads


def _require_libraries(config: RunConfig, plan: DeepSpeedPlan, device: torch.device) -> None:
    if config.precision.uses_transformer_engine:
        require_transformer_engine(config.precision, device)
    if config.optimizer.implementation == "apex":
        check_apex(device, offloads=plan.offloads)
    if config.parallel.kernels == "triton" and not can_run(device):
        raise ConfigError(
            f"parallel.kernels=triton needs Triton and a GPU, and this process computes on"
            f" {device.type}: install triton (CUDA builds of torch bring it) and use a GPU, or set"
            " parallel.kernels=auto"
        )


def _build_optimizer(
    module: TrainingModule, settings: OptimizerConfig, plan: DeepSpeedPlan, *, is_sharded: bool
) -> torch.optim.Optimizer:
    uses_apex = settings.implementation == "apex"
    _LOG.info(
        "optimizer: %s, its state %s",
        "NVIDIA apex's FusedAdam" if uses_apex else "torch's fused AdamW",
        "on the host" if plan.offloads else "with the weights",
    )
    groups = parameter_groups(module, settings, plan.precision)
    if plan.zero_stage > 0 and is_sharded and not any(group.get("moe") for group in groups):
        raise ConfigError(
            "train.freeze leaves no parameter of the routed experts to train, which DeepSpeed's"
            " ZeRO needs under expert parallelism: leave some out, as blocks.*.moe.routed.*_bias,"
            " or set parallel.ep_size=1"
        )
    if uses_apex:
        return build_apex_adam(groups, settings)
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def _build_sharded_network(
    config: RunConfig, plan: DeepSpeedPlan, context: DistributedContext
) -> tuple[DiT, dist.ProcessGroup | None]:
    """Build the network with this rank's experts; cut on the meta device, before any memory is
    taken.
    """
    with torch.device("meta"):
        network = build_model(config)
    freeze(network, config.train.freeze)
    expert_group = None
    if config.parallel.resolved_dispatch != "local":
        data_before_expert = bool(plan.json.get("use_data_before_expert_parallelism", False))
        expert_group = make_expert_groups(
            config.parallel.ep_size,
            config.parallel.timeout_seconds,
            data_before_expert=data_before_expert,
        )
        check_placement(expert_group, context, required=config.parallel.expert_groups == "node")
        shard_experts(network, expert_group, context.device)
    if config.routing.rcl_scope == "global" and context.world_size > 1:
        share_centroids(network)
    network.to_empty(device=context.device)
    initialise(network, config.train.seed)
    mark_experts(network)
    for block in network.blocks if config.parallel.compile else ():
        block.compile_dense()
    return network, expert_group
