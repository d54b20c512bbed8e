"""The process group of a training run, joined through DeepSpeed."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.process_group import join_process_group, local_device


def start_distributed(timeout_seconds: float) -> DistributedContext:
    """Join the process group: nccl where there is CUDA, gloo elsewhere or where DS_ACCELERATOR=cpu
    asks for it.

    Call after `complete_environment`.
    Raises: ConfigError if rank 0 cannot be reached, or DeepSpeed's insides have moved.
    """
    device = local_device()
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # once it knows which accelerator to use

    from promoe_ds.backends.deepspeed_private import prepare_library

    prepare_library(timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    join_process_group(backend, timeout_seconds)
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return DistributedContext(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
