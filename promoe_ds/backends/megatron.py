"""Megatron-core's `MoELayer` as the expert path (`parallel.dispatch=megatron`): its dispatchers and
experts, our router.

Our two-step router decides, labels included, before the layer runs; `PlannedRouter`, plugged in
through `MoESubmodules`, hands the decision over. The layer's parameters stay ours: its modules are
built without memory and run on views of the stacked experts that DeepSpeed sees, so that ZeRO,
clipping, averages and checkpoints are those of every other path. The expert-parallel group is
DeepSpeed's, too; of Megatron's global state, one buffer is made and nothing else.
Letters: T tokens of this rank, D width, E routed experts, e those on this rank, K choices per
token, S tokens with rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from promoe_ds.backends.external import token_choices
from promoe_ds.backends.te_support import (
    BROKEN_INSTALLATION,
    INSTALL,
    find_transformer_engine,
    megatron_fp8,
)
from promoe_ds.config import RunConfig
from promoe_ds.errors import ConfigError, cause_of
from promoe_ds.logs import get_logger
from promoe_ds.moe.dispatch import (
    ALL_TO_ALLS_PER_STEP,
    DISPATCHERS,
    ExpertFunction,
    PendingOutput,
)
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.private_names import check_parameters
from promoe_ds.registry import register
from promoe_ds.routing.assignment import Assignment

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronLayer
    from megatron.core.transformer.transformer_config import TransformerConfig

_LOG = get_logger("megatron")
#: Bytes of a gate, which Megatron sends along with its row; its gradient comes back.
_GATE_BYTES = 4


class PlannedRouter(nn.Module):
    """The router that Megatron's layer calls: returns the decision that ours has made for these
    tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,  # from 0.17 on
    ) -> None:
        super().__init__()
        self.decision: tuple[Tensor, Tensor] | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Part of Megatron's interface; nothing here depends on it."""

    def forward(
        self, tokens_S1D: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return gates (S, E), fp32, and the routing map (S, E), bool."""
        return self.decision


@register(DISPATCHERS, "megatron")
class MegatronPath:
    """Takes tokens through a Megatron-core layer. Its own collectives are synchronous: nothing of
    ours overlaps with them.
    """

    clock = None

    def __init__(
        self,
        config: RunConfig,
        experts: StackedExperts,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Build the layer around `experts`, this rank's.

        Raises: ConfigError naming what is not installed.
        """
        self.owner, self.group = experts, group
        self.num_experts, self.top_k = config.routing.num_experts, config.routing.top_k
        self.kind, self.world_size = config.parallel.megatron_dispatcher, dist.get_world_size(group)
        self.layer, self.is_grouped = _build_layer(config, experts, group, device)
        check_parameters(self.layer, [name for name, _ in self._weights()], library="megatron")
        self.tokens_sent = 0

    def begin(
        self, experts: ExpertFunction, tokens_TD: Tensor, assignment: Assignment
    ) -> PendingOutput:
        """Run the layer when the result is called; `experts` are Megatron's own, on our parameters.

        Sync: Megatron's.  Collectives: Megatron's.
        """

        def finish(base_TD: Tensor) -> Tensor:
            token_ids_S, gates_SE, map_SE = self._by_token(assignment, tokens_TD.shape[0])
            self.tokens_sent = token_ids_S.numel()
            self.layer.router.decision = gates_SE, map_SE
            inputs_S1D = tokens_TD.index_select(0, token_ids_S)[:, None]
            output_S1D, _ = functional_call(self.layer, dict(self._weights()), (inputs_S1D,))
            self.layer.router.decision = None  # holds the pass's graph
            return base_TD.index_add_(0, token_ids_S, output_S1D[:, 0].to(base_TD.dtype))

        return finish

    def _by_token(self, assignment: Assignment, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens that Megatron gets, their gates and which experts they visit, (S, E)
        both.
        """
        choices, device = token_choices(assignment, self.top_k), assignment.token_ids_N.device
        if self.kind == "allgather":
            # Gathering needs as many tokens from every rank: those without rows go along.
            token_ids_S, places_N = torch.arange(num_tokens, device=device), assignment.token_ids_N
        else:
            token_ids_S, places_N = choices.token_ids_S, torch.empty_like(assignment.token_ids_N)
            places_N[choices.rows_SK] = torch.arange(token_ids_S.numel(), device=device)[:, None]
        # DeepEP finds the choices as the largest gates, which may be negative.
        absent = torch.finfo(torch.float32).min if self.kind == "flex" else 0.0
        gates_SE = assignment.gates_N.new_full((token_ids_S.numel(), self.num_experts), absent)
        visited = places_N, choices.expert_N
        map_SE = torch.zeros_like(gates_SE, dtype=torch.bool)
        map_SE[visited] = True
        return token_ids_S, gates_SE.index_put(visited, assignment.gates_N), map_SE

    def bytes_exchanged(self, assignment: Assignment, width: int, element_size: int) -> Tensor:
        """What leaves in the pass that ran last; `flex` is counted as `alltoall`."""
        elsewhere = self.world_size - 1
        if self.kind == "allgather":
            # Each rank's tokens and gates go to all others, partial sums (in the gates' fp32) come
            # back; the same backward.
            token_bytes = width * (element_size + _GATE_BYTES) + self.num_experts * _GATE_BYTES
            return assignment.token_ids_N.new_tensor(2 * elsewhere * self.tokens_sent * token_bytes)
        sent_We = assignment.tokens_per_expert_E.view(self.world_size, -1)
        rows = (
            sent_We.sum() - sent_We[self.owner.first_expert // self.owner.num_local_experts].sum()
        )
        return (ALL_TO_ALLS_PER_STEP * width * element_size + 2 * _GATE_BYTES) * rows

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Megatron's names with views of our parameters; SwiGLU's first two matrices are
        joined, a copy.
        """
        stacks = {("linear_fc2", "weight"): self.owner.down_weight}
        if self.owner.expert_type == "swiglu":
            stacks["linear_fc1", "weight"] = torch.cat(
                [self.owner.gate_weight, self.owner.up_weight], dim=1
            )
        else:
            stacks |= {
                ("linear_fc1", "weight"): self.owner.up_weight,
                ("linear_fc1", "bias"): self.owner.up_bias,
                ("linear_fc2", "bias"): self.owner.down_bias,
            }
        for (linear, kind), stack in stacks.items():
            for expert, value in enumerate(stack.unbind(0)):
                name = (
                    f"{linear}.{kind}{expert}"
                    if self.is_grouped
                    else f"local_experts.{expert}.{linear}.{kind}"
                )
                yield f"experts.{name}", value


def require_megatron() -> None:
    """Raise ConfigError where megatron-core cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional libraries that we do not use
            import megatron.core.transformer.moe.moe_layer  # noqa: F401
    except BROKEN_INSTALLATION as error:  # it imports Transformer Engine, where that is installed
        remedy = (
            "pip install 'promoe_ds[megatron]'"
            if isinstance(error, ImportError)
            else "fix or remove Transformer Engine, which it imports"
        )
        raise ConfigError(
            "parallel.dispatch=megatron needs megatron-core, which cannot be imported"
            f" ({cause_of(error)}): {remedy}, or use parallel.dispatch=alltoall"
        ) from None


def _build_layer(
    config: RunConfig, experts: StackedExperts, group: dist.ProcessGroup, device: torch.device
) -> tuple[MegatronLayer, bool]:
    """Build Megatron's layer without memory; also returns whether its experts are grouped
    (Transformer Engine's).
    """
    require_megatron()
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronLayer
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from promoe_ds.backends.megatron_private import copy_without_stream, cpu_construction

    if config.parallel.megatron_dispatcher == "flex" and device.type != "cuda":
        raise ConfigError(
            "parallel.megatron_dispatcher=flex is DeepEP's, which runs on CUDA devices alone: use"
            " alltoall or allgather"
        )
    library, problem = find_transformer_engine() if device.type == "cuda" else (None, "")
    is_grouped, on_cpu = library is not None, device.type == "cpu"
    _log_choice(config.parallel.megatron_dispatcher, is_grouped, problem)
    try:
        with (
            cpu_construction() if on_cpu else nullcontext(),
            torch.device("meta"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of settings that we leave at their defaults
            layer = MegatronLayer(
                _transformer_config(config, device, is_grouped=is_grouped),
                MoESubmodules(router=PlannedRouter, experts=_expert_spec(is_grouped)),
                pg_collection=_process_groups(group),
            )
    except (
        ImportError,
        ValueError,
    ) as error:  # Megatron's config checks for libraries, too, with ValueError
        raise ConfigError(
            "parallel.dispatch=megatron,"
            f" parallel.megatron_dispatcher={config.parallel.megatron_dispatcher}: Megatron refuses"
            f" or misses a library ({cause_of(error)}): fix it, or use parallel.dispatch=alltoall"
        ) from None
    if on_cpu:
        copy_without_stream(layer)
    for module in layer.modules():
        if isinstance(module, RowParallelLinear):
            module.explicit_expert_comm = (
                True  # no tensor parallelism: its result needs no reduction
            )
    return layer.train(), is_grouped


@cache
def _log_choice(dispatcher: str, is_grouped: bool, problem: str) -> None:
    """Say once what was chosen for every layer, and what is the matter with Transformer Engine
    where there could be one.
    """
    _LOG.info(
        "dispatcher %s, experts by %s",
        dispatcher,
        (
            "Transformer Engine's grouped GEMM"
            if is_grouped
            else "a loop over Megatron's linear layers"
        ),
    )
    if problem:
        _LOG.warning("no grouped GEMM without Transformer Engine: %s; %s", problem, INSTALL)


def _transformer_config(
    config: RunConfig, device: torch.device, *, is_grouped: bool
) -> TransformerConfig:
    """Describe one MoE layer to Megatron; everything else of its config has no part in it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    is_gated = config.routing.expert_type == "swiglu"
    return TransformerConfig(
        num_layers=1,
        hidden_size=config.model.hidden_size,
        num_attention_heads=1,
        ffn_hidden_size=config.expert_width,
        moe_ffn_hidden_size=config.expert_width,
        num_moe_experts=config.routing.num_experts,
        moe_router_topk=config.routing.top_k,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,  # of Megatron's own router: not used, but checked
        moe_router_dtype="fp32",
        moe_grouped_gemm=is_grouped,
        moe_token_dispatcher_type=config.parallel.megatron_dispatcher,
        moe_permute_fusion=is_grouped,
        expert_model_parallel_size=config.parallel.ep_size,
        add_bias_linear=not is_gated,
        gated_linear_unit=is_gated,
        activation_func=F.silu if is_gated else partial(F.gelu, approximate="tanh"),
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=not is_grouped,
        init_model_with_meta_device=is_grouped,
        disable_parameter_transpose_cache=True,  # our weights change under its hands
        **megatron_fp8(config),
    )


def _expert_spec(is_grouped: bool) -> Any:
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if is_grouped:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        return ModuleSpec(
            module=TEGroupedMLP,
            submodules=MLPSubmodules(
                linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
            ),
        )
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    return ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )


@cache
def _process_groups(group: dist.ProcessGroup) -> ProcessGroupCollection:
    """Return the groups that Megatron's layer asks for: DeepSpeed's for experts, this rank alone
    for every other kind.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from promoe_ds.backends.megatron_private import make_gather_buffer

    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    make_gather_buffer()
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = group
    for name in ("tp", "cp", "expt_tp", "expt_dp", "tp_cp", "tp_dp_cp"):
        setattr(groups, name, alone)
    return groups
