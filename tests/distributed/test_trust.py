"""Killed in the midst of saving: what is complete is found again, what is not is named and left
alone.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    checksum,
    find_problems,
    list_checkpoints,
    list_unfinished,
    read_manifest,
)
from promoe_ds.checkpoint.zero_reader import ShardedCheckpoint
from promoe_ds.errors import CheckpointError

from .jobs import Job, losses, metrics, run_jobs, start_jobs

OVERRIDES = ("parallel.ep_size=2", "train.checkpoint_every=1", "train.keep_last=3")


def _kill_while_saving(job: Job, folder: Path, delay: float) -> None:
    """Start a run, wait for its first save and `delay` seconds more, kill all its processes."""
    with start_jobs(2, [job], folder) as forks:
        deadline = time.monotonic() + 200
        while not list(job.run_dir.glob("checkpoints/step_*")):
            assert forks.is_alive() and time.monotonic() < deadline, forks.texts()
            time.sleep(0.002)
        time.sleep(delay)
        assert forks.is_alive(), forks.texts()


def test_kill_at_random_points_of_saving_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    chance = random.Random(0)
    for attempt in range(3):
        run_dir = tmp_path / f"run{attempt}"
        job = Job(
            run_dir=run_dir,
            overrides=(*OVERRIDES, "train.max_steps=500", f"train.async_checkpoint={attempt == 1}"),
        )
        _kill_while_saving(job, tmp_path, chance.uniform(0.0, 0.6))
        root = run_dir / "checkpoints"
        complete, unfinished = list_checkpoints(root), list_unfinished(root)
        for folder in complete:
            assert (folder / MANIFEST).is_file()
            assert find_problems(folder, read_manifest(folder).files) == []
        step = read_manifest(complete[0]).step if complete else 0
        again = Job(
            run_dir=run_dir,
            overrides=(*OVERRIDES, "train.max_steps=500", "train.stop_after_steps=1"),
        )
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
    assert run_jobs(
        2,
        [
            Job(
                run_dir=folder / "run",
                overrides=(*OVERRIDES, "train.max_steps=4", "train.stop_after_steps=2"),
            )
        ],
        folder,
    ) == [""]
    return folder / "run"


@pytest.mark.parametrize(
    "file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_malicious_shard_with_a_matching_manifest_runs_nothing(
    run: Path, tmp_path: Path, file: str
) -> None:
    """A checksum says that a file is as it was written, not who wrote it: reading must be safe in
    itself.
    """
    forged = Path(shutil.copytree(run, tmp_path / "run"))
    newest, trace = list_checkpoints(forged / "checkpoints")[0], tmp_path / "executed"
    torch.save({"module": _Bomb(trace), "optimizer_state_dict": _Bomb(trace)}, newest / file)
    manifest = read_manifest(newest)
    manifest.files[file] = FileRecord((newest / file).stat().st_size, checksum(newest / file))
    manifest.write(newest)
    with pytest.raises(CheckpointError, match=file):
        convert(forged, Request(destination=tmp_path / "export", to="single"))
    error = run_jobs(
        2, [Job(run_dir=forged, overrides=(*OVERRIDES, "train.max_steps=4"))], tmp_path
    )[0]
    assert file in error
    assert not trace.exists()


def test_pointer_to_nowhere_and_folder_without_manifest_are_passed_over(
    run: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    root = broken / "checkpoints"
    (root / "latest").write_text("step_0009999")
    newest, before = list_checkpoints(root)[:2]
    (newest / MANIFEST).unlink()
    assert run_jobs(
        2,
        [
            Job(
                run_dir=broken,
                overrides=(*OVERRIDES, "train.max_steps=4", "train.stop_after_steps=1"),
            )
        ],
        tmp_path,
    ) == [""]
    log = (broken / "train.log").read_text()
    assert f"resume: skipped {newest}: no {MANIFEST}: not a complete checkpoint" in log
    assert f"resume: taking {before}" in log


@pytest.fixture(scope="module")
def background(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train alike, once saving in the foreground, else in the background, slowly, and once with a
    disk that fails.
    """
    folder = tmp_path_factory.mktemp("background")

    def job(name: str, *overrides: str, **fault) -> Job:
        settings = (
            "parallel.ep_size=2",
            "train.checkpoint_every=2",
            "train.max_steps=6",
            "train.keep_last=1",
            "train.keep_every=4",
            *overrides,
        )
        return Job(
            run_dir=folder / name,
            overrides=settings,
            fault={"kind": "write", **fault} if fault else None,
        )

    asynchronous = "train.async_checkpoint=true"
    errors = run_jobs(
        2,
        [
            job("foreground"),
            job("background", asynchronous, seconds=0.2, rank=0, fails="never"),
            job("failing", asynchronous, seconds=0.05, rank=1, fails="step_0000004"),
            job("stopped", asynchronous, "train.stop_after_steps=3"),
            job("stopped", asynchronous),
        ],
        folder,
    )
    return folder, errors


def test_background_save_goes_on_beside_training_and_holds_the_step_that_was_asked(
    background,
) -> None:
    folder, errors = background
    assert errors[:2] == ["", ""]
    log = (folder / "background" / "train.log").read_text()
    assert (
        log.index("step 3/6")
        < log.index("step 2: saved")
        < log.index("step 4: saved")
        < log.index("step 6: saved")
    )
    names = [path.name for path in list_checkpoints(folder / "foreground" / "checkpoints")]
    assert names == ["step_0000006", "step_0000004"], "the last one, and every fourth step's"
    for name in names:
        mine, reference = (
            folder / run / "checkpoints" / name for run in ("background", "foreground")
        )
        records = [read_manifest(path).files for path in (mine, reference)]
        assert records[0].keys() == records[1].keys()
        assert find_problems(mine, records[0]) == []
        sharded = [ShardedCheckpoint(path, read_manifest(path)) for path in (mine, reference)]
        for kind in sharded[0].kinds:
            for tensor in sharded[0].names(kind):
                values = [checkpoint.read(kind, tensor) for checkpoint in sharded]
                assert torch.equal(*values), (name, kind, tensor)


def test_background_save_that_fails_ends_training_and_leaves_what_was_complete(background) -> None:
    folder, errors = background
    assert "step 4: the checkpoint could not be written: rank 1: " in errors[2]
    assert "the disk is on fire" in errors[2]
    assert "the newest complete checkpoint is" in errors[2]
    assert [path.name for path in (folder / "failing" / "checkpoints").glob("step_*")] == [
        "step_0000002"
    ]


def test_background_save_is_resumed_from_like_any_other(background) -> None:
    folder, errors = background
    assert errors[3:] == ["", ""]
    assert "resume: taking" in (folder / "stopped" / "train.log").read_text()
    assert losses(folder / "stopped") == losses(folder / "foreground")
