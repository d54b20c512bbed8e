"""The training loop, on one screen, and the one seam for what happens every so many steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from promoe_ds.errors import Preempted, TrainingError
from promoe_ds.logs import get_logger
from promoe_ds.training.step import StepResult, Verdict
from promoe_ds.training.supervisor import Supervisor
from promoe_ds.training.trainer import Trainer

_LOG = get_logger("train")


@dataclass
class FinishedStep:
    """What an action learns of the step that was done."""

    #: Steps done so far.
    step: int
    result: StepResult
    #: Whether training ends here.
    is_last: bool
    #: What actions have measured, for the log line; actions run in the order in which they were
    # added.
    figures: dict[str, float] = field(default_factory=dict)


Action = Callable[[FinishedStep], None]


class TrainingLoop:
    """Runs steps to the end, and after each the actions that are due."""

    def __init__(self, trainer: Trainer, supervisor: Supervisor) -> None:
        """Train with `trainer` from the step that it has reached; the supervisor may ask for a
        shutdown.
        """
        self._trainer, self._supervisor = trainer, supervisor
        self._actions: list[tuple[int, bool, Action]] = []
        self._skipped_in_a_row = 0
        self._unread: deque[StepResult] = deque()

    def every(self, steps: int, action: Action, *, at_end: bool = True) -> None:
        """Run `action` after every step whose number `steps` divides, and (`at_end`) after the last
        one.

        All ranks run it, in the same order: it may hold collectives.
        """
        self._actions.append((steps, at_end, action))

    def run(self) -> None:
        """Train until `train.max_steps`, `train.stop_after_steps` or a shutdown request.

        Raises: TrainingError after too many updates in a row that were not finite; Preempted after
        a shutdown request.
        """
        trainer, settings = self._trainer, self._trainer.config.train
        trainer.shutdown_requested = self._supervisor.shutdown_requested
        last = min(
            settings.max_steps, trainer.step + (settings.stop_after_steps or settings.max_steps)
        )
        if trainer.step >= settings.max_steps:
            _LOG.info("nothing to do: step %d of %d is reached", trainer.step, settings.max_steps)
        stop_requested = False
        while trainer.step < last:
            self._supervisor.begin_step(trainer.step)
            result = trainer.train_step()
            self._supervisor.end_step()
            self._unread.append(result)
            stop_requested = self._read(behind=trainer.results_behind)
            last = trainer.step if stop_requested else last
            finished = FinishedStep(step=trainer.step, result=result, is_last=trainer.step == last)
            if finished.is_last:
                stop_requested |= self._read(behind=0)
            for steps, at_end, action in self._actions:
                if trainer.step % steps == 0 or (at_end and finished.is_last):
                    action(finished)
        if stop_requested and trainer.step < settings.max_steps:
            raise Preempted(
                f"shutdown requested ({self._supervisor.stop_reason}): saved step {trainer.step} of"
                f" {settings.max_steps} and ended; resume with --resume auto"
            )
        if trainer.step < settings.max_steps:
            _LOG.info(
                "stopped after step %d of %d (train.stop_after_steps)",
                trainer.step,
                settings.max_steps,
            )

    def _read(self, *, behind: int) -> bool:
        """Read what is known of steps but the newest ones; return whether some rank asked for a
        shutdown.
        """
        stop_requested = False
        while len(self._unread) > behind:
            verdict = self._unread.popleft().verdict
            self._count_skipped(verdict)
            stop_requested |= verdict.stop_requested
        return stop_requested

    def _count_skipped(self, verdict: Verdict) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if verdict.problem else 0
        if not verdict.problem:
            return
        if self._trainer.context.is_main:
            _LOG.warning(
                "skipped the update, %d in a row: %s", self._skipped_in_a_row, verdict.problem
            )
        most = self._trainer.config.train.max_nonfinite_steps
        if self._skipped_in_a_row >= most:
            raise TrainingError(
                f"{self._skipped_in_a_row} updates in a row were not finite "
                f"(train.max_nonfinite_steps={most}); {verdict.problem}. Branch from a checkpoint "
                "before it, with a lower optimizer.lr: --resume CHECKPOINT --run-dir NEW"
            )
