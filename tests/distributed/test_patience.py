"""A rank whose share of the work takes longer than a collective may is waited for."""

from __future__ import annotations

import time

import numpy as np

from promoe_ds.distributed.context import join_processes
from promoe_ds.distributed.process_group import stop_distributed

from ..processes import run_ranks


def _wait_for_the_late_one() -> None:
    team = join_processes("cpu", timeout_seconds=2)
    time.sleep(4 * team.rank)
    team.barrier()
    assert team.sum(np.ones(1)) == 2
    stop_distributed()


def test_barrier_of_a_team_outlasts_the_time_out_of_its_other_collectives() -> None:
    run_ranks(2, _wait_for_the_late_one)
