"""The run directory: one training's at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import promoe_ds.training.run_directory as module
from promoe_ds.errors import CheckpointError
from promoe_ds.launch.heartbeat import ATTEMPT_VARIABLE
from promoe_ds.launch.lock import LockedError, locked
from promoe_ds.logs import configure_logging
from promoe_ds.run_files import LAUNCH_FOLDER, LAUNCHER_LOCK, TRAINING_LOCK, make_folder
from promoe_ds.training.run_directory import run_directory

from ..builders import small_config
from ..ranks import ONE_RANK

CONFIG = small_config(parallel={"timeout_seconds": 0.4})


def enter(run_dir: Path) -> AbstractContextManager[None]:
    return run_directory(run_dir, CONFIG, ONE_RANK, resume="auto")


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)
    yield
    configure_logging(0)


def test_run_directory_is_one_trainings_at_a_time(tmp_path: Path, monkeypatch) -> None:
    run_dir = tmp_path / "run"
    launcher = make_folder(run_dir, LAUNCH_FOLDER) / LAUNCHER_LOCK
    with locked(launcher, 60), pytest.raises(LockedError), enter(run_dir):
        pass
    for _ in range(2):
        with enter(run_dir):
            for attempt in (
                "",
                str(launcher.parent),
            ):  # a restarted rank waits for the one before, but not for ever
                monkeypatch.setenv(ATTEMPT_VARIABLE, attempt)
                with pytest.raises(LockedError), enter(run_dir):
                    pass
    assert not list(run_dir.glob(f"{TRAINING_LOCK}*"))


def test_run_directory_on_a_disk_that_was_full_is_taken_when_it_is_not(
    tmp_path: Path, monkeypatch
) -> None:
    def cut_off(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.tmp").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(module, "replace_text", cut_off)
        with pytest.raises(CheckpointError, match="No space left"), enter(tmp_path):
            pass
    with enter(tmp_path):
        assert (tmp_path / "config.yaml").is_file()


def test_run_directory_with_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    with enter(tmp_path):
        pass
    (tmp_path / "train.log").unlink()
    (tmp_path / "train.log").mkdir()
    with pytest.raises(CheckpointError, match=r"train\.log"), enter(tmp_path):
        pass


def test_run_directory_with_files_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(CheckpointError, match="holds no run"), enter(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
