"""Judges a job step under Slurm: `python -m promoe_ds.launch.requeue HOSTFILE NOTES CODE` writes `CODE yes|no SENTENCE`.

CODE is what the step ended with, then the cause's; yes: another start may help. The step's own code says little: it is the
largest of its tasks', and a rank that lost others ends with a larger one than the rank that found a wrong setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from promoe_ds.launch.attempt import Outcome
from promoe_ds.launch.diagnosis import judge
from promoe_ds.launch.heartbeat import read_notes
from promoe_ds.launch.hostfile import read_hostfile


def main(arguments: Sequence[str]) -> None:
    """Notes to verdict to one line on standard output."""
    hostfile, notes, code = arguments
    verdict = judge(read_hostfile(Path(hostfile)), Outcome(code=int(code), notes=read_notes(Path(notes)), unreachable={}))
    sys.stdout.write(f"{verdict.code} {'yes' if verdict.restart else 'no'} {' '.join(verdict.message.split())}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
