"""A rank that does not come: the others give up after `parallel.timeout_seconds`, in the expert group too."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from promoe_ds.backends.deepspeed_private import make_expert_groups
from promoe_ds.backends.process_group import start_distributed

TIMEOUT = 4.0


def _wait_in_vain(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text(), RANK=str(rank), WORLD_SIZE="2",
                      LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    start_distributed(timeout_seconds=60)
    group = make_expert_groups(2, TIMEOUT)
    dist.barrier()
    if rank == 1:
        time.sleep(4 * TIMEOUT)
        return
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        Path(folder, "waited").write_text(str(time.monotonic() - begin))


def test_expert_group_lost_rank_times_out_as_configured(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    mp.start_processes(_wait_in_vain, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert TIMEOUT - 1 < float((tmp_path / "waited").read_text()) < 3 * TIMEOUT
