"""Signals that ask a launcher or a rank to shut down."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading

from promoe_ds.errors import OrphanedError
from promoe_ds.launch.heartbeat import this_rank
from promoe_ds.launch.processes import launcher_chain, lost_deepspeed

#: Signals that a rank takes as a shutdown request; a launcher takes the terminal's as well.
RANK_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)


class ShutdownRequest:
    """Records the first signal that asks for a shutdown; a later SIGINT means: at once.

    `reason`: the signal's name, "" before one came. `at_once`: do not wait for the last checkpoint.
    """

    def __init__(self, *, terminal: bool = False) -> None:
        """Take SIGTERM and SIGUSR1, and with `terminal` SIGINT and SIGHUP unless ignored."""
        self.reason, self.at_once = "", False
        numbers = list(RANK_SIGNALS)
        if terminal:  # nohup and background jobs of a shell ignore them
            numbers += [n for n in _TERMINAL_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, self._handle)

    def request(self, reason: str) -> None:
        """Request a shutdown; the first reason is kept."""
        self.reason = self.reason or reason

    def _handle(self, number: int, frame: object) -> None:
        # Batch systems send several signals, and a save is under way by then: only Ctrl-C repeats a
        # request.
        self.at_once = self.at_once or (bool(self.reason) and number == signal.SIGINT)
        self.request(signal.Signals(number).name)


class EarlySignals(ShutdownRequest):
    """A rank's first object: its launcher may end, or ask to stop, while it still imports."""

    def __init__(self) -> None:
        """Record the launcher's processes, take over the signals.

        Raises: OrphanedError if the launcher is gone already.
        """
        if lost_deepspeed():
            raise OrphanedError(
                f"{this_rank()}: its launcher ended before the rank started, so nobody watches it."
                " Resume with --resume auto"
            )
        self.chain = launcher_chain()
        faulthandler.enable(
            file=sys.__stderr__
        )  # NCCL's time-outs abort the process: show its stacks
        super().__init__()
