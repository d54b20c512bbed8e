"""Trees of files: the one way in which every command lists folders of images or of cached latents.

Each real file is listed once. Hidden files and leftovers of other programs are skipped, files of other kinds left out,
links followed; rank 0 says how many of each. docs/inputs.md states the rules.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from promoe_ds.data.reading import shown
from promoe_ds.errors import DataError
from promoe_ds.logs import get_logger, rank_from_environment

_LOG = get_logger("data")

#: What systems and programs leave in folders, in lower case; hidden names (with a leading dot) are skipped as well.
_LEFTOVERS = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@tmp", "@recycle", "@recently-snapshot",
              "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
              "network trash folder", "temporary items"}
#: Formats that Pillow names but does not decode by itself: EPS runs Ghostscript, the others need a library or a system.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
#: What `--split` finds by itself.
_SPLITS = {"train", "val", "test"}
#: Names of splits without digits and separators: the first group wherever it occurs, the second where all folders match.
_SPLIT_LIKE = re.compile("(?:images|data)?(?:(train|training|trn|val|validation)|valid|test|testing|dev|eval|evaluation)"
                         "(?:set|data|images|split|folder)?")
_NAMED = 3


@dataclass(frozen=True)
class Tree:
    """Files below `root`, sorted by name, and the class of each; a class's label is its place among the sorted folders."""

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes here, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the extensions of these formats, in lower case; .mpo is a JPEG of several pictures."""
    formats = {*image_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def scan_tree(path: Path, suffixes: Collection[str] | None = None, *, split: str = "train") -> Tree:
    """List a tree of class folders.

    Args:
        path: the tree, or the folder that holds it as one of train, val and test.
        suffixes: extensions of the files, in lower case; those of images if left out.
        split: which of them, then.
    Returns: the tree; its classes are the folders of the first level.
    Raises: DataError if there is no such tree, its folders look like splits or wrap another one, a file of that kind is beside
        the class folders, or a class has none: left out, it would give all classes after it another label.
    """
    root = _root_of_split(path, split)
    files = FileList(root, suffixes)
    if homeless := [name for name in files.names if os.sep not in name]:
        raise DataError(f"{root}: {shown(homeless[0])} is beside the class folders: move it into the folder of its class")
    classes = sorted(files.folders)
    if split_like := _split_like(classes):
        raise DataError(f"{root}: {_some(split_like)} look like splits, not classes: pass {root / split_like[0]}")
    if len(classes) == 1 and all(name.count(os.sep) > 1 for name in files.names):
        raise DataError(f"{root}: holds the single folder {shown(classes[0])}, without images of its own, which looks like a "
                        f"wrapper: pass {shown(root / classes[0])}, or, if it is the only class, move its images directly into it")
    folders = [name.partition(os.sep)[0] for name in files.names]
    if empty := sorted(set(classes) - set(folders)):
        raise DataError(f"{root}: {len(empty)} of {len(classes)} class folders hold no {files.kind}: {_some(empty)}. A class's "
                        "label is its place among the sorted folders: fill them, or remove what is no class")
    _warn_of_order(root, classes)
    label_of = {name: label for label, name in enumerate(classes)}
    return Tree(root, files.names, np.array([label_of[folder] for folder in folders], dtype=np.int64), tuple(classes))


def refuse_splits(path: Path) -> None:
    """Raise DataError for a folder whose folders look like splits: a figure over all of them would mean nothing."""
    if like := _split_like(_folders_of(path)):
        raise DataError(f"{path}: {_some(like)} look like splits of a data set: pass one of them, e.g. {shown(path / like[0])}")


class FileList:
    """The files of some kinds below a folder: `names`, relative and sorted, and `folders`, those of the first level.

    Links are followed after all real folders, so that a file that has a place of its own in the tree is listed there. A link
    to a folder or file that is listed already, or to a folder above the tree, is named and left out.
    """

    def __init__(self, root: Path, suffixes: Collection[str] | None = None) -> None:
        """List the tree; rank 0 says what was left out.

        Raises: DataError for a folder that cannot be read or holds no such file, or a link of the first level to nothing.
        """
        self.root, self.names, self.folders = root, [], []
        self.kind = "readable image" if suffixes is None else f"{', '.join(suffixes)} file"
        self._suffixes = image_suffixes() if suffixes is None else suffixes
        self._leftovers, self._others = Counter(), Counter()
        self._listed, self._outside, self._broken = [], [], []
        self._seen: set[tuple[int, int]] = set()
        self._links, self._file_links = deque(), []
        self._enter("")
        while self._links:
            self._follow(self._links.popleft())
        self._add_file_links()
        self.names.sort()
        self._report()
        if not self.names:
            others = f": found {_counted(self._others)}" if self._others else ""
            raise DataError(f"{root}: no {self.kind} below it{others}")

    def _enter(self, start: str) -> None:
        """List a folder and all below it, without following links."""
        stack = [start]
        while stack:
            folder = stack.pop()
            try:
                status = os.stat(self.root / folder)  # noqa: PTH116 (Path costs minutes for millions of files)
                with os.scandir(self.root / folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                raise DataError(f"{shown(self.root / folder)}: cannot be listed ({error.strerror}): make it readable, or move it "
                                "out of the tree") from None
            if (status.st_dev, status.st_ino) in self._seen:
                self._listed.append(folder)
                continue
            self._seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                name = f"{folder}{os.sep}{entry.name}" if folder else entry.name
                if entry.name.startswith(".") or entry.name.lower() in _LEFTOVERS:
                    self._leftovers["._*" if entry.name.startswith("._") else entry.name] += 1
                elif entry.is_symlink():
                    self._links.append(name)
                elif entry.is_dir():
                    stack.append(name)
                    self.folders += [] if folder else [name]
                else:
                    self._add(name, entry.is_file())

    def _add(self, name: str, is_file: bool) -> None:
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if is_file and suffix in self._suffixes:
            self.names.append(name)
        else:
            self._others[(suffix or "without extension") if is_file else "pipes and devices"] += 1

    def _follow(self, link: str) -> None:
        path = self.root / link
        try:
            status = path.stat()
        except (OSError, RuntimeError):  # to nothing, or to itself
            if path.suffix.lower() in self._suffixes:
                self.names.append(link)  # an image that cannot be read, to be named and counted as such
                return
            if os.sep not in link and not path.suffix:
                raise DataError(f"{shown(path)}: is a link to nothing: restore its target, or remove it") from None
            self._broken.append(link)
            return
        if not stat.S_ISDIR(status.st_mode):
            self._file_links.append((link, (status.st_dev, status.st_ino), stat.S_ISREG(status.st_mode)))
            return
        target, root = path.resolve(), self.root.resolve()
        if (status.st_dev, status.st_ino) in self._seen or root.is_relative_to(target):
            self._listed.append(link)
            return
        self._outside += [] if target.is_relative_to(root) else [link]
        self.folders += [] if os.sep in link else [link]
        self._enter(link)

    def _add_file_links(self) -> None:
        """Add links to files that are not in the tree by themselves, each of them once."""
        known = set()
        for name in self.names if self._file_links else ():
            try:
                status = os.stat(self.root / name)  # noqa: PTH116
                known.add((status.st_dev, status.st_ino))
            except OSError:  # a link to nothing
                continue
        for name, key, is_file in sorted(self._file_links):
            if key in known:
                self._listed.append(name)
                continue
            before = len(self.names)
            self._add(name, is_file)
            if len(self.names) > before:
                known.add(key)
                self._outside.append(name)

    def _report(self) -> None:
        parts = [
            f"left out {self._others.total()} files of other kinds ({_counted(self._others)})" if self._others else "",
            f"skipped {self._leftovers.total()} hidden files and leftovers of other programs ({_counted(self._leftovers)})"
            if self._leftovers else "",
            f"left out {len(self._listed)} links to what is listed already ({_some(self._listed)})" if self._listed else "",
            f"left out {len(self._broken)} links to nothing ({_some(self._broken)})" if self._broken else "",
            f"followed {len(self._outside)} links to files and folders elsewhere ({_some(self._outside)})" if self._outside else ""]
        if any(parts) and rank_from_environment() == 0:
            _LOG.warning("%s: %s", shown(self.root), "; ".join(part for part in parts if part))


def _root_of_split(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    folders = _folders_of(path)
    if not (like := _split_like(folders)):
        return path
    if set(folders) <= _SPLITS:
        if split not in folders:
            raise DataError(f"{path}: holds {', '.join(folders)} but no {split}")
        return path / split
    others = [name for name in folders if name not in like]
    beside = f" beside {_some(others)}: splits or classes?" if others else ", which look like splits, not classes."
    raise DataError(f"{path}: holds {_some(like)}{beside} Pass {shown(path / like[0])} itself, or rename {shown(like[0])} if it is "
                    "a class")


def _folders_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()
                  if entry.is_dir() and not entry.name.startswith(".") and entry.name.lower() not in _LEFTOVERS)


def _split_like(folders: list[str]) -> list[str]:
    """Return which of the folders are no classes by their names."""
    matches = {name: match for name in folders if (match := _SPLIT_LIKE.fullmatch(re.sub(r"[\W\d_]+", "", name.lower())))}
    return list(matches) if len(matches) == len(folders) or any(match[1] for match in matches.values()) else []


def _warn_of_order(root: Path, classes: list[str]) -> None:
    """Say, by rank 0, what a person would not expect of the labels' order."""
    if rank_from_environment() != 0:
        return
    by_value = sorted(classes, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    if by_value != classes:
        first = next(label for label, (name, other) in enumerate(zip(classes, by_value, strict=True)) if name != other)
        _LOG.warning("%s: class folders are sorted as text, not as numbers: label %d is folder %s, not %s. Pad the names with "
                     "zeros for the order of numbers", shown(root), first, shown(classes[first]), shown(by_value[first]))
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        _LOG.warning("%s: class folders differ in upper and lower case alone and are classes of their own: %s", shown(root),
                     _some(alike))


def _some(names: Collection[str]) -> str:
    return ", ".join(map(shown, list(names)[:_NAMED])) + (" ..." if len(names) > _NAMED else "")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {shown(name)}" for name, count in counts.most_common(_NAMED)) + (
        " ..." if len(counts) > _NAMED else "")
