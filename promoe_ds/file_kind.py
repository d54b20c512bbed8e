"""What a file is, by its first bytes: for messages about files that are not what their name
says.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

TORCH = "a file of torch.save"
SCRIPT = "a TorchScript archive"
SAFETENSORS = "a safetensors file"

#: How files begin that no reader of checkpoints takes, and what to do about each.
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file: run `git lfs pull` in its repository",
    ),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"(\xb5/\xfd", "a zstd archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    # The number that torch.save put in front before it wrote zip archives.
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a torch file of before 1.6: load it with torch and save it again with torch.save",
    ),
    (b"\x80", "a plain pickle, which could run code: save its tensors with torch.save"),
)
_HEAD = 512


def identify(file: Path | BinaryIO) -> str:
    """Return what a file is, a noun phrase, with what to do about it where something can be done.

    TORCH, SCRIPT and SAFETENSORS are returned as they are; nothing is executed from the file.
    Args:
        file: a path, or an open file at its beginning, where it is afterwards.
    Raises: OSError if it cannot be read.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return identify(opened)
    head = file.read(_HEAD)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not head:
        return "an empty file: copy or download it again"
    for beginning, phrase in _BEGINNINGS:
        if head.startswith(beginning):
            return phrase
    if head.startswith(b"PK"):
        return _identify_zip(file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return SAFETENSORS
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype", "<html", "<?xml", "<head")):
        return "a web page: download the file itself, not the page that shows it"
    if b"\0" not in head and "\ufffd" not in text[:-1]:
        return "a text file"
    return "a file of an unknown kind: copy or download it again"


def _identify_zip(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            leaves = {name.partition("/")[2] for name in archive.namelist()} | set(
                archive.namelist()
            )
    except zipfile.BadZipFile:
        return "a zip archive that is cut off or damaged: copy or download it again"
    finally:
        file.seek(0)
    if "constants.pkl" in leaves:
        return SCRIPT
    if "data.pkl" in leaves:
        return TORCH
    if any(name.endswith(".npy") for name in leaves):
        return "a NumPy archive (.npz)"
    return "a zip archive of other files: unpack it first"
