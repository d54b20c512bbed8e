"""What a rank must not miss while its imports take their seconds: its launcher's end, a wish to stop."""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys
import threading

from promoe_ds.errors import OrphanedError
from promoe_ds.launch.parent_death import launcher_chain, lost_deepspeed
from promoe_ds.logs import rank_from_environment

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EarlySignals:
    """The first thing that a rank makes: knows who had started it, and takes note of signals that ask it to stop."""

    def __init__(self) -> None:
        """Look at the processes above this one; take over the signals.

        Raises: OrphanedError if the launcher is gone already.
        """
        self._stop_reason = ""
        if lost_deepspeed():
            here = f"rank {rank_from_environment()} on {socket.gethostname()}"
            raise OrphanedError(f"{here}: its launcher ended before it had begun: nobody watches this rank. "
                                "Go on with --resume auto")
        self.chain = launcher_chain()
        faulthandler.enable(file=sys.__stderr__)  # nccl's time-outs abort the process: its stacks shall be seen
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._take)

    @property
    def stop_reason(self) -> str:
        """The signal's name, "" before one came."""
        return self._stop_reason

    def _take(self, number: int, frame: object) -> None:
        self._stop_reason = self._stop_reason or signal.Signals(number).name
