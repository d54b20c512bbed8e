"""Where a run continues: never at step 0 by itself, never from a checkpoint that it has left
behind, whatever is repeated.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from promoe_ds.checkpoint.manifest import MANIFEST, list_checkpoints, step_folder
from promoe_ds.checkpoint.resume import Choice, choose_checkpoint
from promoe_ds.errors import CheckpointError
from tests.unit.ranks import ONE_RANK

from . import files


def save(run_dir: Path, step: int, *, sound: bool = True) -> Path:
    """Write a small checkpoint."""
    folder = run_dir / "checkpoints" / step_folder(step)
    files.save(folder, step=step)
    if not sound:
        (folder / "a.pt").write_bytes(b"x" * 700)
    return folder


def choose(request: Path | str, run_dir: Path) -> Choice:
    run_dir.mkdir(exist_ok=True)
    return choose_checkpoint(str(request), run_dir, ONE_RANK)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_resume_auto_damaged_newest_is_set_aside_and_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 4, sound=False)
        sound = save(tmp_path, 2)
        assert choose("auto", tmp_path) == Choice(folder=sound, same_run=True)
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
    assert "continues with its own checkpoints" in caplog.text
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
    other, run = tmp_path / "other", tmp_path / "run"
    sound, damaged = save(other, 2), save(other, 4, sound=False)
    assert choose(other, run).folder == sound
    assert f"skipped {damaged / 'a.pt'} does not match its checksum" in caplog.text
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        choose(damaged, run)
    (sound / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json: not a complete checkpoint"):
        choose(other, run)
    assert len(list_checkpoints(other / "checkpoints")) == 2, "another run's folders stay"


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


@pytest.mark.parametrize(
    "content",
    ["{}", "{", *(f'{{"named": "x", "step": {step}}}' for step in ("1e999", "NaN", '"x"'))],
)
def test_resume_start_that_cannot_be_understood_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "start.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"start\.json: .* remove it"):
        choose("auto", tmp_path)
