"""The run directory: made for a run, or recognised as this run's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from promoe_ds.checkpoint.load import differing_fields
from promoe_ds.checkpoint.manifest import list_checkpoints
from promoe_ds.config import RunConfig
from promoe_ds.config.loader import read_saved, saved_text
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.files import replace_text
from promoe_ds.launch.heartbeat import attempt_folder
from promoe_ds.launch.lock import locked, wait_until_free
from promoe_ds.logs import configure_logging
from promoe_ds.run_files import LAUNCH_FOLDER, LAUNCHER_LOCK, STACKS_FOLDER, TRAINING_LOCK
from promoe_ds.training.watchdog import end_rank


@contextmanager
def run_directory(
    run_dir: Path, config: RunConfig, context: DistributedContext, *, resume: str
) -> Iterator[None]:
    """Hold the run directory for this training: create it with `config.yaml`, or check that it is
    this run's.

    All ranks call this together; rank 0 holds the lock and writes `train.log`.
    Raises: LockedError if another training has it; CheckpointError if it is another run's or cannot
    be written: the same on every rank.
    """
    with ExitStack() as held:
        context.on_main(lambda: _take(run_dir, config, resume, held))
        yield


def _take(run_dir: Path, config: RunConfig, resume: str, held: ExitStack) -> None:
    try:
        _require_free(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _lock(run_dir, config, held)
        _open(run_dir, config, resume)
        configure_logging(0, log_file=run_dir / "train.log")
    except OSError as error:
        raise CheckpointError(
            f"--run-dir {run_dir}: {error}: correct its rights, free the disk, or use another"
            " directory"
        ) from None


def _require_free(run_dir: Path) -> None:
    """Refuse a folder with anything in it that is not a run's."""
    if not run_dir.is_dir() or (run_dir / "config.yaml").is_file():
        return
    for path in run_dir.iterdir():
        # A lock being taken over, and a config that a full disk has cut off, have longer names.
        is_ours = path.name.startswith((TRAINING_LOCK, ".config.yaml"))
        if not is_ours and path.name not in (LAUNCH_FOLDER, STACKS_FOLDER):
            raise CheckpointError(
                f"--run-dir {run_dir} is not empty and holds no run of this package: use another"
                " directory"
            )


def _lock(run_dir: Path, config: RunConfig, held: ExitStack) -> None:
    """Take the run directory; ranks of an earlier attempt of the same launcher get the time to
    end.
    """
    longest = config.parallel.timeout_seconds / 2  # the other ranks wait in a collective
    period = min(config.supervision.launcher_timeout_seconds, longest)
    patience = min(3 * period, longest)
    if attempt_folder() is None:  # no launcher of ours started this rank: none may be at work here
        wait_until_free(run_dir / LAUNCH_FOLDER / LAUNCHER_LOCK, period)
        patience = 0.0
    held.enter_context(locked(run_dir / TRAINING_LOCK, period, patience=patience, on_loss=end_rank))


def _open(run_dir: Path, config: RunConfig, resume: str) -> None:
    saved = run_dir / "config.yaml"
    started = (run_dir / "metrics.jsonl").exists() or list_checkpoints(run_dir / "checkpoints")
    if saved.is_file() and started:
        if resume == "none":
            raise CheckpointError(
                f"--run-dir {run_dir} already holds a run and --resume none would overwrite it: use"
                " --resume auto to continue it, or another directory"
            )
        try:
            before = read_saved(saved)
        except ConfigError as error:
            raise CheckpointError(
                f"{saved} is damaged, or of another version: {error}. A checkpoint's manifest.json"
                " has the config, too"
            ) from None
        differing = differing_fields(
            before.model_dump(mode="json"), config, architecture_only=False
        )
        if differing:
            raise CheckpointError(
                f"--run-dir {run_dir} already holds another run: {'; '.join(differing)}. To"
                f" continue it with other settings, branch: --resume {run_dir} --run-dir NEW"
            )
    replace_text(saved, saved_text(config))  # first: without it a folder is not a run's
    (run_dir / "checkpoints").mkdir(exist_ok=True)
