"""One step of one rank over shapes: the real network, forward and backward, on fake tensors, and
what the engine does with its gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from promoe_ds.backends.expert_parallel import mark_experts, shard_experts, share_centroids
from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.condition import ClassCondition, Condition, EmptyText, TextCondition, padded_length
from promoe_ds.config import RunConfig
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.errors import ConfigError
from promoe_ds.kernels.choice import as_on_gpu
from promoe_ds.model import DiT, build_model
from promoe_ds.planning.cluster import ClusterLayout
from promoe_ds.planning.replay import EngineReplay, ReplayGroup
from promoe_ds.planning.trace import ShapeTrace
from promoe_ds.planning.zero import States, states_of_groups
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.torch_private import fake_store, fake_tensors
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.step import TrainingModule, autocast_context

#: Settings whose memory and traffic shapes of plain tensors do not show: what can be planned.
_PLANNED = (
    ("precision", "compute", ("auto", "fp32", "bf16", "bf16_autocast")),
    ("parallel", "comm_dtype", ("same",)),
    ("parallel", "compile", (False,)),
)


@dataclass(frozen=True)
class PassShapes:
    """What one forward and backward pass of rank 0 and the update do, as `trace` saw it.

    rows_leaving: rows whose expert is on another rank, all layers together; parameters: of this
    rank.
    """

    trace: ShapeTrace
    states: States
    rows_leaving: int
    parameters: int


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks that do not exist: collectives return at once.

    DeepSpeed's and torch's own group functions work inside. Fake worlds do not nest.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if dist.is_initialized():
        raise ConfigError("this process is in a process group already: plan in another process")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=fake_store())
    try:
        yield
    finally:
        dist.destroy_process_group()


def trace_pass(config: RunConfig, layout: ClusterLayout) -> PassShapes:
    """Run one pass and the update over shapes; call inside `fake_world(layout.world_size)`.

    Every sample is conditional and routing is even: the case with most rows; an expert that gets
    twice its share needs more.
    Raises: ConfigError for a dispatcher or precision that shapes alone cannot follow.
    """
    _check_can_be_planned(config)
    ep_size, is_sharded = config.parallel.ep_size, config.parallel.resolved_dispatch == "alltoall"
    group = dist.new_group(layout.expert_ranks(ep_size)) if is_sharded else None
    leaving: list[int] = []
    network = _local_network(config, layout, group)
    with fake_tensors(), nullcontext() if layout.on_cpu else as_on_gpu():
        _materialise(network)
        # The CPU's autocast: fake tensors of a GPU need one.
        module = TrainingModule(network, autocast_context(config, "cpu")).train()
        groups = _groups(config, layout, module)
        states = states_of_groups(
            [group.sizes for group in groups], layout, len(config.optimizer.averages)
        )
        batch = _batch(config, layout.micro_batch)
        trace = ShapeTrace(known=[*module.parameters(), *module.buffers(), *batch.tensors()])

        def expect_rows(router: object, inputs: object, plan: RoutingPlan) -> None:
            """Let the trace answer with the rows that a layer's assignment lists."""
            trace.rows = plan.assignment.token_ids_N.numel()
            leaving.append(trace.rows - -(-trace.rows // ep_size))

        for layer in module.denoiser.moe_layers().values():
            layer.router.register_forward_hook(expect_rows)
        engine = EngineReplay(module, groups, layout, states, config.optimizer, trace)
        with trace:
            output = module(batch)  # as a training step, which keeps the plans until its end
            engine.begin_backward(output.loss)
            output.loss.backward()
            engine.finish_backward()
            del output
            engine.update(config.parallel.kernels)
        parameters = sum(p.numel() for p in module.parameters())
    return PassShapes(trace, states, sum(leaving), parameters)


def trace_sampling(config: RunConfig, images: int) -> ShapeTrace:
    """Run one evaluation of a network in bf16, as samplers on a GPU make it, over shapes.

    Args:
        images: rows of the pass; all have labels.
    """
    layout = ClusterLayout(world_size=1, zero_stage=0, precision="bf16", micro_batch=images)
    network = _local_network(config, layout, None).eval()
    with fake_tensors(), as_on_gpu(), torch.no_grad():
        _materialise(network)
        batch = _batch(config, images)
        trace = ShapeTrace(known=[*network.parameters(), *network.buffers(), *batch.tensors()])
        with trace:
            network.denoise(batch.clean_BZHW, batch.sigma_B, batch.condition)
    return trace


def _groups(config: RunConfig, layout: ClusterLayout, module: TrainingModule) -> list[ReplayGroup]:
    """Return the parameter groups, and the ranks that share each."""
    ep_size = config.parallel.ep_size
    experts = dist.new_group(layout.replica_ranks(ep_size)) if ep_size > 1 else dist.group.WORLD
    return [
        ReplayGroup(one["params"], experts if one.get("moe") else dist.group.WORLD)
        for one in parameter_groups(module, config.optimizer, layout.precision)
    ]


def _check_can_be_planned(config: RunConfig) -> None:
    dispatch = config.parallel.resolved_dispatch
    if dispatch not in ("local", "alltoall"):
        raise ConfigError(
            f"parallel.dispatch={dispatch}: only local and alltoall can be planned; "
            "plan with alltoall, which sends the same rows"
        )
    values = config.model_dump(mode="json")
    for section, field, planned in _PLANNED:
        if (value := values[section][field]) not in planned:
            raise ConfigError(
                f"{section}.{field}={value} cannot be planned, only "
                f"{' or '.join(map(str, planned))}: shapes do not show the memory of its kernels; "
                f"plan with {planned[0]}"
            )


def _local_network(
    config: RunConfig, layout: ClusterLayout, group: dist.ProcessGroup | None
) -> DiT:
    """Build the network with the experts of rank 0 alone, on the meta device."""
    with torch.device("meta"):
        network = build_model(config)
    if group is not None:
        shard_experts(network, group, torch.device("cpu"))
    if config.routing.rcl_scope == "global" and layout.world_size > 1:
        share_centroids(network)
    return network.bfloat16() if layout.precision == "bf16" else network


def _materialise(network: DiT) -> None:
    """Put fake tensors in the place of meta ones; `to_empty` cannot, inside the fake mode."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    mark_experts(network)
    give_superclasses(network, network.config)


def _batch(config: RunConfig, images: int) -> DiffusionBatch:
    model = config.model
    shape = (images, model.in_channels, *model.latent_size)
    return DiffusionBatch(
        torch.empty(shape),
        torch.empty(shape),
        torch.empty(images),
        _condition(config, images),
    )


def _condition(config: RunConfig, images: int) -> Condition:
    """Return labels, or texts of the greatest length, which is the case with most work."""
    model = config.model
    groups_B = torch.empty(images, dtype=torch.int64)
    if model.condition == "class":
        return ClassCondition(groups_B, model.null_label, num_null=0)
    length = padded_length(model.text_length)
    states = torch.empty(images, length, model.text_width, dtype=torch.bfloat16)
    pooled_BC = torch.empty(images, model.pooled_width)
    return TextCondition(
        states,
        torch.empty(states.shape[:2], dtype=torch.bool),
        pooled_BC,
        torch.empty(images, dtype=torch.bool),
        EmptyText(states[0], pooled_BC[0]),
        groups_B=groups_B if config.num_groups else None,
        num_groups=config.num_groups,
        num_null=0,
    )
