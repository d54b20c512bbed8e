"""Why an attempt ended: the host is named, the exit code says what kind, restarts are for what they can mend."""

from __future__ import annotations

from promoe_ds.launch.attempt import Outcome
from promoe_ds.launch.diagnosis import Verdict, judge
from promoe_ds.launch.heartbeat import Note
from promoe_ds.launch.hostfile import Host

HOSTS = (Host("a", 2), Host("b", 1))


def _judge(*codes: int | None, runner: int = 1, unreachable: dict[str, str] | None = None) -> Verdict:
    """Judge an attempt of three ranks by their codes: None for a rank that left no word, none for one that never started."""
    notes = [Note(rank=rank, host="aab"[rank], pid=100 + rank, code=code, message=f"said {code}", time=float(rank))
             for rank, code in enumerate(codes)]
    return judge(HOSTS, Outcome(code=runner, notes=notes, unreachable=unreachable or {}))


def test_verdict_all_finished_is_0() -> None:
    assert _judge(0, 0, 0, runner=0).code == 0


def test_verdict_runner_0_with_dead_ranks_is_no_success() -> None:
    """DeepSpeed's runner returns 0 when a host's launcher is killed."""
    verdict = _judge(0, 0, None, runner=0)
    assert (verdict.code, verdict.restart) == (7, True)
    assert verdict.message == ("b: rank 2 (process 102) died without a word, as by a kill, for lack of memory or at a time-out of "
                               "nccl: see its output above")


def test_verdict_a_kill_counts_more_than_what_it_did_to_others() -> None:
    verdict = _judge(7, 7, None, runner=247)
    assert verdict.code == 7
    assert verdict.message.startswith("b: rank 2 (process 102) died")


def test_verdict_wrong_setting_is_final_with_its_own_code() -> None:
    verdict = _judge(2, None, None)
    assert verdict == Verdict(2, "rank 0 on a: said 2", restart=False)
    assert _judge(7, 3, 7).code == 3


def test_verdict_stop_on_request_is_75() -> None:
    assert _judge(75, 75, 75).code == 75
    assert not _judge(75, 75, 75).restart
    assert _judge(75, 75, None).code == 7, "not all of them saved"


def test_verdict_unreachable_host_without_notes_is_no_stop_on_request() -> None:
    for codes in ((), (75, 75), (0, 0), (75, 0)):
        verdict = _judge(*codes, runner=255, unreachable={"b": "no route"})
        assert (verdict.code, verdict.restart) == (7, True), codes
        assert "b: does not answer any more (no route)" in verdict.message
    assert _judge(0, 75, 75).message == "said 75", "a rank that had finished was asked nothing"
    assert _judge(75, 75, 75, unreachable={"b": "no route"}).code == 75, "its rank had said so before"


def test_verdict_ranks_killed_beside_one_that_raised_are_no_cause() -> None:
    """DeepSpeed's launcher kills the others of a host after the end of one."""
    verdict = _judge(None, 1, 7)
    assert verdict == Verdict(1, "rank 1 on a: said 1", restart=True)
    assert _judge(None, 7, 7).message.startswith("a: rank 0 (process 100) died without a word"), "who lost a peer is no cause"
    assert _judge(1, 1, None).message.startswith("b: rank 2 (process 102) died without a word"), "nobody ends ranks elsewhere"


def test_verdict_stall_and_defect_are_the_cause_of_lost_peers() -> None:
    assert _judge(7, 8, 7).code == 8
    assert _judge(7, 1, 7).message == "rank 1 on a: said 1"


def test_verdict_unreachable_host_is_named_before_its_silent_ranks() -> None:
    verdict = _judge(7, 7, None, unreachable={"b": "ssh failed: timed out"})
    assert verdict.message.startswith("b: does not answer any more (ssh failed: timed out); ")
    assert "without a word" not in verdict.message


def test_verdict_ranks_that_never_started_are_named_by_host() -> None:
    verdict = _judge(runner=1)
    assert verdict.message == ("a: ranks 0, 1 never started: see its output above; b: rank 2 never started: see its output above")
