"""A thread in each rank that ends it when a phase takes too long or its launcher is gone."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from promoe_ds.errors import OrphanedError, PromoeError, StalledError
from promoe_ds.launch.heartbeat import attempt_folder, leave_note, read_lease
from promoe_ds.launch.parent_death import broken_link
from promoe_ds.logs import get_logger

_LOG = get_logger("watchdog")
_POLL_SECONDS = 0.5
#: The thread needs the interpreter; a rank that blocks even that is ended by the C library so much later.
_LAST_RESORT_SECONDS = 30.0


class Watchdog:
    """Watches the deadline of the present phase, the launcher's processes and its lease."""

    def __init__(self, rank: int, dump_folder: Path, launcher_timeout: float, on_stop: Callable[[str], None],
                 chain: tuple[int, ...]) -> None:
        """Prepare; `start` begins to watch.

        Args:
            dump_folder: where stack dumps go; made when needed.
            launcher_timeout: seconds without a new lease after which the launcher counts as gone.
            on_stop: called once with the reason when the lease asks to stop.
            chain: process ids above this one whose end orphans it.
        """
        self._rank, self._folder, self._launcher_timeout, self._on_stop = rank, dump_folder, launcher_timeout, on_stop
        self._phase, self._step, self._seconds, self._deadline = "set-up", 0, float("inf"), float("inf")
        self._chain = chain
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        # Local rank 0 reads the lease for its host: where it ends, the launcher ends the others.
        if (folder := attempt_folder()) is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            threading.Thread(target=self._watch_lease, args=(folder,), name="lease", daemon=True).start()

    def expect(self, phase: str, step: int, seconds: float) -> None:
        """A phase begins and must end, by another call, within `seconds`."""
        self._phase, self._step, self._seconds = phase, step, seconds
        self._deadline = time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + _LAST_RESORT_SECONDS, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            if time.monotonic() > self._deadline:
                self._end_stalled()
            if gone := broken_link(self._chain):
                self._end(OrphanedError(f"{self._here()}: {gone} is gone: nobody watches this rank. Go on with --resume auto"))

    def _watch_lease(self, folder: Path) -> None:
        seen, since, asked = None, time.monotonic(), False
        while not self._closed.wait(min(2.0, self._launcher_timeout / 5)):
            lease = read_lease(folder)
            if lease is not None and lease != seen:
                seen, since = lease, time.monotonic()
                if lease[1] and not asked:
                    asked = True
                    self._on_stop(lease[1])
            elif time.monotonic() - since > self._launcher_timeout:
                self._end(OrphanedError(f"{self._here()}: no sign of life from the launcher for {self._launcher_timeout:g} s "
                                        "(supervision.launcher_timeout_seconds). Go on with --resume auto"))

    def _end_stalled(self) -> None:
        message = (f"{self._here()} took longer than {self._seconds:g} s (supervision.{self._phase.replace('set-up', 'setup')}"
                   "_timeout_seconds)")
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.mkdir(exist_ok=True, mode=0o700)
            path = self._folder / f"stalled_rank_{self._rank:05d}_step_{self._step:07d}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}, {self._phase} {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            message += f": all stacks are in {path}"
        except OSError as error:
            message += f"; the stacks could not be written: {error}"
        self._end(StalledError(message))

    def _end(self, error: PromoeError) -> None:
        leave_note(self._rank, error.exit_code, str(error))
        _LOG.error("error: %s", error)
        # The main thread may hang where no exception reaches it.
        os._exit(error.exit_code)

    def _here(self) -> str:
        return f"rank {self._rank} on {socket.gethostname()}: {self._phase} {self._step}"
