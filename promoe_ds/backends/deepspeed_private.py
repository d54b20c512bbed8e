"""Every name of DeepSpeed's and torch.distributed's insides that this package uses, and nowhere else.

Such names can move with any release. `check_names` reads all of them at start, `UpdateGate` and
`ZeroPartitions` check what exists only in an engine: a run under a library that has moved ends at its first step
with the library, its version and the name, and never trains in another way.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from promoe_ds.errors import ConfigError

#: module -> attributes; a dot goes into a class.
NAMES = {
    "deepspeed.moe.layer": ("MoE",),
    "deepspeed.ops": ("_probe_compatible_ops",),
    "deepspeed.runtime.engine": (
        "DeepSpeedEngine._copy_recovery_script", "DeepSpeedEngine.save_checkpoint"),
    "deepspeed.runtime.compiler": ("compile", "dummy_decorator"),
    "deepspeed.runtime.zero.utils": ("ZERO_SUPPORTED_OPTIMIZERS",),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer.check_overflow", "DeepSpeedZeroOptimizer.update_lp_params"),
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine": (
        "TorchCheckpointEngine.save", "TorchCheckpointEngine.load", "TorchCheckpointEngine.create"),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "deepspeed.utils.groups": (
        "_create_expert_and_data_parallel", "_get_expert_parallel_group",
        "_get_expert_data_parallel_group", "_WORLD_GROUP", "_EXPERT_PARALLEL_GROUP",
        "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS"),
    "torch.distributed.distributed_c10d": (
        "_set_pg_timeout", "default_pg_timeout", "default_pg_nccl_timeout"),
}


def _moved(library: str, name: str) -> ConfigError:
    return ConfigError(f"{library} {version(library)} has no {name}, on which this package relies: install the "
                       "versions of launch_scripts/constraints.txt")


def read_private(owner: Any, name: str, *, library: str = "deepspeed") -> Any:
    """Return an attribute of a library's insides.

    Raises: ConfigError naming library, version and attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
        raise _moved(library, f"{kind}.{name}") from None


def check_names() -> None:
    """Read every name of `NAMES`.

    Raises: ConfigError naming library, version and attribute.
    """
    for path, names in NAMES.items():
        library = path.partition(".")[0]
        try:
            module = importlib.import_module(path)
        except ImportError:
            raise _moved(library, path) from None
        for name in names:
            owner = module
            for part in name.split("."):
                owner = read_private(owner, part, library=library)


def prepare_library(timeout_seconds: float) -> None:
    """Check the names; give groups that DeepSpeed makes itself our time-out; compile nothing.

    Without it such groups take torch's default of half an hour, and DeepSpeed's shared-memory all-reduce for CPUs
    is compiled at first use, for a minute.
    """
    check_names()
    _import_muon()
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # in place of the probe, which calls compilers
    timeout = timedelta(seconds=timeout_seconds)
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def support_optimizer(kind: type) -> None:
    """Enter an elementwise optimizer among those that ZeRO supports, of which it does not warn."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling its kernels.

    ZeRO asks of every optimizer whether it is Muon, which this package does not offer. Compiling them
    loads torch.compile's libraries: almost two seconds of each rank's start.
    """
    from deepspeed.runtime import compiler

    original, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original


def make_expert_groups(ep_size: int, timeout_seconds: float, *, data_before_expert: bool = False) -> dist.ProcessGroup:
    """Make DeepSpeed's expert-parallel and expert-data-parallel groups; return this rank's expert-parallel one."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    name = expert_group_name(ep_size)
    expert_group = groups._get_expert_parallel_group(name)
    for group in (expert_group, groups._get_expert_data_parallel_group(name)):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    return expert_group


def expert_group_name(ep_size: int) -> str:
    """Return the name by which DeepSpeed finds the groups of experts."""
    return f"ep_size_{ep_size}"


def forget_expert_groups() -> None:
    """Forget the groups that DeepSpeed keeps by name: they ended with their process group."""
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None
    for kept in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS,
                 groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):
        kept.clear()


def use_checkpoint_engine(engine: Any, checkpoint_engine: Any) -> None:
    """Let an engine read and write through `checkpoint_engine` alone.

    Rank 0 would also copy converters into each checkpoint, which cannot read expert-parallel shards.
    """
    read_private(engine, "checkpoint_engine")
    engine.checkpoint_engine = checkpoint_engine
    engine._copy_recovery_script = lambda save_path: None


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
            raise _moved("deepspeed", "call of DeepSpeedZeroOptimizer.check_overflow within step")

    def _answer(self, partition_gradients: bool = True) -> None:
        self._was_asked = True
        self._optimizer.overflow = self._skip


@dataclass(frozen=True)
class OwnedSlice:
    """Where a part of one parameter is: `numel` values from `start` in the parameter, from `flat_start` in the flat."""

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
                raise _moved("deepspeed", f"mapping of equal sizes ({there.numel} values to {here.numel})")
            yield OwnedSlice(parameter, there.start, here.start, here.numel)

    def write_back(self) -> None:
        """Copy the masters into the weights of every rank.  Collectives: ZeRO's gathering of the weights."""
        self._optimizer.update_lp_params()
