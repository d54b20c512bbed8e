"""Which files are meant: one, those of a pattern, those of a folder and split, those of a data set
on the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from glob import glob, has_magic
from itertools import product
from pathlib import Path

from promoe_ds.data.listing import FileList, Files
from promoe_ds.data.reading import reading, shown, some_of
from promoe_ds.data.trees import root_of_split
from promoe_ds.errors import DataError

#: Extensions of files that hold many records.
PACKED_SUFFIXES = (".parquet", ".tar", ".pt")
#: Words in the names of such files by which people tell the splits apart.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BRACES = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_files(
    path: Path, suffixes: Collection[str], *, split: str, kind: str | None = None
) -> Files:
    """Return the files of these extensions that are meant by a path.

    Args:
        path: a file, a pattern (`*`, `?`, `[]`, `{000..127}`, `{a,b}`), or a folder: then the
            files below it, of a split where it has several.
        kind: what messages call such a file.
    Returns: files with names relative to `root`, sorted; of a folder a FileList.
    Raises: DataError if there is none, or it is not clear which are meant.
    """
    if path.is_dir():
        found = FileList(root_of_split(path, split), suffixes, kind=kind)
        found.names = _of_split(found, split)
        return found
    paths = [path] if path.is_file() else sorted(set(_matching(path)))
    if others := [each.name for each in paths if each.suffix.lower() not in suffixes]:
        raise DataError(
            f"{shown(path)}: {some_of(others)} is no {kind or ', '.join(suffixes)} file; images are"
            " read from the folder that holds them"
        )
    if not paths:
        raise DataError(f"{shown(path)}: no such file or folder")
    root = Path(os.path.commonpath([each.parent for each in paths]))
    return Files(root, sorted(str(each.relative_to(root)) for each in paths))


def fetch_from_hub(path: Path, split: str) -> Path:
    """Return a path as it is if it is there, or the local copy of a data set of the hub.

    Of the latter the parquet files and tars are downloaded whose names hold the split; files that
    are in the hub's cache already are not.
    Raises: DataError if it is neither.
    """
    name = str(path)
    if path.exists() or has_magic(name) or _BRACES.search(name) or name.count("/") != 1:
        return path
    with reading(path, "folder, nor a data set of the hub"):
        from huggingface_hub import snapshot_download

        wanted = [
            f"*{word}*{suffix}"
            for word, suffix in product(sorted(_SPLIT_WORDS[split]), PACKED_SUFFIXES)
        ]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))


def _of_split(files: Files, split: str) -> list[str]:
    """Return the packed files of a split, where their names say any; all others as they are."""
    packed = [name for name in files.names if name.lower().endswith(PACKED_SUFFIXES)]
    splits = {name: _splits_in(name) for name in packed}
    if not any(splits.values()):
        return files.names
    if strange := [name for name, found in splits.items() if len(found) != 1]:
        raise DataError(
            f"{files.root}: {some_of(strange)}: of which split? Other files there say theirs; pass"
            " a pattern of those that are meant, e.g. 'DIR/train-*.parquet'"
        )
    if chosen := [name for name in packed if split in splits[name]]:
        return chosen + [name for name in files.names if name not in splits]
    found = ", ".join(sorted(set().union(*splits.values())))
    raise DataError(f"{files.root}: the files there are of {found}, none of {split} (--split)")


def _splits_in(name: str) -> set[str]:
    words = set(re.split(r"[\W_]+", name.lower()))
    return {split for split, like in _SPLIT_WORDS.items() if words & like}


def _matching(pattern: Path) -> Iterator[Path]:
    """Yield the files of a pattern.

    Raises: DataError naming one that is listed in braces and is not there.
    """
    for name in _expanded(str(pattern)):
        found = glob(name) if has_magic(name) else [name]  # noqa: PTH207 (takes whole paths)
        missing = [each for each in found or [name] if not Path(each).is_file()]
        if missing:
            raise DataError(f"{shown(missing[0])}: no such file")
        yield from map(Path, found)


def _expanded(pattern: str) -> Iterator[str]:
    """Yield a pattern with each choice of its braces: `{a,b}`, and `{08..11}`, padded by zeros."""
    if (braces := _BRACES.search(pattern)) is None:
        yield pattern
        return
    choices = braces[1].split(",")
    if bounds := _RANGE.fullmatch(braces[1]):
        first, last = int(bounds[1]), int(bounds[2])
        choices = [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]
    for choice in choices:
        yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])
