"""What a file is, by its first bytes: for messages about files that are not what their name
says.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

TORCH = "a file of torch.save"
SCRIPT = "a TorchScript archive"
SAFETENSORS = "a safetensors file"
PARQUET = "a parquet file"
TAR = "a tar archive: unpack it first"

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
    (b"PAR1", PARQUET),
    # The number that torch.save put in front before it wrote zip archives.
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a torch file of before 1.6: load it with torch and save it again with torch.save",
    ),
    (b"\x80", "a plain pickle, which could run code: save its tensors with torch.save"),
)
_HEAD = 512


def identify(path: Path) -> str:
    """Return what a file is, a noun phrase, with what to do about it where something can be done.

    TORCH, SCRIPT, SAFETENSORS, PARQUET and TAR are returned as they are; nothing is executed from
    the file.
    Raises: OSError if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file: copy or download it again"
    for beginning, phrase in _BEGINNINGS:
        if head.startswith(beginning):
            return phrase
    if head.startswith(b"PK"):
        return _identify_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return SAFETENSORS
    if head[257:262] == b"ustar":
        return TAR
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype", "<html", "<?xml", "<head")):
        return "a web page: download the file itself, not the page that shows it"
    if b"\0" not in head and "\ufffd" not in text[:-1]:
        return "a text file"
    return "a file of an unknown kind: copy or download it again"


def _identify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "a zip archive that is cut off or damaged: copy or download it again"
    leaves = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in leaves:
        return SCRIPT
    if "data.pkl" in leaves:
        return TORCH
    if any(name.endswith(".npy") for name in leaves):
        return "a NumPy archive (.npz)"
    return "a zip archive of other files: unpack it first"
