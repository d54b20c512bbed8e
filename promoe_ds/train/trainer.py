"""Building a training session: model, experts' placement, optimizer, DeepSpeed engine; and one step of it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from promoe_ds.backends.expert_parallel import create_expert_groups, mark_experts, shard_experts, share_centroids
from promoe_ds.backends.te_layers import use_transformer_engine
from promoe_ds.backends.te_support import require_transformer_engine
from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.config import BatchPlan, DeepSpeedPlan, RunConfig
from promoe_ds.data import LatentDataset, sample_indices
from promoe_ds.diffusion import DiffusionBatch, draw_batch
from promoe_ds.distributed.context import Ranks
from promoe_ds.distributed.host_topology import check_placement
from promoe_ds.logs import get_logger
from promoe_ds.model import build_model, initialise
from promoe_ds.train.clipping import clip_gradients, global_grad_norm
from promoe_ds.train.health import HealthWatch
from promoe_ds.train.optimizer import AdamWithEma, learning_rate, parameter_groups
from promoe_ds.train.router_state import RouterState, give_superclasses, seed_centroids
from promoe_ds.train.routing_log import RoutingAccumulator
from promoe_ds.train.step import StepResult, TrainingModule

_LOG = get_logger("session")

#: Samples of the first batch that routers may start from, and whose scale is checked.
_STARTING_SAMPLES = 32
#: Standard deviations of latents that noise of deviation 1 is made for.
_USUAL_DEVIATIONS = (0.5, 2.0)


@dataclass(kw_only=True)
class Session:
    """All that a training process holds."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    batches: BatchPlan
    ranks: Ranks
    dataset: LatentDataset
    engine: deepspeed.DeepSpeedEngine
    optimizer: AdamWithEma
    health: HealthWatch
    routing: RoutingAccumulator
    router_state: RouterState
    expert_group: dist.ProcessGroup | None
    step: int = 0
    samples_seen: int = 0

    @property
    def module(self) -> TrainingModule:
        """The module inside the engine."""
        return self.engine.module


def build_session(config: RunConfig, deepspeed_plan: DeepSpeedPlan, batches: BatchPlan, ranks: Ranks,
                  dataset: LatentDataset) -> Session:
    """Build model and engine; every rank calls this together.

    Experts are cut on the meta device, before any memory is taken; weights are a function of the seed, not of the layout.
    """
    if config.precision.uses_transformer_engine:
        require_transformer_engine(config.precision, ranks.device)
    with torch.device("meta"):
        network = build_model(config)
    expert_group = None
    if config.parallel.resolved_dispatch != "local":
        topology = bool(deepspeed_plan.json.get("use_data_before_expert_parallelism", False))
        expert_group = create_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds, data_before_expert=topology)
        check_placement(expert_group, required=config.parallel.expert_groups == "node")
        shard_experts(network, expert_group, ranks.device)
    if config.routing.rcl_scope == "global" and ranks.world_size > 1:
        share_centroids(network)
    network.to_empty(device=ranks.device)
    initialise(network, config.train.seed)
    mark_experts(network)
    for block in network.blocks if config.parallel.compile else ():
        block.compile_dense()
    uses_te = config.precision.uses_transformer_engine
    module = TrainingModule(network, use_transformer_engine(network, config, ranks.device) if uses_te else nullcontext).train()
    optimizer = AdamWithEma(parameter_groups(module, config.optimizer, deepspeed_plan.precision), config.optimizer)
    _LOG.info("optimizer: torch's fused AdamW, its state %s", "on the host" if deepspeed_plan.offloads else "with the weights")
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_plan.json, dist_init_required=False)
    engine.checkpoint_engine = RecordingStorage(background=config.train.async_checkpoint)
    # Rank 0 would copy converters that cannot read expert-parallel shards, past our storage, into every checkpoint folder.
    engine._copy_recovery_script = lambda save_path: None
    health = HealthWatch(module, ranks)
    routing = RoutingAccumulator(config, network, ranks)
    give_superclasses(network, config)
    return Session(config=config, deepspeed_plan=deepspeed_plan, batches=batches, ranks=ranks, dataset=dataset, engine=engine,
                   optimizer=optimizer, health=health, routing=routing, router_state=RouterState(network),
                   expert_group=expert_group)


def check_scale(session: Session) -> None:
    """Warn, by rank 0, of a first batch whose standard deviation is far from 1: scaled twice, or not at all."""
    clean, _ = _take(session, range(min(session.batches.global_batch, _STARTING_SAMPLES)))
    deviation, (least, most) = clean.std().item(), _USUAL_DEVIATIONS
    if session.ranks.is_main and not least <= deviation <= most:
        _LOG.warning("the first batch has a standard deviation of %.3g, about 1 is usual: check data.latent_scale=%g (latents that "
                     "were stored scaled need 1)", deviation, session.config.data.latent_scale)


def start_routers(session: Session) -> None:
    """Give routers that start from data their start, before the first step of a run: the same on any number of ranks."""
    slots = range(min(session.batches.global_batch, _STARTING_SAMPLES))
    batch, objective = make_batch(session, slots), session.module.objective
    # Their own labels: dropout could leave no sample for the centroids to start from.
    labels = _take(session, slots)[1].to(session.ranks.device)
    seed_centroids(session.module.denoiser, labels, objective.noised(batch), objective.timestep(batch),
                   session.config.train.seed)


def make_batch(session: Session, slots: range) -> DiffusionBatch:
    """Return the samples of some slots of the current step's global batch, noise and dropout drawn."""
    clean, labels = _take(session, slots)
    batch = draw_batch(clean, labels, session.module.objective, null_label=session.config.model.null_label,
                       seed=session.config.train.seed, step=session.step, slots=slots)
    return batch.to(session.ranks.device)


def _take(session: Session, slots: range) -> tuple[torch.Tensor, torch.Tensor]:
    start = session.samples_seen + slots.start
    indices = sample_indices(len(session.dataset), seed=session.config.train.seed, count=len(slots), start=start)
    return session.dataset.take(indices, np.arange(start, start + len(slots)))


def train_step(session: Session) -> StepResult:
    """Run one optimizer step, or skip it on all ranks together where a loss or gradient is not finite."""
    engine, config = session.engine, session.config
    lr = learning_rate(session.step, config.train.max_steps, config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    session.optimizer.updates = session.step
    terms: dict[str, torch.Tensor] = {}
    problem, norm = "", None
    for micro_step in range(session.batches.accumulation):
        batch = make_batch(session, session.batches.slots(micro_step, session.ranks.rank))
        output = engine(batch)
        session.health.see_loss(output.loss)
        engine.backward(output.loss)
        session.routing.add(output.plans, batch.sigma_B, batch.labels_B)
        session.router_state.add(output.plans)
        for name, value in output.terms.items():
            terms[name] = terms.get(name, 0.0) + value.detach() / session.batches.accumulation
        if micro_step == session.batches.accumulation - 1:
            problem = session.health.verdict(session.step)
            norm = _prepare_update(session, skip=bool(problem))
        engine.step()
    session.step += 1
    session.samples_seen += session.batches.global_batch
    norm = engine.get_global_grad_norm() if norm is None else norm
    if not problem and not math.isfinite(norm):
        # Every gradient is finite, their norm overflows: the update was left out as well.
        problem = f"step {session.step - 1}: the norm of all gradients is not finite"
    session.router_state.absorb(skip=bool(problem))
    return StepResult(terms=terms, grad_norm=float("nan") if problem else float(norm), lr=lr, problem=problem)


def _prepare_update(session: Session, *, skip: bool) -> torch.Tensor | None:
    """Tell the optimizer whether to skip; without ZeRO also clip, and return the norm."""
    optimizer = session.engine.optimizer
    if session.deepspeed_plan.zero_stage > 0:
        # The ranks have agreed already: DeepSpeed's own scan, which runs here, need not repeat it.
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda partition_gradients=True: setattr(optimizer, "overflow", skip)
        return None
    parameters = [p for p in session.module.parameters() if p.requires_grad]
    norm = global_grad_norm(parameters, session.expert_group)
    optimizer.overflow = skip or not bool(torch.isfinite(norm))
    if session.config.optimizer.clip_norm > 0 and not optimizer.overflow:
        clip_gradients(parameters, norm, session.config.optimizer.clip_norm)
    return norm
