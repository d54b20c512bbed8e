"""A rank whose share of the work takes longer than a collective may is waited for."""

from __future__ import annotations

import time

import numpy as np

from promoe_ds.distributed.context import DistributedContext, join_processes
from promoe_ds.distributed.process_group import stop_distributed

from ..processes import run_ranks


def _late(team: DistributedContext) -> int:
    time.sleep(4 * team.is_main)
    return team.rank


def _wait_for_the_late_one() -> None:
    team = join_processes("cpu", timeout_seconds=2)
    time.sleep(4 * team.rank)
    assert team.gather(team.rank) == [0, 1]
    assert team.main_first(lambda: _late(team)) == team.rank
    assert team.on_main(lambda: _late(team)) == 0
    assert team.sum(np.ones(1)) == 2
    stop_distributed()


def test_all_but_sums_of_a_team_outlast_the_time_out_of_a_collective() -> None:
    run_ranks(2, _wait_for_the_late_one)
