"""Why an attempt ended, from what its ranks said and what they did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promoe_ds.errors import LaunchError, OrphanedError, PeerError, Preempted, StalledError
from promoe_ds.launch.attempt import Attempt, Outcome
from promoe_ds.launch.lease import Note

#: What another attempt may mend; a rank's other codes say that it would fail again (configuration, data, checkpoint, ...).
_WORTH_A_RESTART = {1, PeerError.exit_code, StalledError.exit_code, OrphanedError.exit_code}


@dataclass(frozen=True)
class Verdict:
    """The job's exit code, the sentence that names host and cause, whether another attempt makes sense."""

    code: int
    message: str
    restart: bool


def judge(attempt: Attempt, outcome: Outcome) -> Verdict:
    """Judge an attempt. What a rank says of itself counts more than the runner's code, which may be 0 though ranks died."""
    notes, expected = outcome.notes, _expected_ranks(attempt)
    if all(note.code == 0 for note in notes) and len(notes) == len(expected):
        return Verdict(0, "all ranks finished", restart=False)
    final = [note for note in notes if note.code not in (None, 0, Preempted.exit_code, *_WORTH_A_RESTART)]
    if final:
        note = min(final, key=lambda note: note.time)
        return Verdict(note.code, _said(note), restart=False)
    silent = _silent(notes, expected, outcome)
    if not silent and all(note.code in (0, Preempted.exit_code) for note in notes):
        return Verdict(Preempted.exit_code, notes[0].message, restart=False)
    spoken = sorted((note for note in notes if note.code in _WORTH_A_RESTART), key=lambda note: note.time)
    parts = [*silent, *(f"{host}: does not answer any more ({why})" for host, why in outcome.unreachable.items())]
    # A rank's own defect or stall is the cause; that others lost it only follows.
    causes = [note for note in spoken if note.code != PeerError.exit_code] or spoken[:1]
    parts += [_said(note) for note in causes[:1]]
    code = PeerError.exit_code if silent or outcome.unreachable else (causes[0].code if causes else LaunchError.exit_code)
    return Verdict(code, "; ".join(parts) or f"the launcher ended with code {outcome.code} and no rank said why", restart=True)


def _said(note: Note) -> str:
    place = f"rank {note.rank} on {note.host}: "
    return place + note.message.removeprefix(place)


def _expected_ranks(attempt: Attempt) -> list[str]:
    """Return the host of every rank."""
    return [host.name for host in attempt.hosts for _ in range(host.slots)]


def _silent(notes: Sequence[Note], expected: Sequence[str], outcome: Outcome) -> list[str]:
    """Return a line for each rank that started and left no word, and one for each host whose ranks never started."""
    lines = [f"{expected[note.rank]}: rank {note.rank} (process {note.pid}) died without a word, as by a kill or for lack of memory"
             for note in notes if note.code is None and expected[note.rank] not in outcome.unreachable]
    started = {note.rank for note in notes}
    missing = [rank for rank in range(len(expected)) if rank not in started]
    for host in dict.fromkeys(expected[rank] for rank in missing):
        if host not in outcome.unreachable:
            lines.append(f"{host}: rank{'s' * (sum(expected[r] == host for r in missing) > 1)} "
                         f"{', '.join(str(r) for r in missing if expected[r] == host)} never started: see its output above")
    return lines
