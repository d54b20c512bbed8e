"""Why an attempt ended, from what its ranks said and what they did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promoe_ds.errors import LaunchError, OrphanedError, PeerError, Preempted, StalledError
from promoe_ds.launch.attempt import Outcome
from promoe_ds.launch.heartbeat import Note
from promoe_ds.launch.hostfile import Host

#: What another attempt may mend; a rank's other codes say that it would fail again (configuration, data, checkpoint, ...).
_WORTH_A_RESTART = {1, PeerError.exit_code, StalledError.exit_code, OrphanedError.exit_code}


@dataclass(frozen=True)
class Verdict:
    """The job's exit code, the sentence that names host and cause, whether another attempt makes sense."""

    code: int
    message: str
    restart: bool


def judge(hosts: Sequence[Host], outcome: Outcome) -> Verdict:
    """Judge an attempt. What a rank says of itself counts more than the runner's code, which may be 0 though ranks died.

    Args:
        hosts: in the order of their ranks.
    """
    notes, expected = outcome.notes, [host.name for host in hosts for _ in range(host.slots)]
    complete = len(notes) == len(expected)
    if complete and all(note.code == 0 for note in notes):
        return Verdict(0, "all ranks finished", restart=False)
    final = [note for note in notes if note.code not in (None, 0, Preempted.exit_code, *_WORTH_A_RESTART)]
    if final:
        note = min(final, key=lambda note: note.time)
        return Verdict(note.code, _said(note), restart=False)
    if complete and all(note.code in (0, Preempted.exit_code) for note in notes):
        return Verdict(Preempted.exit_code, next(note.message for note in notes if note.code), restart=False)
    return _broken(expected, outcome)


def _broken(expected: Sequence[str], outcome: Outcome) -> Verdict:
    """Find the likeliest cause of an end that another attempt may mend."""
    spoken = sorted((note for note in outcome.notes if note.code in _WORTH_A_RESTART), key=lambda note: note.time)
    # A rank's own defect or stall is the cause; that others lost it only follows.
    causes = [note for note in spoken if note.code != PeerError.exit_code]
    # After a rank's end DeepSpeed's launcher kills the others of its host, which then leave no word: no cause either.
    silent = _silent(outcome, expected, spared={expected[note.rank] for note in causes})
    lost = [f"{host}: does not answer any more ({why})" for host, why in outcome.unreachable.items()]
    first = (causes or spoken)[:1]
    message = ("; ".join([*silent, *lost, *map(_said, first)]) or
               f"the launcher ended with code {outcome.code} and no rank said why")
    code = PeerError.exit_code if silent or lost else (first[0].code if first else LaunchError.exit_code)
    return Verdict(code, message, restart=True)


def _said(note: Note) -> str:
    place = f"rank {note.rank} on {note.host}: "
    return place + note.message.removeprefix(place)


def _silent(outcome: Outcome, expected: Sequence[str], spared: set[str]) -> list[str]:
    """Return a line for each rank that started and left no word, and one for each host whose ranks never started.

    Args:
        spared: hosts whose ranks are not asked for one.
    """
    away = spared | set(outcome.unreachable)
    lines = [f"{expected[note.rank]}: rank {note.rank} (process {note.pid}) died without a word, as by a kill, for lack of memory "
             "or at a time-out of nccl: see its output above"
             for note in outcome.notes if note.code is None and expected[note.rank] not in away]
    started = {note.rank for note in outcome.notes}
    missing = [rank for rank in range(len(expected)) if rank not in started]
    for host in dict.fromkeys(expected[rank] for rank in missing):
        if host not in away:
            lines.append(f"{host}: rank{'s' * (sum(expected[r] == host for r in missing) > 1)} "
                         f"{', '.join(str(r) for r in missing if expected[r] == host)} never started: see its output above")
    return lines
