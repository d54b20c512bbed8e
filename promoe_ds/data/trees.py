"""Trees of class folders: which folders are classes, and in which order.

A class's label is its place among the sorted folders of the first level;
docs/reference/inputs.md states the rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from promoe_ds.data.listing import FileList, is_leftover
from promoe_ds.data.reading import reading, shown, some_of
from promoe_ds.data.sources.labels import Labels
from promoe_ds.data.sources.samples import Samples
from promoe_ds.errors import DataError

#: What `--split` finds by itself.
_SPLITS = {"train", "val", "test"}
#: Names of splits without digits and separators: the first group wherever it occurs, the others
#: where all folders match.
_SPLIT_LIKE = re.compile(
    "(?:images|data)?(?:(train|training|trn|val|validation)|valid|test|testing|dev|eval|evaluation)"
    "(?:set|data|images|split|folder)?"
)


@dataclass(frozen=True)
class Tree(Samples[Path]):
    """Files below `root`, sorted by name, and the label of each: its place among `classes`."""

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]

    def name(self, index: int) -> str:
        """Return a file's path below the root."""
        return self.names[index]

    def take(self, index: int) -> Path:
        """Return a file's path."""
        return self.root / self.names[index]

    def listing(self) -> str:
        """Return the checksum of the names, which say the labels."""
        return xxhash.xxh3_64(os.fsencode("\n".join(self.names))).hexdigest()


def scan_tree(path: Path, suffixes: Collection[str] | None = None, *, split: str = "train") -> Tree:
    """List a tree of class folders.

    Args:
        path: the tree, or the folder that holds it as one of train, val and test.
        suffixes: extensions of the files, in lower case; those of images if left out.
        split: which of them, then.
    Returns: the tree; its classes are the folders of the first level.
    Raises: DataError if there is no such tree, its folders look like splits or wrap another one, a
        file of that kind is beside the class folders, or a class has none: left out, it would give
        all classes after it another label.
    """
    return tree_of(FileList(root_of_split(path, split), suffixes))


def tree_of(files: FileList) -> Tree:
    """Return the tree of files that are listed.

    Raises: DataError as `scan_tree` has it.
    """
    root = files.root
    if homeless := [name for name in files.names if os.sep not in name]:
        raise DataError(
            f"{root}: {shown(homeless[0])} is beside the class folders: move it into the folder of "
            "its class"
        )
    classes = sorted(files.folders)
    if len(classes) == 1 and all(name.count(os.sep) > 1 for name in files.names):
        raise DataError(
            f"{root}: holds the single folder {shown(classes[0])}, without images of its own, "
            f"which looks like a wrapper: pass {shown(root / classes[0])}, or, if it is the only "
            "class, move its images directly into it"
        )
    folders = [name.partition(os.sep)[0] for name in files.names]
    if empty := sorted(set(classes) - set(folders)):
        raise DataError(
            f"{root}: {len(empty)} of {len(classes)} class folders hold no {files.kind}: "
            f"{some_of(empty)}. A class's label is its place among the sorted folders: fill them, "
            "or remove what is no class"
        )
    labels = Labels(root, None, "class folder")
    labels.add(folders)
    return Tree(root, files.names, *labels.finish(len(folders)))


def refuse_splits(path: Path) -> None:
    """Refuse a folder of splits, which are no classes, and over which no figure means anything.

    Raises: DataError naming them.
    """
    if like := _split_like(_folders_of(path)):
        raise DataError(
            f"{path}: {some_of(like)} look like splits of a data set: pass one of them, e.g. "
            f"{shown(path / like[0])}"
        )


def root_of_split(path: Path, split: str) -> Path:
    """Return the tree in a folder, which may hold it as one of train, val and test.

    Raises: DataError if there is no such folder, it is not clear which of its folders is meant, or
        the one that is meant holds splits.
    """
    folders = _folders_of(path)
    if not (like := _split_like(folders)):
        return path
    if set(folders) <= _SPLITS:
        if split not in folders:
            raise DataError(f"{path}: holds {', '.join(folders)} but no {split}")
        refuse_splits(path / split)
        return path / split
    others = [name for name in folders if name not in like]
    beside = f"beside {some_of(others)}" if others else "alone"
    raise DataError(
        f"{path}: holds {some_of(like)} {beside}: splits or classes? Pass {shown(path / like[0])} "
        f"itself, or rename {shown(like[0])} if it is a class"
    )


def _folders_of(path: Path) -> list[str]:
    with reading(path, "folder"):
        if not path.is_dir():
            raise DataError(f"{shown(path)}: no such folder")
        entries = [entry.name for entry in path.iterdir() if entry.is_dir()]
    return sorted(name for name in entries if not is_leftover(name))


def _split_like(folders: list[str]) -> list[str]:
    """Return which of the folders are no classes by their names."""
    matches = {
        name: match
        for name in folders
        if (match := _SPLIT_LIKE.fullmatch(re.sub(r"[\W\d_]+", "", name.lower())))
    }
    is_sure = len(matches) == len(folders) or any(match[1] for match in matches.values())
    return list(matches) if is_sure else []
