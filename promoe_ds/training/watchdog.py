"""Threads in each rank that end it when a phase takes too long or its launcher is gone."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from promoe_ds.errors import Interrupted, OrphanedError, PromoeError, StalledError
from promoe_ds.launch.heartbeat import (
    attempt_folder,
    read_heartbeat,
    this_rank,
    write_rank_status,
)
from promoe_ds.launch.shutdown import EarlySignals
from promoe_ds.logs import get_logger, rank_from_environment
from promoe_ds.run_files import STACKS_FOLDER, make_folder

_LOG = get_logger("watchdog")
_POLL_SECONDS = 0.5
#: Between two signs of life in a rank's status: of ranks that end without one, the first to fall
#: silent is the one that the others waited for.
SIGN_OF_LIFE_SECONDS = 20.0
#: The threads need the interpreter; the C library ends a rank that blocks even that, so much later.
_LAST_RESORT_SECONDS = 30.0


class Watchdog:
    """Watches the deadline of the current phase, the launcher's processes and its heartbeat."""

    def __init__(self, run_dir: Path, launcher_timeout: float, early: EarlySignals) -> None:
        """Prepare; `start` begins to watch.

        Args:
            run_dir: gets the stacks of ranks that hang.
            launcher_timeout: seconds without a new heartbeat after which the launcher is considered
                gone.
            early: the launcher's processes; takes the heartbeat's shutdown request.
        """
        self._run_dir, self._launcher_timeout, self._early = run_dir, launcher_timeout, early
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._phase, self._step = "set-up", 0
        self._seconds = self._deadline = float("inf")

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()
        # Local rank 0 reads the heartbeat for its host: when it ends, DeepSpeed's launcher ends the
        # others.
        if (folder := attempt_folder()) is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            threading.Thread(
                target=self._watch_heartbeat, args=(folder,), name="heartbeat", daemon=True
            ).start()

    def expect(self, phase: str, step: int, seconds: float) -> None:
        """A phase begins and must end, by another call, within `seconds`."""
        self._phase, self._step, self._seconds = phase, step, seconds
        self._deadline = time.monotonic() + seconds
        faulthandler.dump_traceback_later(
            seconds + _LAST_RESORT_SECONDS, exit=True, file=sys.__stderr__
        )

    def close(self) -> None:
        """Stop watching; no sign of life follows the status that the caller writes next."""
        self._closed.set()
        self._thread.join(timeout=_LAST_RESORT_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        next_sign = time.monotonic() + SIGN_OF_LIFE_SECONDS
        while not self._closed.wait(_POLL_SECONDS):
            now = time.monotonic()
            if self._early.at_once:
                end_rank(Interrupted(f"{self._here()}: not saved"))
            if now > self._deadline:
                self._end_stalled()
            if gone := self._early.lost_launcher():
                self._end_orphaned(f"{gone} is gone, so nobody watches this rank")
            if now > next_sign:
                next_sign = now + SIGN_OF_LIFE_SECONDS
                write_rank_status(None, f"{self._phase} {self._step}")

    def _watch_heartbeat(self, folder: Path) -> None:
        seen, since = None, time.monotonic()
        while not self._closed.wait(min(2.0, self._launcher_timeout / 5)):
            heartbeat = read_heartbeat(folder)
            if heartbeat is not None and heartbeat != seen:
                seen, since = heartbeat, time.monotonic()
                self._early.request(heartbeat[1])
            elif time.monotonic() - since > self._launcher_timeout:
                limit = f"{self._launcher_timeout:g} s (supervision.launcher_timeout_seconds)"
                self._end_orphaned(f"no heartbeat of the launcher for {limit}")

    def _end_orphaned(self, cause: str) -> None:
        end_rank(OrphanedError(f"{self._here()}: {cause}. Resume with --resume auto"))

    def _end_stalled(self) -> None:
        field = f"supervision.{self._phase.replace('set-up', 'setup')}_timeout_seconds"
        message = f"{self._here()} took longer than {self._seconds:g} s ({field})"
        try:
            folder = make_folder(self._run_dir, STACKS_FOLDER)
            rank = rank_from_environment()
            path = folder / f"stalled_rank_{rank:05d}_step_{self._step:07d}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{this_rank()}, process {os.getpid()}, {self._phase} {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            message += f": all stacks are in {path}"
        except OSError as error:
            message += f"; the stacks could not be written: {error}"
        end_rank(StalledError(message))

    def _here(self) -> str:
        return f"{this_rank()}: {self._phase} {self._step}"


def end_rank(error: PromoeError) -> None:
    """End this process from a thread: the main thread may hang where no exception reaches it."""
    write_rank_status(error.exit_code, str(error))
    _LOG.error("%s: %s", error.kind, error)
    os._exit(error.exit_code)
