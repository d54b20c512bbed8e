"""A rank that does not come: the others give up after `parallel.timeout_seconds`, in the expert
group too.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from promoe_ds.backends.deepspeed_private import make_expert_groups
from promoe_ds.backends.process_group import start_distributed

from ..processes import run_ranks

TIMEOUT = 3.0


def _wait_in_vain(folder: Path) -> None:
    rank = start_distributed(timeout_seconds=60).rank
    group = make_expert_groups(2, TIMEOUT)
    dist.barrier()
    if rank == 1:
        while not (folder / "waited").exists():  # nothing else may end the other's wait
            time.sleep(0.1)
        return
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        (folder / "waited").write_text(str(time.monotonic() - begin))


def test_expert_group_lost_rank_times_out_as_configured(tmp_path: Path) -> None:
    run_ranks(2, _wait_in_vain, tmp_path)
    assert TIMEOUT - 1 < float((tmp_path / "waited").read_text())
