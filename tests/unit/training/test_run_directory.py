"""The run directory: one training's at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.launch.heartbeat import ATTEMPT_VARIABLE
from promoe_ds.launch.lock import LockedError, locked
from promoe_ds.logs import configure_logging
from promoe_ds.run_files import LAUNCHER_LOCK, TRAINING_LOCK, make_launch_folder
from promoe_ds.training.run_directory import run_directory

from ..builders import small_config
from ..ranks import ONE_RANK


def test_run_directory_is_one_trainings_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)
    config, run_dir = small_config(parallel={"timeout_seconds": 0.4}), tmp_path / "run"

    def enter():
        return run_directory(run_dir, config, ONE_RANK, resume="auto")

    launcher = make_launch_folder(run_dir) / LAUNCHER_LOCK
    with locked(launcher, 60), pytest.raises(LockedError), enter():
        pass
    for _ in range(2):
        with enter():
            for attempt in (
                "",
                str(launcher.parent),
            ):  # a restarted rank waits for the one before, but not for ever
                monkeypatch.setenv(ATTEMPT_VARIABLE, attempt)
                with pytest.raises(LockedError), enter():
                    pass
    assert not list(run_dir.glob(f"{TRAINING_LOCK}*"))
    configure_logging(0)
