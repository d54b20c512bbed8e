"""Why an attempt ended, from the statuses that its ranks wrote and those that are missing.

For Slurm: `python -m promoe_ds.launch.diagnosis HOSTFILE STATUSES CODE` writes `CODE yes|no
    SENTENCE`. The given CODE is what the job step ended with, the written one is the cause's; yes:
    another start may help. The step's code says little: it is the largest of its tasks', and a rank
    that lost others ends with a larger one than the rank that found a wrong setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.errors import LaunchError, OrphanedError, PeerError, Preempted, StalledError
from promoe_ds.launch.attempt import Outcome
from promoe_ds.launch.heartbeat import RankStatus, read_rank_statuses
from promoe_ds.launch.hostfile import Host, read_hostfile

#: The order of two last signs of life counts if they are further apart than this: three intervals.
_SILENCE_SECONDS = 60.0
#: What another attempt may fix; with any other code it would fail again (configuration, data, ...).
_WORTH_A_RESTART = {1, PeerError.exit_code, StalledError.exit_code, OrphanedError.exit_code}


@dataclass(frozen=True)
class FailureReport:
    """The job's exit code (0: no failure), a message with host and cause, whether to restart."""

    code: int
    message: str
    restart: bool


def diagnose_failure(hosts: Sequence[Host], outcome: Outcome) -> FailureReport:
    """Diagnose an attempt. The runner's code counts little: it may be 0 though ranks died.

    Args:
        hosts: in the order of their ranks.
    """
    statuses = outcome.statuses
    rank_hosts = [host.name for host in hosts for _ in range(host.slots)]
    codes = {status.code for status in statuses}
    complete = len(statuses) == len(rank_hosts)
    if complete and codes == {0}:
        return FailureReport(0, "all ranks finished", restart=False)
    final = [s for s in statuses if s.code not in (None, 0, Preempted.exit_code, *_WORTH_A_RESTART)]
    if final:
        first = min(final, key=lambda status: status.time)
        return FailureReport(first.code, _text(first), restart=False)
    if complete and codes <= {0, Preempted.exit_code}:
        message = next(status.message for status in statuses if status.code)
        return FailureReport(Preempted.exit_code, message, restart=False)
    return _diagnose_breakdown(rank_hosts, outcome)


def _diagnose_breakdown(rank_hosts: Sequence[str], outcome: Outcome) -> FailureReport:
    """Find the likeliest cause of an end that another attempt may fix."""
    failed = sorted(
        (s for s in outcome.statuses if s.code in _WORTH_A_RESTART), key=lambda status: status.time
    )
    # A rank's own defect or stall is the cause; that others lost the rank only follows.
    causes = [status for status in failed if status.code != PeerError.exit_code]
    # After a rank's end DeepSpeed's launcher kills the other ranks of its host: they are no cause
    # either.
    excused = {rank_hosts[status.rank] for status in causes} | set(outcome.unreachable)
    silent = _silent_ranks(outcome.statuses, rank_hosts, excused)
    lost = [
        f"{host}: does not answer any more ({why})" for host, why in outcome.unreachable.items()
    ]
    first = (causes or failed)[:1]
    message = "; ".join([*silent, *lost, *map(_text, first)])
    if silent or lost:
        return FailureReport(PeerError.exit_code, message, restart=True)
    message = message or f"the launcher ended with code {outcome.code} and no rank reported why"
    return FailureReport(first[0].code if first else LaunchError.exit_code, message, restart=True)


def _silent_ranks(
    statuses: Sequence[RankStatus], rank_hosts: Sequence[str], excused: set[str]
) -> list[str]:
    """Return a line for each rank without a last status, and for ranks that never started."""
    running = [s for s in statuses if s.code is None and rank_hosts[s.rank] not in excused]
    # Under NCCL, ranks that wait for a lost one abort without a status, too: the lost one fell
    # silent first.
    last_signs = [status.time for status in running]
    together = [s for s in running if s.time - min(last_signs) < _SILENCE_SECONDS]
    lines = [
        f"{rank_hosts[status.rank]}: rank {status.rank} (process {status.pid}) exited without a "
        f"status in {status.message} (likely SIGKILL, out of memory, or an NCCL time-out): see its"
        " output above"
        for status in together
    ]
    if others := len(running) - len(together):
        lines.append(f"{others} more fell silent {_SILENCE_SECONDS:g} s later or after that")
    missing: dict[str, list[str]] = {}
    for rank in sorted(set(range(len(rank_hosts))) - {status.rank for status in statuses}):
        missing.setdefault(rank_hosts[rank], []).append(str(rank))
    for host, ranks in missing.items():
        if host not in excused:
            shown = f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"
            lines.append(f"{host}: {shown} never started: see its output above")
    return lines


def _text(status: RankStatus) -> str:
    place = f"rank {status.rank} on {status.host}: "
    return place + status.message.removeprefix(place)


def main(arguments: Sequence[str]) -> None:
    """Write the diagnosis of a job step as one line to standard output."""
    hostfile, folder, code = arguments
    outcome = Outcome(code=int(code), statuses=read_rank_statuses(Path(folder)), unreachable={})
    report = diagnose_failure(read_hostfile(Path(hostfile)), outcome)
    sys.stdout.write(
        f"{report.code} {'yes' if report.restart else 'no'} {' '.join(report.message.split())}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
