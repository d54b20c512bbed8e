"""The wish to stop, as signals to the launcher say it."""

from __future__ import annotations

import signal


class StopWish:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP to the launcher: the wish that all ranks stop; a later SIGINT: at once."""

    def __init__(self) -> None:
        """Take over the signals."""
        self._reason, self._hurry = "", False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._take)

    def __call__(self) -> str:
        """Return the signal's name, "" before one came."""
        return self._reason

    @property
    def hurry(self) -> bool:
        """Whether somebody at a keyboard does not want to wait for the ranks' last checkpoint."""
        return self._hurry

    def _take(self, number: int, frame: object) -> None:
        # Batch systems send several signals on their own, and a save is under way by then: only Ctrl-C means it twice.
        self._hurry = self._hurry or (bool(self._reason) and number == signal.SIGINT)
        self._reason = self._reason or signal.Signals(number).name
