"""The supervisor of one rank: what the training loop tells it, and what it does with signals and broken exchanges."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from promoe_ds.config import SupervisionConfig
from promoe_ds.distributed.peers import gather_addresses, peer_problem
from promoe_ds.errors import PeerError, Preempted
from promoe_ds.launch.early_signals import STOP_SIGNALS, EarlySignals
from promoe_ds.launch.heartbeat import DUMP_FOLDER, leave_note
from promoe_ds.logs import get_logger, rank_from_environment
from promoe_ds.train.watchdog import Watchdog

_LOG = get_logger("supervision")


class Supervisor:
    """Knows in which phase a rank is, for how long it may be there, and whether it was asked to stop."""

    def __init__(self, settings: SupervisionConfig, run_dir: Path) -> None:
        """Watch nothing yet: a loop outside `supervised` runs with no watch over it."""
        self._settings, self._stop_reason = settings, ""
        self._watchdog: Watchdog | None = None
        self._dump_folder, self._rank = run_dir / DUMP_FOLDER, rank_from_environment()
        self._addresses: dict[str, str] = {}
        self.step, self._first_step_done = 0, False

    def start(self, chain: tuple[int, ...]) -> None:
        """Begin to watch, also over the launcher's processes; set-up lasts until the first step is done."""
        self._watchdog = Watchdog(self._rank, self._dump_folder, self._settings.launcher_timeout_seconds,
                                  self.request_shutdown, chain)
        self._watchdog.expect("set-up", 0, self._settings.setup_timeout_seconds)
        self._watchdog.start()
        leave_note(self._rank, None, "started")

    def know_peers(self) -> None:
        """Learn on which host every rank is.  Collectives: one."""
        if self._watchdog is not None:
            self._addresses = gather_addresses()

    def begin_step(self, step: int) -> None:
        """A step begins, and with it the next time-out; the first belongs to set-up."""
        if self._watchdog is not None and self._first_step_done:
            self._watchdog.expect("step", step, self._settings.step_timeout_seconds)
        self.step = step

    def end_step(self) -> None:
        """The step is computed; what is logged after it still counts to it."""
        if self._watchdog is not None and not self._first_step_done:
            self._watchdog.expect("step", self.step, self._settings.step_timeout_seconds)
        self._first_step_done = True

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """The time in which a checkpoint is saved."""
        return self._phase("checkpoint", self._settings.checkpoint_timeout_seconds)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The time in which samples are drawn and judged."""
        return self._phase("evaluation", self._settings.evaluation_timeout_seconds)

    @contextlib.contextmanager
    def _phase(self, name: str, seconds: float) -> Iterator[None]:
        if self._watchdog is not None:
            self._watchdog.expect(name, self.step, seconds)
        yield
        if self._watchdog is not None:
            self._watchdog.expect("step", self.step, self._settings.step_timeout_seconds)

    def request_shutdown(self, reason: str) -> None:
        """Take note of a shutdown request; called from a signal handler or a thread."""
        self._stop_reason = self._stop_reason or reason

    def shutdown_requested(self) -> bool:
        """Whether this rank was asked to shut down."""
        return bool(self._stop_reason)

    @property
    def stop_reason(self) -> str:
        """Why, as far as this rank knows."""
        return self._stop_reason or "another rank was asked to stop"

    def explain(self, error: RuntimeError) -> PeerError | None:
        """Return the error to report where other ranks are the cause."""
        problem = peer_problem(error, self._addresses)
        if not problem:
            return None
        where = f"step {self.step}" if self._first_step_done else "set-up"
        return PeerError(f"rank {self._rank} on {socket.gethostname()}: {where}: {problem}. Every rank ends; go on from the "
                         "newest complete checkpoint with --resume auto")

    def close(self) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.close()


@contextlib.contextmanager
def supervised(settings: SupervisionConfig, run_dir: Path, beginning: EarlySignals) -> Iterator[Supervisor]:
    """Watch over this process: time-outs, launcher, SIGTERM and SIGUSR1 (finish the step, save, end).

    Args:
        beginning: what was seen of launcher and signals so far.
    Raises: PeerError in place of what a library says about a broken exchange.
    """
    supervisor = Supervisor(settings, run_dir)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            handlers[number] = signal.signal(number, lambda received, _: supervisor.request_shutdown(signal.Signals(received).name))
    if beginning.stop_reason:
        supervisor.request_shutdown(beginning.stop_reason)
    supervisor.start(beginning.chain)
    try:
        yield supervisor
    except Preempted:
        handlers.clear()  # a signal that comes late, when another rank's has already stopped the job, must not change the exit code
        raise
    except RuntimeError as error:
        if (explained := supervisor.explain(error)) is None:
            raise
        raise explained from error
    finally:
        supervisor.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
