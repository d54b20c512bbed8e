"""Signals that ask a launcher or a rank to shut down."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from promoe_ds.errors import OrphanedError
from promoe_ds.launch.heartbeat import this_rank
from promoe_ds.launch.processes import broken_link, launcher_chain, lost_deepspeed

#: Signals that a rank takes as a shutdown request; a launcher takes SIGHUP as well.
RANK_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
#: A terminal and a launcher may each send a SIGINT for one Ctrl-C, one right after the other.
_REPEAT_SECONDS = 0.5


class ShutdownRequest:
    """Records the first signal that asks for a shutdown; a later SIGINT means: at once.

    `reason`: the signal's name, "" before one came. `at_once`: do not wait for the last checkpoint.
    """

    def __init__(self, *, terminal: bool = False) -> None:
        """Take over the signals; those of a terminal unless they are ignored."""
        self.reason, self.at_once, self._since = "", False, float("inf")
        for number in (*RANK_SIGNALS, *([signal.SIGHUP] if terminal else [])):
            # nohup and background jobs of a shell ignore them
            ignored = number in _TERMINAL_SIGNALS and signal.getsignal(number) is signal.SIG_IGN
            if threading.current_thread() is threading.main_thread() and not ignored:
                signal.signal(number, self.handle)

    def request(self, reason: str) -> None:
        """Request a shutdown; the first reason is kept."""
        if reason and not self.reason:
            self.reason, self._since = reason, time.monotonic()

    def handle(self, number: int, frame: object) -> None:
        """Take a signal, as `signal.signal` asks for."""
        # Batch systems send several signals, and a save is under way by then: only Ctrl-C repeats a
        # request.
        is_repeated = time.monotonic() - self._since > _REPEAT_SECONDS
        self.at_once = self.at_once or (is_repeated and number == signal.SIGINT)
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
        self._numbers, into = os.pipe()
        for end in (self._numbers, into):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)

    def lost_launcher(self) -> str:
        """Return which of the launcher's processes is gone, "" if none; from any thread.

        At Ctrl-C `deepspeed` ends, and the launcher below it waits for its ranks. The main thread
        may take the signal much later, after a step: its number is in the pipe before.
        """
        gone = broken_link(self.chain)
        with suppress(BlockingIOError):
            if gone and signal.SIGINT in os.read(self._numbers, 1 << 16):
                self.chain = self.chain[:1]
                gone = broken_link(self.chain)
        return gone
