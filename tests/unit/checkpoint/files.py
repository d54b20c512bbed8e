"""A small checkpoint on disk, as its manifest describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promoe_ds.checkpoint.manifest import FileRecord, Layout, Manifest, checksum

CONTENT = {"a.pt": b"weights" * 100, "experts/b.pt": b"\x00\xff" * 50, "empty": b""}


def save(folder: Path, **fields: Any) -> Manifest:
    """Write a small checkpoint with its manifest, whose `fields` these are."""
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    layout = Layout(world_size=4, ep_size=2, dispatch="deepspeed", zero_stage=2, precision="bf16")
    files = {
        name: FileRecord(len(content), checksum(folder / name)) for name, content in CONTENT.items()
    }
    values = {"step": 12, "samples_seen": 3072, "config": {"train": {"seed": 3}}, "versions": {}}
    manifest = Manifest(**{**values, "layout": layout, "files": files, **fields})
    manifest.write(folder)
    return manifest
