"""A checkpoint is declared complete when all of it is there, and what was just written is never
pruned.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from promoe_ds.checkpoint.manifest import (
    MANIFEST,
    UNFINISHED,
    FileRecord,
    Manifest,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from promoe_ds.checkpoint.save import complete_checkpoint
from promoe_ds.errors import CheckpointError

from .files import save


def write(root: Path, step: int) -> Manifest:
    """Write the files of a save, without its manifest."""
    folder = root / f"{step_folder(step)}{UNFINISHED}"
    manifest = save(folder, step=step)
    (folder / MANIFEST).unlink()
    return manifest


def test_save_file_on_another_host_s_disk_is_no_checkpoint(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1)
    for name, problem in (("b.pt", "is missing"), ("a.pt", "has 700 bytes instead of 9")):
        files = {**manifest.files, name: FileRecord(9, "0" * 16)}
        with pytest.raises(CheckpointError, match=rf"{name} {problem}"):
            complete_checkpoint(tmp_path, replace(manifest, files=files), keep_last=1)
    assert list_checkpoints(tmp_path) == []


def test_save_keeps_itself_when_later_folders_exist(tmp_path: Path) -> None:
    def complete(step: int, **kept: int) -> list[str]:
        complete_checkpoint(tmp_path, write(tmp_path, step), **kept)
        return [path.name for path in list_checkpoints(tmp_path)]

    complete(1, keep_last=2)
    complete(2, keep_last=2)
    (tmp_path / step_folder(9)).mkdir()
    assert complete(3, keep_last=2) == ["step_0000009", "step_0000003", "step_0000002"]
    assert (tmp_path / "latest").read_text() == "step_0000003"
    assert read_manifest(tmp_path / "step_0000003").step == 3
    names = complete(4, keep_last=1, keep_every=2)
    assert names == ["step_0000009", "step_0000004", "step_0000002"]
