"""The manifest: there and back, and every kind of damage named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from promoe_ds.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Layout,
    Manifest,
    checksum,
    find_problems,
    list_checkpoints,
    list_unfinished,
    read_manifest,
    step_folder,
)
from promoe_ds.errors import CheckpointError

CONTENT = {"a.pt": b"weights" * 100, "experts/b.pt": b"\x00\xff" * 50, "empty": b""}


def save(folder: Path) -> Manifest:
    """Write a small checkpoint with its manifest."""
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {
        name: FileRecord(len(content), checksum(folder / name)) for name, content in CONTENT.items()
    }
    layout = Layout(
        world_size=4,
        ep_size=2,
        dispatch="deepspeed",
        zero_stage=2,
        precision="bf16",
        data_before_expert=True,
    )
    manifest = Manifest(
        step=12,
        samples_seen=3072,
        layout=layout,
        config={"train": {"seed": 3}},
        files=files,
        versions={"torch": "2.13"},
    )
    manifest.write(folder)
    return manifest


def change(folder: Path, **values: Any) -> None:
    """Overwrite fields of a manifest as versions wrote it that kept no checksum of it; a value of
    None removes the field.
    """
    path = folder / MANIFEST
    stored = {**json.loads(path.read_text()), "xxh3": None, **values}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def test_manifest_there_and_back_is_the_same(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert find_problems(tmp_path, manifest.files) == []


def test_manifest_layout_says_what_a_user_set() -> None:
    layout = Layout(world_size=4, ep_size=2, dispatch="deepspeed", zero_stage=2, precision="bf16")
    assert str(layout) == "4 ranks, parallel.ep_size=2, expert storage deepspeed, ZeRO 2, bf16"


# Damage to files.


def problems(folder: Path, name: str, content: bytes | None, **kwargs: Any) -> list[str]:
    manifest = save(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return find_problems(folder, manifest.files, **kwargs)


@pytest.mark.parametrize("name", CONTENT)
def test_manifest_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, name, None) == [f"{tmp_path / name} is missing"]


def test_manifest_cut_file_is_named_with_sizes(tmp_path: Path) -> None:
    assert problems(tmp_path, "a.pt", b"wei") == [f"{tmp_path / 'a.pt'} has 3 bytes instead of 700"]


@pytest.mark.parametrize("position", [0, 350, 699])
def test_manifest_flipped_bit_is_named(tmp_path: Path, position: int) -> None:
    content = bytearray(CONTENT["a.pt"])
    content[position] ^= 1
    assert problems(tmp_path, "a.pt", bytes(content)) == [
        f"{tmp_path / 'a.pt'} does not match its checksum"
    ]


def test_manifest_folder_in_place_of_a_file_is_missing(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    (tmp_path / "empty").unlink()
    (tmp_path / "empty").mkdir()
    assert find_problems(tmp_path, manifest.files) == [f"{tmp_path / 'empty'} is missing"]


def test_manifest_all_damage_is_told_at_once(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    (tmp_path / "a.pt").unlink()
    (tmp_path / "experts/b.pt").write_bytes(b"")
    assert len(find_problems(tmp_path, manifest.files)) == 2


def test_manifest_share_of_the_files_is_checked_alone(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    (tmp_path / "a.pt").unlink()
    assert find_problems(tmp_path, {"experts/b.pt": manifest.files["experts/b.pt"]}) == []


def test_checksum_is_xxh3_over_many_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # 10 MB: three blocks
    (tmp_path / "big").write_bytes(content)
    assert checksum(tmp_path / "big") == xxhash.xxh3_64_hexdigest(content)


# Damage to the manifest.


def test_manifest_missing_is_no_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"{re.escape(str(tmp_path))}: no manifest.json: not a complete checkpoint",
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}"])
def test_manifest_unreadable_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(tmp_path / MANIFEST))}: cannot be understood"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "field", ["step", "samples_seen", "layout", "config", "files", "versions", "format"]
)
def test_manifest_field_missing_is_named(tmp_path: Path, field: str) -> None:
    save(tmp_path)
    change(tmp_path, **{field: None})
    with pytest.raises(CheckpointError, match=rf"cannot be understood \(KeyError: '{field}'\)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "twelve"),
        ("samples_seen", []),
        ("layout", {"world_size": 1}),
        ("layout", {"unknown": 1}),
        ("layout", 3),
        ("config", 3),
        ("files", ["a.pt"]),
        ("files", {"a.pt": 700}),
        ("files", {"a.pt": {"bytes": 1}}),
        ("files", {"a.pt": {"bytes": 1, "xxh3": "2", "md5": 3}}),
        ("versions", 5),
    ],
)
def test_manifest_field_of_another_type_is_not_understood(
    tmp_path: Path, field: str, value: Any
) -> None:
    save(tmp_path)
    change(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match="cannot be understood"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["step", "samples_seen"])
@pytest.mark.parametrize("value", [-3, 2.5, True, "12"])
def test_manifest_count_that_is_none_is_not_understood(
    tmp_path: Path, name: str, value: Any
) -> None:
    save(tmp_path)
    change(tmp_path, **{name: value})
    with pytest.raises(
        CheckpointError, match=f"cannot be understood .*{name}={value!r} is no number of 0 or more"
    ):
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
    folder.mkdir()
    save(folder)
    change(folder)
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: says step 12, its folder's name another"
    ):
        read_manifest(folder)
    assert read_manifest(folder.rename(tmp_path / "best")).step == 12


@pytest.mark.parametrize("value", [1, 3, "2"])
def test_manifest_other_format_is_refused(tmp_path: Path, value: Any) -> None:
    save(tmp_path)
    change(tmp_path, format=value)
    with pytest.raises(
        CheckpointError, match=f"format {value} is not 2; use the version that wrote it"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", ""])
def test_manifest_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    change(tmp_path, files={name: {"bytes": 1, "xxh3": "2"}})
    with pytest.raises(
        CheckpointError, match=re.escape(f"the file name {name!r} leaves the checkpoint's folder")
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["a..b", "..a", "deep/er/file.pt"])
def test_manifest_file_name_with_dots_that_stays_is_taken(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    change(tmp_path, files={name: {"bytes": 1, "xxh3": "2"}})
    assert read_manifest(tmp_path).files == {name: FileRecord(1, "2")}


# Folders.


def test_checkpoints_are_listed_newest_first_by_number(tmp_path: Path) -> None:
    for step in (5, 100, 20, 12_345_678):
        (tmp_path / step_folder(step)).mkdir()
    (tmp_path / "step_30").mkdir()  # another width is the same number
    for name in ("step_0000200.tmp", "step_x", "other", "latest_step_7"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_0000300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_12345678",
        "step_0000100",
        "step_30",
        "step_0000020",
        "step_0000005",
    ]


def test_checkpoints_unfinished_are_listed_apart(tmp_path: Path) -> None:
    for name in ("step_0000002.tmp", "step_0000001.tmp", "step_0000003", "other.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_unfinished(tmp_path)] == [
        "step_0000001.tmp",
        "step_0000002.tmp",
    ]


def test_checkpoints_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "no") == list_unfinished(tmp_path / "no") == []


def test_manifest_import_brings_no_torch() -> None:
    code = "import sys, promoe_ds.checkpoint.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
