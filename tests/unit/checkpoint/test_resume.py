"""Where a run goes on: never at step 0 by itself, never from a checkpoint that it has left behind,
whatever is repeated.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch.distributed as dist

from promoe_ds.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Layout,
    Manifest,
    checksum,
    list_checkpoints,
    step_folder,
)
from promoe_ds.checkpoint.resume import Choice, choose_checkpoint
from promoe_ds.errors import CheckpointError
from tests.unit.ranks import ONE_RANK


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rank 0 tell and be told by itself alone."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src: None)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda values, value: values.__setitem__(0, value)
    )


def save(run_dir: Path, step: int, *, sound: bool = True) -> Path:
    """Write a small checkpoint."""
    folder = run_dir / "checkpoints" / step_folder(step)
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"x" * 8)
    layout = Layout(world_size=1, ep_size=1, dispatch="local", zero_stage=0, precision="fp32")
    Manifest(
        step=step,
        samples_seen=0,
        layout=layout,
        config={},
        versions={},
        files={"shard.pt": FileRecord(8, checksum(folder / "shard.pt") if sound else "0" * 16)},
    ).write(folder)
    return folder


def choose(request: Path | str, run_dir: Path) -> Choice:
    run_dir.mkdir(exist_ok=True)
    return choose_checkpoint(str(request), run_dir, ONE_RANK)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_resume_auto_damaged_newest_is_set_aside_and_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 4, sound=False)
        if not (tmp_path / "checkpoints" / step_folder(2)).exists():
            save(tmp_path, 2)
        choice = choose("auto", tmp_path)
        assert choice == Choice(folder=tmp_path / "checkpoints" / step_folder(2), same_run=True)
    assert names(tmp_path) == ["step_0000002", "step_0000004.abandoned", "step_0000004.abandoned_2"]


def test_resume_path_named_again_goes_on_with_what_the_run_reached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler repeats its command: the first checkpoint of the run's own counts from then
    on.
    """
    start, run = save(tmp_path / "start", 7), tmp_path / "run"
    assert choose(start, run) == choose(start, run) == Choice(folder=start, same_run=False)
    own = save(run, 9)
    with caplog.at_level(logging.INFO, logger="promoe_ds"):
        assert choose(start, run) == Choice(folder=own, same_run=True)
    assert "goes on with its own checkpoints" in caplog.text
    with pytest.raises(
        CheckpointError,
        match=r"checkpoints of its own, up to step_0000009, and was not started from",
    ):
        choose(save(tmp_path / "other", 1), run)
    assert choose("auto", run).folder == own


def test_resume_own_older_checkpoint_named_again_goes_on_from_there(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 3), save(tmp_path, 8)
    assert choose(older, tmp_path) == Choice(folder=older, same_run=False)
    assert not newer.exists()
    assert choose(older, tmp_path).folder == older
    reached = save(tmp_path, 5)
    assert choose(older, tmp_path) == Choice(folder=reached, same_run=True)


def test_resume_auto_of_a_run_started_from_a_path_never_starts_at_random(tmp_path: Path) -> None:
    start, run = save(tmp_path / "start", 0), tmp_path / "run"
    choose(start, run)
    (run / "checkpoints" / "step_0000001.tmp").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=rf"was started from {start} and has no checkpoint of its own"
    ):
        choose("auto", run)
    assert choose("none", run) == choose("auto", run) == Choice()


def test_resume_run_directory_takes_its_newest_sound_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound, damaged, run = (
        save(tmp_path / "other", 2),
        save(tmp_path / "other", 4, sound=False),
        tmp_path / "run",
    )
    assert choose(tmp_path / "other", run).folder == sound
    assert f"skipped {damaged / 'shard.pt'} does not match its checksum" in caplog.text
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        choose(damaged, run)
    (sound / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json: not a complete checkpoint"):
        choose(tmp_path / "other", run)
    assert len(list_checkpoints(tmp_path / "other" / "checkpoints")) == 2, (
        "another run's folders stay as they are"
    )


def test_resume_takes_the_file_that_names_the_newest(tmp_path: Path) -> None:
    newest, checkpoints = save(tmp_path / "other", 4), tmp_path / "other" / "checkpoints"
    save(tmp_path / "other", 2)
    (checkpoints / "latest").write_text(f"{newest.name}\n")
    for number, request in enumerate(
        [checkpoints / "latest", checkpoints, tmp_path / "other", newest]
    ):
        assert choose(request, tmp_path / f"run_{number}") == Choice(folder=newest, same_run=False)
    for content in (b"global_step100", b"", b"\xff", b"../step_0000004"):
        (checkpoints / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"--resume .*latest"):
            choose(checkpoints / "latest", tmp_path / "run")


@pytest.mark.parametrize("step", ["Infinity", "1e999", "NaN"])
def test_resume_start_of_no_step_is_named(tmp_path: Path, step: str) -> None:
    (tmp_path / "start.json").write_text(f'{{"named": "x", "step": {step}}}')
    with pytest.raises(CheckpointError, match=r"start\.json"):
        choose("auto", tmp_path)


def test_resume_start_that_cannot_be_understood_is_named(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"start\.json: cannot be understood .* remove it"):
        choose("auto", tmp_path)
