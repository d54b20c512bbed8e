"""A checkpoint is declared complete when all of it is there, and what was just written is never
pruned.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from promoe_ds.checkpoint.manifest import (
    UNFINISHED,
    FileRecord,
    checksum,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from promoe_ds.checkpoint.save import _finish, _Pending

from ..builders import small_config


def finish(root: Path, step: int, records: dict[str, FileRecord], **train: int) -> str | None:
    """Complete a save of one rank whose files are written."""
    session = SimpleNamespace(
        config=small_config(train=train),
        context=SimpleNamespace(world_size=2),
        dataset=range(7),
        ema=SimpleNamespace(averages_since={}),
        module=torch.nn.Linear(2, 2),
        deepspeed_plan=SimpleNamespace(zero_stage=2, precision="fp32", json={}),
    )
    return _finish(
        session, root, _Pending(storage=None, step=step, samples_seen=step, failure=None), records
    )


def write(root: Path, step: int) -> dict[str, FileRecord]:
    """Write a save's only file."""
    folder = root / f"{step_folder(step)}{UNFINISHED}"
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"shard")
    return {"a.pt": FileRecord(5, checksum(folder / "a.pt"))}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (FileRecord(9, "0" * 16), "b.pt was written by another rank and is not there"),
        (None, "a.pt has 5 bytes, the rank that wrote it says 6"),
    ],
)
def test_save_file_on_another_host_s_disk_is_no_checkpoint(
    tmp_path: Path, record: FileRecord | None, message: str
) -> None:
    records = write(tmp_path, 1)
    problem = finish(
        tmp_path,
        1,
        {**records, "b.pt": record} if record else {"a.pt": FileRecord(6, records["a.pt"].xxh3)},
    )
    assert message in problem
    assert list_checkpoints(tmp_path) == []


def test_save_keeps_itself_when_later_folders_lie_about(tmp_path: Path) -> None:
    for step in (1, 2):
        assert finish(tmp_path, step, write(tmp_path, step), keep_last=2) is None
    (tmp_path / step_folder(9)).mkdir()
    assert finish(tmp_path, 3, write(tmp_path, 3), keep_last=2) is None
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_0000009",
        "step_0000003",
        "step_0000002",
    ]
    assert (tmp_path / "latest").read_text() == "step_0000003"
    manifest = read_manifest(tmp_path / "step_0000003")
    assert (manifest.step, manifest.dataset_size) == (3, 7)
    assert finish(tmp_path, 4, write(tmp_path, 4), keep_last=1, keep_every=2) is None
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_0000009",
        "step_0000004",
        "step_0000002",
    ]
