"""The seam to DeepSpeed's expert parallelism: what its engine must see, kept in one file.

DeepSpeed recognises experts by `isinstance(module, deepspeed.moe.layer.MoE)` and by two attributes
on their parameters. `ShardedExperts` is such a module around this rank's stacked experts and
nothing else: prototypes, shared and unconditional experts stay outside, as ordinary data-parallel
parameters under the names of the rank-blind model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.backends import megatron, stock_deepspeed  # noqa: F401  (they register their paths)
from promoe_ds.backends.deepspeed_private import MoE, expert_group_name
from promoe_ds.model.dit import DiT
from promoe_ds.moe import DISPATCHERS
from promoe_ds.moe.collectives import all_reduce_sum
from promoe_ds.moe.experts import EXPERT_PARAMETERS, StackedExperts

#: DeepSpeed writes one file an expert and wants its keys to look like this.
_DEEPSPEED_KEY = "deepspeed_moe.experts.deepspeed_experts."


class ShardedExperts(StackedExperts, MoE):
    """This rank's share of a layer's routed experts, recognisable to DeepSpeed."""

    def __init__(self, full: StackedExperts, *, ep_size: int, ep_rank: int) -> None:
        """Keep experts ep_rank * e ... of `full` (on the meta device); DeepSpeed's own MoE layer is
        not built.
        """
        nn.Module.__init__(self)
        num_experts = full.num_local_experts
        self.expert_type, self.backend, self.kernels = full.expert_type, full.backend, full.kernels
        self.ep_size, self.num_experts, self.num_local_experts = (
            ep_size,
            num_experts,
            num_experts // ep_size,
        )
        self.first_expert = ep_rank * self.num_local_experts
        self.expert_group_name = expert_group_name(ep_size)
        self.enable_expert_tensor_parallelism = False
        for name in EXPERT_PARAMETERS[self.expert_type]:
            whole = getattr(full, name)
            shape = (self.num_local_experts, *whole.shape[1:])
            parameter = nn.Parameter(torch.empty(shape, device="meta"), whole.requires_grad)
            self.register_parameter(name, parameter)
        self.mark_parameters()
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_restack)

    def mark_parameters(self) -> None:
        """Mark the parameters as experts of this group; again after they were materialised."""
        parameter: Any
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = self.expert_group_name

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to do: `make_expert_groups` has made the groups that DeepSpeed looks up by
        name.
        """


def shard_experts(network: DiT, group: dist.ProcessGroup, device: torch.device) -> None:
    """Replace every layer's routed experts (on the meta device) by this rank's share and connect
    the path to the others.

    Raises: ConfigError if the path needs what is not installed.
    """
    make_path = DISPATCHERS[network.config.parallel.resolved_dispatch]
    for layer in network.moe_layers().values():
        layer.routed = ShardedExperts(
            layer.routed, ep_size=dist.get_world_size(group), ep_rank=dist.get_rank(group)
        )
        layer.dispatcher = make_path(network.config, layer.routed, group, device)


def share_centroids(network: DiT) -> None:
    """Let every router sum its centroids over all data-parallel ranks (`routing.rcl_scope:
    global`).
    """
    for layer in network.moe_layers().values():
        layer.router.reduce_sum = all_reduce_sum(None)


def mark_experts(network: nn.Module) -> None:
    """Mark expert parameters again, after `to_empty` or a cast replaced them."""
    for module in network.modules():
        if isinstance(module, ShardedExperts):
            module.mark_parameters()


def _unstack(module: ShardedExperts, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in EXPERT_PARAMETERS[module.expert_type]:
        for expert, weight in enumerate(state.pop(f"{prefix}{name}").unbind(0)):
            state[f"{prefix}{_DEEPSPEED_KEY}{expert}.{name}"] = weight


def _restack(module: ShardedExperts, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    for name in EXPERT_PARAMETERS[module.expert_type]:
        keys = [
            f"{prefix}{_DEEPSPEED_KEY}{expert}.{name}" for expert in range(module.num_local_experts)
        ]
        if all(key in state for key in keys):
            state[f"{prefix}{name}"] = torch.stack([state.pop(key) for key in keys])


def expert_file_key(name: str, expert: int) -> str:
    """Return the key under which a checkpoint's expert file holds `...routed.<parameter>` of one
    global expert.
    """
    module, parameter = name.rsplit(".", 1)
    return f"{module}.{_DEEPSPEED_KEY}{expert}.{parameter}"
