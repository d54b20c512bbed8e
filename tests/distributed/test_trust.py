"""Killed in the midst of saving: what is complete is found again, what is not is named and left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from promoe_ds.engine.conversion import Request, convert
from promoe_ds.engine.manifest import (
    MANIFEST,
    FileRecord,
    checksum,
    find_problems,
    list_checkpoints,
    list_unfinished,
    read_manifest,
)
from promoe_ds.errors import CheckpointError

from .jobs import Job, metrics, run_jobs, start_jobs

OVERRIDES = ("parallel.ep_size=2", "train.checkpoint_every=1", "train.keep_last=3")


def _kill_while_saving(job: Job, folder: Path, delay: float) -> None:
    """Start a run, wait for its first save and `delay` seconds more, kill all its processes."""
    process = start_jobs(2, [job], folder)
    try:
        deadline = time.monotonic() + 60
        while not list(job.run_dir.glob("checkpoints/step_*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        for pid in _processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert not _processes_of(folder)


def _processes_of(folder: Path) -> list[int]:
    """Return torchrun and its workers: they have sessions of their own."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()
            and b"tests.distributed.worker" in _command(path.name) and str(folder).encode() in _command(path.name)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_kill_at_random_points_of_saving_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    chance = random.Random(0)
    for attempt in range(3):
        run_dir = tmp_path / f"run{attempt}"
        _kill_while_saving(Job(run_dir=run_dir, overrides=(*OVERRIDES, "train.max_steps=500")), tmp_path, chance.uniform(0.0, 0.6))
        root = run_dir / "checkpoints"
        complete, unfinished = list_checkpoints(root), list_unfinished(root)
        for folder in complete:
            assert (folder / MANIFEST).is_file()
            assert find_problems(folder, read_manifest(folder).files) == []
        step = read_manifest(complete[0]).step if complete else 0
        again = Job(run_dir=run_dir, overrides=(*OVERRIDES, "train.max_steps=500", "train.stop_after_steps=1"))
        assert run_jobs(2, [again], tmp_path) == [""]
        assert metrics(run_dir)[-1]["step"] == step + 1
        log = (run_dir / "train.log").read_text()
        assert all(f"{path} (the save never ended)" in log for path in unfinished)
        assert (f"resume: taking {complete[0]}" if complete else "starting from step 0") in log


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trust")
    assert run_jobs(2, [Job(run_dir=folder / "run", overrides=(*OVERRIDES, "train.max_steps=4", "train.stop_after_steps=2"))],
                    folder) == [""]
    return folder / "run"


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_malicious_shard_with_a_matching_manifest_runs_nothing(run: Path, tmp_path: Path, file: str) -> None:
    """A checksum says that a file is as it was written, not who wrote it: reading must be safe in itself."""
    forged = Path(shutil.copytree(run, tmp_path / "run"))
    newest, trace = list_checkpoints(forged / "checkpoints")[0], tmp_path / "executed"
    torch.save({"module": _Bomb(trace), "optimizer_state_dict": _Bomb(trace)}, newest / file)
    manifest = read_manifest(newest)
    manifest.files[file] = FileRecord((newest / file).stat().st_size, checksum(newest / file))
    manifest.write(newest)
    with pytest.raises(CheckpointError, match=file):
        convert(forged, Request(destination=tmp_path / "export", to="single"))
    error = run_jobs(2, [Job(run_dir=forged, overrides=(*OVERRIDES, "train.max_steps=4"))], tmp_path)[0]
    assert file in error
    assert not trace.exists()


def test_pointer_to_nowhere_and_folder_without_manifest_are_passed_over(run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    root = broken / "checkpoints"
    (root / "latest").write_text("step_0009999")
    newest, before = list_checkpoints(root)[:2]
    (newest / MANIFEST).unlink()
    assert run_jobs(2, [Job(run_dir=broken, overrides=(*OVERRIDES, "train.max_steps=4", "train.stop_after_steps=1"))],
                    tmp_path) == [""]
    log = (broken / "train.log").read_text()
    assert f"resume: skipped {newest}: no {MANIFEST}: not a complete checkpoint" in log
    assert f"resume: taking {before}" in log
