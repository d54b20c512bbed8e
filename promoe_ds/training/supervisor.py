"""The supervisor of one rank: time-outs, shutdown requests, errors that other ranks caused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from promoe_ds.config import SupervisionConfig
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.peers import gather_addresses, peer_problem
from promoe_ds.errors import PeerError
from promoe_ds.launch.heartbeat import this_rank, write_rank_status
from promoe_ds.launch.shutdown import EarlySignals, ShutdownRequest
from promoe_ds.torch_private import set_group_timeouts
from promoe_ds.training.watchdog import Watchdog


class Supervisor:
    """Knows a rank's phase, how long it may take, and whether a shutdown was requested."""

    def __init__(
        self,
        settings: SupervisionConfig,
        shutdown: ShutdownRequest | None = None,
        watchdog: Watchdog | None = None,
        collective_seconds: float | None = None,
    ) -> None:
        """Set-up begins; without a watchdog nothing is watched.

        Args:
            collective_seconds: time-out of collectives in a step. Saving and evaluating have longer
                ones: a rank's share may take that much longer than another's. None: left alone.
        """
        self._collective_seconds = collective_seconds
        self._settings, self._shutdown, self._watchdog = settings, shutdown, watchdog
        self._addresses: dict[str, str] = {}
        self.step, self._first_step_done = 0, False
        self._expect("set-up", settings.setup_timeout_seconds)

    def know_peers(self, context: DistributedContext) -> None:
        """Learn on which host every rank is.  Collectives: one."""
        if self._watchdog is not None:
            self._addresses = gather_addresses(context)

    def begin_step(self, step: int) -> None:
        """A step begins, and with it its time-out; the first step belongs to set-up."""
        self.step = step
        if self._first_step_done:
            self._expect_step()

    def end_step(self) -> None:
        """The step is computed; what is logged after it still belongs to it."""
        if not self._first_step_done:
            self._expect_step()
        self._first_step_done = True

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """The time in which a checkpoint is saved."""
        return self._phase("checkpoint", self._settings.checkpoint_timeout_seconds)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The time of an evaluation."""
        return self._phase("evaluation", self._settings.evaluation_timeout_seconds)

    @contextlib.contextmanager
    def _phase(self, name: str, seconds: float) -> Iterator[None]:
        self._expect(name, seconds)
        usual = self._collective_seconds
        if usual is not None:
            set_group_timeouts(max(seconds, usual), dist.group.WORLD)
        yield
        if usual is not None:
            set_group_timeouts(usual, dist.group.WORLD)
        self._expect_step()

    def _expect_step(self) -> None:
        self._expect("step", self._settings.step_timeout_seconds)

    def _expect(self, phase: str, seconds: float) -> None:
        if self._watchdog is not None:
            self._watchdog.expect(phase, self.step, seconds)

    def shutdown_requested(self) -> bool:
        """Whether this rank was asked to shut down."""
        return self._shutdown is not None and bool(self._shutdown.reason)

    @property
    def stop_reason(self) -> str:
        """Why, as far as this rank knows."""
        return self._shutdown.reason if self.shutdown_requested() else "by another rank"

    def explain(self, error: RuntimeError) -> PeerError | None:
        """Return the error to report where other ranks are the cause."""
        problem = peer_problem(error, self._addresses)
        if not problem:
            return None
        where = f"step {self.step}" if self._first_step_done else "set-up"
        return PeerError(
            f"{this_rank()}: {where}: {problem}. Every rank ends; resume from the newest complete "
            "checkpoint with --resume auto"
        )


@contextlib.contextmanager
def supervised(
    settings: SupervisionConfig,
    run_dir: Path,
    early: EarlySignals,
    collective_seconds: float | None = None,
) -> Iterator[Supervisor]:
    """Watch this process: time-outs, launcher, shutdown requests (finish the step, save, end).

    Args:
        early: the launcher's processes, and the signals so far.
        collective_seconds: as `Supervisor`'s.
    Raises: PeerError in place of a library's message about a broken exchange.
    """
    watchdog = Watchdog(run_dir, settings.launcher_timeout_seconds, early)
    supervisor = Supervisor(settings, early, watchdog, collective_seconds)
    watchdog.start()
    write_rank_status(None, "started")
    try:
        yield supervisor
    except RuntimeError as error:
        if (explained := supervisor.explain(error)) is None:
            raise
        raise explained from error
    finally:
        watchdog.close()
