"""A rank whose share of the work takes longer than a collective may is waited for."""

from __future__ import annotations

import subprocess
import sys

from .jobs import ENVIRONMENT, REPOSITORY

_RANK = """
import time
import numpy as np
from promoe_ds.distributed.context import stop_distributed
from promoe_ds.distributed.team import join_team
team = join_team("cpu", timeout_seconds=2)
time.sleep(4 * team.rank)
team.barrier()
assert team.sum(np.ones(1)) == 2
stop_distributed()
"""


def test_barrier_of_a_team_outlasts_the_time_out_of_its_other_collectives(tmp_path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, timeout=90, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
