"""Every use of DeepSpeed's insides in this package.

`NAMES` is read as soon as this file is imported; `zero_private` and `ZeroPartitions` check what
exists only in an engine: a run under a DeepSpeed that has moved ends at its first step and never
trains in another way.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import deepspeed.ops
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.optim import Optimizer

from promoe_ds import private_names, torch_private
from promoe_ds.private_names import check_names, find_private, moved
from promoe_ds.torch_private import set_group_timeouts

_STORAGE, _GROUPS = (
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine",
    "deepspeed.utils.groups",
)
#: module -> attributes; a dot goes into a class.
NAMES = {
    "deepspeed.moe.layer": ("MoE",),
    "deepspeed.moe.sharded_moe": ("MOELayer._set_ep_group", "TopKGate.forward"),
    "deepspeed.ops": ("_probe_compatible_ops",),
    "deepspeed.runtime.engine": (
        "DeepSpeedEngine._copy_recovery_script",
        "DeepSpeedEngine.save_checkpoint",
    ),
    "deepspeed.runtime.compiler": ("compile", "dummy_decorator"),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer.check_overflow",
        "DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue",
        "DeepSpeedZeroOptimizer.process_gradients",
        "DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads",
        "DeepSpeedZeroOptimizer.scaled_global_norm",
        "DeepSpeedZeroOptimizer.unscale_and_clip_grads",
        "all_gather_dp_groups",
        "is_invalid_grad_norm",
        "DeepSpeedZeroOptimizer.update_lp_params",
    ),
    _STORAGE: (
        "TorchCheckpointEngine.save",
        "TorchCheckpointEngine.load",
        "TorchCheckpointEngine.create",
    ),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    _GROUPS: (
        "_create_expert_and_data_parallel",
        "_get_expert_parallel_group",
        "_get_expert_data_parallel_group",
        "_WORLD_GROUP",
        "_EXPERT_PARALLEL_GROUP",
        "_EXPERT_PARALLEL_GROUP_RANKS",
        "_EXPERT_DATA_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    ),
}
check_names(NAMES)
read_private = partial(private_names.read_private, library="deepspeed")
#: Its class of modules that hold experts; its layer and gate; its storage; records in its files
# beside tensors.
MoE: Any = find_private("deepspeed.moe.layer", "MoE")
MOELayer: Any = find_private("deepspeed.moe.sharded_moe", "MOELayer")
TopKGate: Any = find_private("deepspeed.moe.sharded_moe", "TopKGate")
TorchCheckpointEngine: Any = find_private(_STORAGE, "TorchCheckpointEngine")
LossScaler: Any = find_private("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
fragment_address: Any = find_private("deepspeed.utils.tensor_fragment", "fragment_address")


def prepare_library(timeout_seconds: float) -> None:
    """Check the names; give groups that DeepSpeed makes itself our time-out; compile nothing.

    Without it such groups take torch's default of half an hour, and DeepSpeed's shared-memory
    all-reduce for CPUs is compiled at first use, for a minute.
    """
    check_names(torch_private.NAMES)
    _import_muon()
    deepspeed.ops.__compatible_ops__ = {}  # in place of the probe, which calls compilers
    set_group_timeouts(timeout_seconds)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling its kernels.

    ZeRO asks of every optimizer whether it is Muon, which this package does not offer. Compiling
    them loads torch.compile's libraries: almost two seconds of each rank's start.
    """
    from deepspeed.runtime import compiler

    original, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original


def make_expert_groups(
    ep_size: int, timeout_seconds: float, *, data_before_expert: bool = False
) -> dist.ProcessGroup:
    """Make DeepSpeed's expert-parallel and expert-data-parallel groups; return this rank's
    expert-parallel one.
    """
    groups = deepspeed.utils.groups
    groups._create_expert_and_data_parallel(
        ep_size, use_data_before_expert_parallel_=data_before_expert
    )
    name = expert_group_name(ep_size)
    expert_group = groups._get_expert_parallel_group(name)
    set_group_timeouts(timeout_seconds, expert_group, groups._get_expert_data_parallel_group(name))
    return expert_group


def expert_group_name(ep_size: int) -> str:
    """Return the name by which DeepSpeed finds the groups of experts."""
    return f"ep_size_{ep_size}"


def forget_expert_groups() -> None:
    """Forget the groups that DeepSpeed keeps by name: they ended with their process group."""
    groups = deepspeed.utils.groups
    groups._WORLD_GROUP = None
    for kept in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        kept.clear()


def check_gate(gate: type[nn.Module]) -> None:
    """Check that a gate of ours takes what DeepSpeed's layer hands to a gate.

    Raises: ConfigError naming library, version and what differs.
    """
    ours, theirs = ([*signature(kind.forward).parameters][2:] for kind in (gate, TopKGate))
    if ours != theirs:
        raise moved("deepspeed", f"TopKGate.forward({', '.join(ours)})")


def build_engine(
    module: nn.Module, optimizer: Optimizer, settings: dict[str, Any], storage: Any
) -> DeepSpeedEngine:
    """Build the engine of one rank, which reads and writes its files through `storage` alone; all
    ranks together.

    Rank 0 would also copy converters into each checkpoint, which cannot read expert-parallel
    shards.
    Args:
        settings: the resolved DeepSpeed JSON.
    Raises: ConfigError naming library, version and attribute that has moved.
    """
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    read_private(engine, "checkpoint_engine")
    engine.checkpoint_engine = storage
    engine._copy_recovery_script = lambda save_path: None
    is_alone = dist.get_world_size() == 1 and "communication_data_type" not in settings
    if is_alone and not engine.zero_optimization():
        read_private(engine, "enable_backward_allreduce")
        engine.enable_backward_allreduce = False  # their mean, in flat copies, is what they are
    return engine


@dataclass(frozen=True)
class OwnedSlice:
    """Where a part of one parameter is: `numel` values from `start` in the parameter, from
    `flat_start` in the flat.
    """

    parameter: nn.Parameter
    start: int
    flat_start: int
    numel: int


class ZeroPartitions:
    """This rank's fp32 master values under ZeRO 1 and 2: one flat tensor a parameter group."""

    def __init__(self, zero_optimizer: Any) -> None:
        """Look at an optimizer that DeepSpeed has wrapped."""
        self._optimizer = zero_optimizer
        self.flats: list[Tensor] = read_private(zero_optimizer, "single_partition_of_fp32_groups")
        self.states: dict[Tensor, dict[str, Any]] = read_private(zero_optimizer, "optimizer").state
        self._groups = read_private(zero_optimizer, "bit16_groups")

    def slices(self, group: int) -> Iterator[OwnedSlice]:
        """Yield what this rank owns of each parameter of a group."""
        for parameter in self._groups[group]:
            mapping = read_private(parameter, "_hp_mapping")
            if mapping is None:
                continue  # another rank's
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            if here.numel != there.numel:
                raise moved(
                    "deepspeed", f"mapping of equal sizes ({there.numel} values to {here.numel})"
                )
            yield OwnedSlice(parameter, there.start, here.start, here.numel)

    def write_back(self) -> None:
        """Copy the masters into the weights of every rank.  Collectives: ZeRO's gathering of the
        weights.
        """
        self._optimizer.update_lp_params()
