"""Where a planned run stands: nodes, devices, network; how it is laid out; and process groups of many ranks without any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from promoe_ds.config import BatchPlan, DeepSpeedPlan
from promoe_ds.config.devices import Device
from promoe_ds.errors import ConfigError

#: Elements of one gradient bucket where the DeepSpeed JSON names none: DeepSpeed's own default.
DEFAULT_BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices.

    network_bandwidth: bytes/s that one device sends to other nodes.
    """

    nodes: int
    gpus_per_node: int
    device: Device
    network_bandwidth: float

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise ConfigError(f"{option} {value}: must be at least 1")

    @property
    def ranks(self) -> int:
        """Processes, one a device."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a config lies over ranks.

    bucket: elements of a gradient bucket (`zero_optimization.reduce_bucket_size`); overlap: `overlap_comm`, two buckets.
    touched_only: count of a bucket only what is written: what a CPU, which maps pages at their first use, really holds.
    offload: masters, moments and averages lie in the host's memory, and the update runs there (`offload_optimizer`);
    data_before_expert: ranks that share experts are spread (`use_data_before_expert_parallelism`), not neighbours.
    """

    world_size: int
    micro_batch: int
    accumulation: int
    zero_stage: int
    precision: str
    bucket: int = DEFAULT_BUCKET
    overlap: bool = True
    touched_only: bool = False
    offload: bool = False
    data_before_expert: bool = False

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight, a gradient and an activation."""
        return 2 if self.precision == "bf16" else 4

    def expert_ranks(self, ep_size: int) -> list[int]:
        """Return the ranks that share rank 0's experts."""
        stride = self.world_size // ep_size if self.data_before_expert else 1
        return [stride * index for index in range(ep_size)]


def layout_of(batches: BatchPlan, deepspeed: DeepSpeedPlan, *, touched_only: bool = False) -> Layout:
    """Return the layout that a batch plan and a resolved DeepSpeed JSON describe."""
    zero = deepspeed.json.get("zero_optimization", {})
    return Layout(world_size=batches.world_size, micro_batch=batches.micro_batch, accumulation=batches.accumulation,
                  zero_stage=deepspeed.zero_stage, precision=deepspeed.precision, touched_only=touched_only,
                  bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)), overlap=bool(zero.get("overlap_comm", False)),
                  offload=deepspeed.offloads,
                  data_before_expert=bool(deepspeed.json.get("use_data_before_expert_parallelism", False)))


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks that do not exist: groups have their members, collectives return at once.

    DeepSpeed's and torch's own group functions work inside. Several may follow one another, not lie in one another.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a plan needs a process without a process group, this one has joined one: plan in another process")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
