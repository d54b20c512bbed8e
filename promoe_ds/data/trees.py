"""Trees of class folders: which folders are classes, in which order, and how their files are read.

A class's label is its place among the sorted folders of the first level; docs/inputs.md states the
rules.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.data.listing import FileList, is_leftover, some_of
from promoe_ds.data.reading import reading, shown
from promoe_ds.errors import DataError
from promoe_ds.logs import get_logger, rank_from_environment

_LOG = get_logger("data")

#: What `--split` finds by itself.
_SPLITS = {"train", "val", "test"}
#: Names of splits without digits and separators: the first group wherever it occurs, the others
#: where all folders match.
_SPLIT_LIKE = re.compile(
    "(?:images|data)?(?:(train|training|trn|val|validation)|valid|test|testing|dev|eval|evaluation)"
    "(?:set|data|images|split|folder)?"
)


@dataclass(frozen=True)
class Tree:
    """Files below `root`, sorted by name, and the label of each: its place among `classes`."""

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


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
    root = _root_of_split(path, split)
    files = FileList(root, suffixes)
    if homeless := [name for name in files.names if os.sep not in name]:
        raise DataError(
            f"{root}: {shown(homeless[0])} is beside the class folders: move it into the folder of "
            "its class"
        )
    classes = sorted(files.folders)
    if split_like := _split_like(classes):
        raise DataError(
            f"{root}: {some_of(split_like)} look like splits, not classes: pass "
            f"{root / split_like[0]}"
        )
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
    _warn_of_order(root, classes)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)
    return Tree(root, files.names, labels, tuple(classes))


def refuse_splits(path: Path) -> None:
    """Refuse a folder of splits: a figure over all of them would mean nothing.

    Raises: DataError naming them.
    """
    if like := _split_like(_folders_of(path)):
        raise DataError(
            f"{path}: {some_of(like)} look like splits of a data set: pass one of them, e.g. "
            f"{shown(path / like[0])}"
        )


def _root_of_split(path: Path, split: str) -> Path:
    folders = _folders_of(path)
    if not (like := _split_like(folders)):
        return path
    if set(folders) <= _SPLITS:
        if split not in folders:
            raise DataError(f"{path}: holds {', '.join(folders)} but no {split}")
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


def _warn_of_order(root: Path, classes: list[str]) -> None:
    """Say, by rank 0, what a person would not expect of the labels' order."""
    if rank_from_environment() != 0:
        return
    by_value = sorted(classes, key=_with_numbers)
    if by_value != classes:
        first = [name == other for name, other in zip(classes, by_value, strict=True)].index(False)
        _LOG.warning(
            "%s: class folders are sorted as text, not as numbers: label %d is folder %s, not %s. "
            "Pad the names with zeros for the order of numbers",
            *(shown(root), first, shown(classes[first]), shown(by_value[first])),
        )
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        _LOG.warning(
            "%s: class folders that differ in capitals alone are classes of their own: %s",
            *(shown(root), some_of(alike)),
        )


def _with_numbers(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def check_classes(where: Path, count: int, num_classes: int) -> None:
    """Hold a data set's classes against the recipe's.

    Raises: DataError for more of them; rank 0 warns of fewer.
    """
    if count > num_classes:
        raise DataError(f"{shown(where)}: {count} classes, but model.num_classes={num_classes}")
    if count < num_classes and rank_from_environment() == 0:
        _LOG.warning(
            "%s: %d classes of model.num_classes=%d: the labels from %d on never occur",
            *(where, count, num_classes, count),
        )


class CorruptFiles:
    """Counts unreadable files, by name, up to a limit."""

    def __init__(self, limit: int, setting: str) -> None:
        """Allow `limit` of them, as `setting` says."""
        self._limit, self._setting = limit, setting
        self.problems: dict[str, str] = {}

    def add(self, name: str, problem: str) -> None:
        """Name and count one; again the same costs nothing.

        Raises: DataError, naming the latest, when the limit is passed.
        """
        if name in self.problems:
            return
        self.problems[name] = problem
        if len(self.problems) > self._limit:
            raise DataError(
                f"{problem}; that makes {len(self.problems)} unreadable files, "
                f"{self._setting}={self._limit} are allowed: repair or remove them, or raise it"
            )
        _LOG.warning(
            "skipped %s (%d of %s=%d)", problem, len(self.problems), self._setting, self._limit
        )


class TreeReader:
    """Reads files of a tree in several threads: decoders release Python's lock."""

    def __init__(self, tree: Tree, read: Callable[[Path], np.ndarray], workers: int) -> None:
        """Read with `read`, which raises DataError for a file that it cannot."""
        self._tree, self._read = tree, read
        self._pool = ThreadPoolExecutor(workers)

    def try_all(self, indices: Sequence[int]) -> list[np.ndarray | DataError]:
        """Return what each file holds, or what is wrong with it."""
        return list(self._pool.map(self._try, indices))

    def _try(self, index: int) -> np.ndarray | DataError:
        try:
            return self._read(self._tree.root / self._tree.names[index])
        except DataError as error:
            return error
