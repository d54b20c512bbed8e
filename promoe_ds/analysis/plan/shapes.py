"""One pass of one rank over shapes: the real network, forward and backward, on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from promoe_ds.analysis.plan.cluster import Layout
from promoe_ds.analysis.plan.staging import GradientStaging
from promoe_ds.analysis.plan.states import States, rank_states
from promoe_ds.analysis.plan.trace import Sent, ShapeTrace, Work
from promoe_ds.backends.expert_parallel import share_centroids
from promoe_ds.config import RunConfig
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT, build_model
from promoe_ds.moe import AllToAllDispatcher, StackedExperts
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.train.router_state import give_superclasses
from promoe_ds.train.step import TrainingModule

#: Settings whose memory and traffic shapes of plain tensors do not show, where a config has them: what can be planned instead.
_PLANNED = (("precision", "compute", ("auto", "fp32", "bf16")), ("parallel", "comm_dtype", ("same",)),
            ("parallel", "compile", (False,)))


@dataclass(frozen=True)
class PassShapes:
    """What one forward and backward pass of rank 0 does.

    peak: bytes by kind when most are live, states apart; rows_leaving: rows whose expert lives on another rank, all layers
    together; parameters: of this rank.
    """

    peak: dict[str, int]
    states: States
    work: dict[str, Work]
    sent: list[Sent]
    rows_leaving: int
    parameters: int

    @property
    def exchange_bytes(self) -> int:
        """Bytes of rows that go to other ranks."""
        return sum(sum(one.bytes_by_member) - one.bytes_by_member[0] for one in self.sent if one.rows)


def trace_pass(config: RunConfig, layout: Layout, expert_group: dist.ProcessGroup | None = None) -> PassShapes:
    """Run one pass over shapes; call inside `fake_world(layout.world_size)`.

    Every sample is conditional and routing is even: the case with most rows; an expert that gets twice its share needs more.
    Args:
        expert_group: rank 0's, if it exists already.
    Raises: ConfigError for a dispatcher or precision that shapes alone cannot follow.
    """
    _check_can_be_planned(config)
    group = None
    if config.parallel.resolved_dispatch == "alltoall":
        group = expert_group or dist.new_group(layout.expert_ranks(config.parallel.ep_size))
    rows: list[int] = []
    with FakeTensorMode():
        module = TrainingModule(_local_network(config, layout, group)).train()
        states = rank_states(config, module, layout)
        batch = _batch(config, layout.micro_batch)
        known = [*module.parameters(), *module.buffers(), *vars(batch).values()]
        trace = ShapeTrace(null_samples=0, known=known)
        for layer in module.denoiser.moe_layers().values():
            layer.router.register_forward_hook(lambda router, inputs, plan: _expect_rows(trace, rows, plan))
        staging = GradientStaging(module, layout, trace, kept=states.gradients)
        with trace:
            output = module(batch)
            output.loss.backward()
            staging.finish()
        parameters = sum(p.numel() for p in module.parameters())
    ep_size = config.parallel.ep_size if group is not None else 1
    leaving = sum(count - -(-count // ep_size) for count in rows)
    return PassShapes(peak=dict(trace.peak), states=states, work=dict(trace.work), sent=trace.sent, rows_leaving=leaving,
                      parameters=parameters)


def _expect_rows(trace: ShapeTrace, rows: list[int], plan: RoutingPlan) -> None:
    """Let the trace answer with as many rows as a layer's assignment lists, which is up to its method."""
    trace.rows = plan.assignment.token_ids_N.numel()
    rows.append(trace.rows)


def _check_can_be_planned(config: RunConfig) -> None:
    dispatch, values = config.parallel.resolved_dispatch, config.model_dump(mode="json")
    if dispatch not in ("local", "alltoall"):
        raise ConfigError(f"parallel.dispatch={dispatch}: only local and deepspeed can be planned; plan with deepspeed, which "
                          "sends the same rows")
    for section, field, planned in _PLANNED:
        value = values.get(section, {}).get(field, planned[0])
        if value not in planned:
            raise ConfigError(f"{section}.{field}={value} cannot be planned, only {' or '.join(map(str, planned))}: its kernels "
                              f"say nothing of their memory beforehand; plan with {planned[0]}")


def _local_network(config: RunConfig, layout: Layout, group: dist.ProcessGroup | None) -> DiT:
    """Build the network with the experts of rank 0 alone, connected to its group."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if layout.precision == "bf16" else torch.float32)
    try:
        return _connected(build_model(config), config, layout, group)
    finally:
        torch.set_default_dtype(default)


def _connected(network: DiT, config: RunConfig, layout: Layout, group: dist.ProcessGroup | None) -> DiT:
    for layer in network.moe_layers().values() if group is not None else ():
        share = config.routing.num_experts // dist.get_world_size(group)
        layer.routed = StackedExperts(share, config.model.hidden_size, config.expert_width,
                                      expert_type=config.routing.expert_type, backend=config.expert_backend)
        layer.dispatcher = AllToAllDispatcher(group)
        for parameter in layer.routed.parameters():
            parameter.allreduce, parameter.group_name = False, f"ep_size_{config.parallel.ep_size}"
    give_superclasses(network, config)
    if config.routing.rcl_scope == "global" and layout.world_size > 1:
        share_centroids(network)
    return network


def _batch(config: RunConfig, images: int) -> DiffusionBatch:
    model = config.model
    shape = (images, model.in_channels, model.input_size, model.input_size)
    return DiffusionBatch(torch.empty(shape), torch.empty(shape), torch.empty(images), torch.empty(images, dtype=torch.int64))
