"""Why an attempt ended: the message names host and rank, the code says what kind, restarts are for
what they can fix.
"""

from __future__ import annotations

import pytest

from promoe_ds.launch.attempt import Outcome
from promoe_ds.launch.diagnosis import diagnose_failure
from promoe_ds.launch.heartbeat import RankStatus
from promoe_ds.launch.hostfile import Host

HOSTS = (Host("a", 2), Host("b", 1))
B_DOWN = {"b": "no route"}
#: How a message begins about a rank without a status, a host that does not answer, a rank's own
# report.
SILENT_0, SILENT_2 = (
    "a: rank 0 (process 100) exited without",
    "b: rank 2 (process 102) exited without",
)
DOWN = "b: does not answer any more (no route)"


@pytest.mark.parametrize(
    ("codes", "unreachable", "code", "restart", "message"),
    [
        ((0, 0, 0), {}, 0, False, ""),
        (
            (0, 0, None),
            {},
            7,
            True,
            SILENT_2,
        ),  # DeepSpeed's runner returns 0 when a host's launcher is killed
        ((7, 7, None), {}, 7, True, SILENT_2),
        ((2, None, None), {}, 2, False, "rank 0 on a: said 2"),
        ((7, 3, 7), {}, 3, False, "rank 1 on a: said 3"),
        ((75, 75, 75), {}, 75, False, "said 75"),
        ((0, 75, 75), {}, 75, False, "said 75"),
        ((75, 75, 75), B_DOWN, 75, False, "said 75"),  # all had reported before the host went down
        ((75, 75, None), {}, 7, True, SILENT_2),
        ((), B_DOWN, 7, True, "a: ranks 0, 1 never started"),
        ((75, 75), B_DOWN, 7, True, DOWN),
        ((0, 0), B_DOWN, 7, True, DOWN),
        ((75, 0), B_DOWN, 7, True, DOWN),
        ((7, 7, None), B_DOWN, 7, True, f"{DOWN}; rank 0 on a"),
        (
            (None, 1, 7),
            {},
            1,
            True,
            "rank 1 on a: said 1",
        ),  # DeepSpeed's launcher kills the others of its host
        ((None, 7, 7), {}, 7, True, SILENT_0),
        ((1, 1, None), {}, 7, True, SILENT_2),
        ((7, 8, 7), {}, 8, True, "rank 1 on a: said 8"),
        ((7, 1, 7), {}, 1, True, "rank 1 on a: said 1"),
        (
            (),
            {},
            7,
            True,
            "a: ranks 0, 1 never started: see its output above; b: rank 2 never started",
        ),
    ],
)
def test_failure_is_diagnosed(codes, unreachable, code, restart, message) -> None:
    """Codes of three ranks: None for a rank that runs or was killed, none for one that never
    started.
    """
    statuses = [
        RankStatus(
            rank=rank,
            host="aab"[rank],
            pid=100 + rank,
            code=c,
            message=f"said {c}",
            time=float(rank),
        )
        for rank, c in enumerate(codes)
    ]
    report = diagnose_failure(HOSTS, Outcome(code=0, statuses=statuses, unreachable=unreachable))
    assert (report.code, report.restart) == (code, restart)
    assert report.message.startswith(message)


def test_rank_that_fell_silent_first_is_named_where_all_abort_as_under_nccl() -> None:
    """NCCL's watchdog aborts the ranks that waited for the lost one, long after it."""
    last_signs = (700.0, 100.0, 702.0)
    statuses = [
        RankStatus(rank=r, host="aab"[r], pid=100 + r, code=None, message="step 7", time=t)
        for r, t in enumerate(last_signs)
    ]
    report = diagnose_failure(HOSTS, Outcome(code=1, statuses=statuses, unreachable={}))
    assert (report.code, report.restart) == (7, True)
    first, others = report.message.split("; ")
    assert first.startswith("a: rank 1 (process 101) exited without a status in step 7")
    assert others.startswith("2 more")
