"""Files below a folder: the one way in which every command lists images or cached latents.

Each real file is listed once. Hidden files and leftovers of other programs are skipped, files of
other kinds left out, links followed; rank 0 says how many of each. docs/reference/inputs.md states
the rules.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from promoe_ds.data.reading import shown, some_of, warn_once
from promoe_ds.errors import DataError

#: What systems and programs leave in folders, in lower case; hidden names are skipped as well.
_LEFTOVERS = set(
    """__macosx thumbs.db ehthumbs.db desktop.ini @eadir @tmp @recycle @recently-snapshot #recycle
    #snapshot $recycle.bin lost+found __pycache__""".split()
) | {"icon\r", "system volume information", "network trash folder", "temporary items"}
#: Formats that Pillow names but does not decode by itself: EPS runs Ghostscript, the others need a
#: library or a system.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
#: What is said of the files and folders that were met, with their number.
_NOTES = _OTHERS, _LEFT, _LISTED, _BROKEN, _OUTSIDE = (
    "left out {} files of other kinds",
    "skipped {} hidden files and leftovers of other programs",
    "left out {} links to what is listed already",
    "left out {} links to nothing",
    "followed {} links to files and folders elsewhere",
)
#: Of these, kinds are named instead of single files.
_COUNTED = (_OTHERS, _LEFT)


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes here, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the extensions of these formats, in lower case; .mpo is a JPEG of several pictures."""
    formats = {*image_formats(), "MPO"}
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or left there by a system or program."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


@dataclass
class Files:
    """Files of a folder, by `names`, relative and sorted."""

    root: Path
    names: list[str]

    def paths(self) -> list[Path]:
        """Return where they are."""
        return [self.root / name for name in self.names]

    def file_of(self, record: str) -> tuple[int, str]:
        """Return the number of the file that a record is in, whose name begins with the file's, and
        the rest of its name.

        Raises: DataError if there is none.
        """
        for place in (at for at, sign in enumerate(record) if sign == "/"):
            if (number := bisect_left(self.names, record[:place])) < len(self.names):
                if self.names[number] == record[:place]:
                    return number, record[place + 1 :]
        raise DataError(f"{shown(self.root)}: holds no file of the record {shown(record)}")


class FileList(Files):
    """The files of some kinds below a folder: `names`, relative and sorted.

    `folders` are those of the first level. Links are followed after all real folders, so that a
    file that has a place of its own in the tree is listed there. A link to a folder or file that is
    listed already, or to a folder above the tree, is named and left out.
    """

    def __init__(
        self, root: Path, suffixes: Collection[str] | None = None, *, kind: str | None = None
    ) -> None:
        """List the tree; rank 0 says what was left out.

        Args:
            suffixes: extensions in lower case; those of images if left out.
            kind: what messages call such a file.
        Raises: DataError for a folder that cannot be read or holds no such file, or a link of the
            first level to nothing.
        """
        super().__init__(root, [])
        self.folders: list[str] = []
        by_suffix = "readable image" if suffixes is None else f"{', '.join(suffixes)} file"
        self.kind = kind or by_suffix
        self._suffixes = image_suffixes() if suffixes is None else suffixes
        self._notes = {note: Counter[str]() for note in _NOTES}
        self._seen: set[tuple[int, int]] = set()
        self._links = deque[str]()
        self._file_links: list[tuple[str, os.stat_result]] = []
        self._enter("")
        while self._links:
            self._follow(self._links.popleft())
        self._add_file_links()
        self.names.sort()
        parts = [
            f"{note.format(found.total())} ({some_of(found, counted=note in _COUNTED)})"
            for note, found in self._notes.items()
            if found
        ]
        if parts:
            warn_once("%s: %s", shown(root), "; ".join(parts))
        if not self.names:
            others = self._notes[_OTHERS]
            found = f": found {some_of(others, counted=True)}" if others else ""
            raise DataError(f"{root}: no {self.kind} below it{found}")

    def _enter(self, start: str) -> None:
        """List a folder and all below it, without following links."""
        stack = [start]
        while stack:
            folder = stack.pop()
            try:
                status = (self.root / folder).stat()
                with os.scandir(self.root / folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                raise DataError(
                    f"{shown(self.root / folder)}: cannot be listed ({error.strerror}): make it "
                    "readable, or move it out of the tree"
                ) from None
            if _inode(status) in self._seen:
                self._notes[_LISTED][folder] += 1
                continue
            self._seen.add(_inode(status))
            for entry in entries:
                name = f"{folder}{os.sep}{entry.name}" if folder else entry.name
                if is_leftover(entry.name):
                    self._notes[_LEFT]["._*" if entry.name.startswith("._") else entry.name] += 1
                elif entry.is_symlink():
                    self._links.append(name)
                elif entry.is_dir():
                    stack.append(name)
                    self.folders += [] if folder else [name]
                else:
                    self._add(name, entry.is_file())

    def _add(self, name: str, is_file: bool) -> bool:
        """Add a file if it is of the kinds; return whether it is."""
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (Path costs minutes for millions)
        if wanted := is_file and suffix in self._suffixes:
            self.names.append(name)
        else:
            other = (suffix or "without extension") if is_file else "pipes and devices"
            self._notes[_OTHERS][other] += 1
        return wanted

    def _follow(self, link: str) -> None:
        path = self.root / link
        try:
            status = path.stat()
        except (OSError, RuntimeError):  # to nothing, or to itself
            if path.suffix.lower() in self._suffixes:
                self.names.append(link)  # an unreadable image, to be named and counted as such
            elif os.sep not in link and not path.suffix:
                raise DataError(
                    f"{shown(path)}: is a link to nothing: restore its target, or remove it"
                ) from None
            else:
                self._notes[_BROKEN][link] += 1
            return
        target, root = path.resolve(), self.root.resolve()
        if not stat.S_ISDIR(status.st_mode):
            self._file_links.append((link, status))
        elif _inode(status) in self._seen or root.is_relative_to(target):
            self._notes[_LISTED][link] += 1
        else:
            if not target.is_relative_to(root):
                self._notes[_OUTSIDE][link] += 1
            self.folders += [] if os.sep in link else [link]
            self._enter(link)

    def _add_file_links(self) -> None:
        """Add links to files that are not in the tree by themselves, each of them once."""
        known = set()
        for name in self.names if self._file_links else ():
            with suppress(OSError):  # a link to nothing
                known.add(_inode(os.stat(self.root / name)))  # noqa: PTH116
        for name, status in sorted(self._file_links):
            if _inode(status) in known:
                self._notes[_LISTED][name] += 1
            elif self._add(name, stat.S_ISREG(status.st_mode)):
                known.add(_inode(status))
                self._notes[_OUTSIDE][name] += 1


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
