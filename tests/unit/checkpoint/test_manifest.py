"""The manifest: there and back, and every kind of damage named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    find_problems,
    list_checkpoints,
    list_unfinished,
    named_checkpoints,
    read_manifest,
    read_wandb_id,
    step_folder,
)
from promoe_ds.errors import CheckpointError

from .files import CONTENT, save


def change(folder: Path, **values: Any) -> None:
    """Overwrite fields of a manifest as versions wrote it that kept no checksum of it; a value of
    None removes the field.
    """
    path = folder / MANIFEST
    stored = {**json.loads(path.read_text()), "xxh3": None, **values}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def test_manifest_there_and_back_is_the_same(tmp_path: Path) -> None:
    manifest = save(tmp_path, averages_since={"ema": 3}, dataset_size=7)
    assert read_manifest(tmp_path) == manifest
    assert find_problems(tmp_path, manifest.files) == []


# Damage to files.


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        *((name, None, "is missing") for name in CONTENT),
        ("a.pt", b"wei", "has 3 bytes instead of 700"),
        *(
            (
                "a.pt",
                CONTENT["a.pt"][:position] + b"\0" + CONTENT["a.pt"][position + 1 :],
                "does not match its checksum",
            )
            for position in (0, 350, 699)
        ),
    ],
)
def test_manifest_damaged_file_is_named_and_the_others_are_not(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    manifest = save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "empty":
        (tmp_path / name).mkdir()  # a folder is no file
    assert find_problems(tmp_path, manifest.files) == [f"{tmp_path / name} {problem}"]


# Damage to the manifest.


def test_manifest_missing_is_no_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}: no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}"])
def test_manifest_unreadable_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / MANIFEST))):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("format", "layout", "config", "files")),
        *(("step", value) for value in (-3, "12")),
        ("layout", {"world_size": 1}),
        ("files", {"a.pt": 700}),
        ("files", {}),
        *(
            ("files", {name: {"bytes": 1, "xxh3": "2"}})
            for name in ("../secret", "/etc/passwd", "a/../../b", "..", "")
        ),
    ],
)
def test_manifest_field_that_cannot_be_is_named(tmp_path: Path, field: str, value: Any) -> None:
    save(tmp_path)
    change(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{field.removesuffix('s')}"):
        read_manifest(tmp_path)


def test_manifest_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """In a digit of the step above all: no file of the checkpoint would have told."""
    manifest = save(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    found = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 3  # digits become digits
        (tmp_path / MANIFEST).write_bytes(flipped)
        try:
            assert read_manifest(tmp_path) == manifest, position  # the checksum's own name
        except CheckpointError as error:
            found += "does not match its own checksum" in str(error)
    assert found > 100


def test_manifest_of_another_step_than_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / step_folder(6)
    save(folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json: says step 12"):
        read_manifest(folder)
    assert read_manifest(folder.rename(tmp_path / "best")).step == 12


@pytest.mark.parametrize("value", [1, 3, "2"])
def test_manifest_other_format_is_refused(tmp_path: Path, value: Any) -> None:
    save(tmp_path)
    change(tmp_path, format=value)
    with pytest.raises(CheckpointError, match=f"format {value} is not 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["a..b", "..a", "deep/er/file.pt"])
def test_manifest_file_name_with_dots_that_stays_is_taken(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    change(tmp_path, files={name: {"bytes": 1, "xxh3": "2"}})
    assert read_manifest(tmp_path).files == {name: FileRecord(1, "2")}


# Folders.


def test_checkpoints_are_listed_newest_first_by_number_and_unfinished_ones_apart(
    tmp_path: Path,
) -> None:
    assert list_checkpoints(tmp_path / "no") == list_unfinished(tmp_path / "no") == []
    sound = ["step_12345678", "step_0000100", "step_30", "step_0000020", "step_0000005"]
    for name in (*reversed(sound), "step_0000200.tmp", "step_x", "other.tmp", "latest_step_7"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_0000300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == sound
    assert [path.name for path in list_unfinished(tmp_path)] == ["step_0000200.tmp"]


def test_small_file_that_cannot_be_read_is_named_or_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    latest = tmp_path / "latest"
    latest.write_text("step_0000001")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"latest: cannot be read \(PermissionError: "):
        named_checkpoints(latest)
    assert read_wandb_id(tmp_path) == ""


def test_manifest_import_brings_no_torch() -> None:
    code = "import sys, promoe_ds.checkpoint.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
