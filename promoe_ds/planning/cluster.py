"""What a run is planned for: nodes, devices, network; and its layout over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.backends.devices import Device
from promoe_ds.config import BatchPlan, DeepSpeedPlan

#: Bytes/s that one device sends to other nodes, by the name that `--network` takes: one network
#: card a device.
NETWORKS: dict[str, float] = {
    "ib-ndr400": 50e9,
    "ib-hdr200": 25e9,
    "roce-400": 50e9,
    "ethernet-100": 12.5e9,
    "ethernet-25": 3.125e9,
}
#: Elements of a gradient bucket where the DeepSpeed JSON sets none: DeepSpeed's own default.
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

    @property
    def ranks(self) -> int:
        """Processes, one a device."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class ClusterLayout:
    """How a run is spread over ranks.

    bucket: elements of a gradient bucket (`zero_optimization.reduce_bucket_size`); overlap:
    `overlap_comm`, two buckets; on_cpu: plain operations, and memory for kept gradients as they
    come, for a CPU maps pages at their first use; offload: masters, moments and averages are in the
    host's memory, and the update runs there (`offload_optimizer`); data_before_expert: ranks that
    share experts are spread (`use_data_before_expert_parallelism`), not neighbours.
    """

    world_size: int
    micro_batch: int = 1
    accumulation: int = 1
    zero_stage: int
    precision: str
    bucket: int = DEFAULT_BUCKET
    overlap: bool = True
    on_cpu: bool = False
    offload: bool = False
    data_before_expert: bool = False

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight, a gradient and an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def decides_on_device(self) -> bool:
        """Whether the device decides about updates, see `train.trainer.decides_on_device`."""
        return not self.on_cpu and self.zero_stage > 0 and not self.offload

    @property
    def images(self) -> int:
        """Images of one step, all ranks together."""
        return self.world_size * self.micro_batch * self.accumulation

    def expert_ranks(self, ep_size: int) -> list[int]:
        """Return the ranks that share rank 0's experts."""
        stride = self.world_size // ep_size if self.data_before_expert else 1
        return [stride * index for index in range(ep_size)]

    def replica_ranks(self, ep_size: int) -> list[int]:
        """Return the ranks that hold the same experts as rank 0."""
        stride = 1 if self.data_before_expert else ep_size
        return [stride * index for index in range(self.world_size // ep_size)]


def layout_of(
    batches: BatchPlan, deepspeed: DeepSpeedPlan, *, on_cpu: bool = False
) -> ClusterLayout:
    """Return the layout that a batch plan and a resolved DeepSpeed JSON describe."""
    zero = deepspeed.json.get("zero_optimization", {})
    return ClusterLayout(
        world_size=batches.world_size,
        micro_batch=batches.micro_batch,
        accumulation=batches.accumulation,
        zero_stage=deepspeed.zero_stage,
        precision=deepspeed.precision,
        offload=deepspeed.offloads,
        on_cpu=on_cpu,
        bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
        overlap=bool(zero.get("overlap_comm", False)),
        data_before_expert=bool(deepspeed.json.get("use_data_before_expert_parallelism", False)),
    )
