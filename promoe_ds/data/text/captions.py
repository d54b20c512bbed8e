"""Captions as people keep them: a text file beside each image, or a column of a table.

A text file has a caption a line. A table is `metadata.jsonl` or `metadata.csv` in the folder of the
images, with a column `file_name`; a cell, or, in JSON, each string of a list, is a caption, and
several rows of one image are captions of it.
"""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from promoe_ds.data.listing import Files
from promoe_ds.data.reading import read_text, reading, shown
from promoe_ds.errors import DataError

#: What --captions says where a text file is beside each image.
BESIDE = ".txt"
_TABLES = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"


class Captions(ABC):
    """The captions of a folder of images."""

    @abstractmethod
    def of(self, name: str) -> list[str]:
        """Return an image's captions, at least one, none of them blank.

        Args:
            name: its path in the folder, as shards of latents write it.
        Raises: DataError naming the file that is missing, empty or no UTF-8.
        """


def open_captions(files: Files, source: str) -> Captions:
    """Return the captions of files of one image.

    Args:
        source: `.txt`, or the column of the table.
    Raises: DataError for a table that is missing, cannot be read, or lacks the column.
    """
    return _TextFiles(files.root) if source == BESIDE else _Table(files.root, source)


def texts_of(cell: str | list[str | None] | None) -> list[str]:
    """Return the captions of a cell, a text or several, but for blank ones.

    Raises: ValueError if it is no text.
    """
    texts = cell if isinstance(cell, list) else [cell]
    if any(not isinstance(text, str | None) for text in texts):
        raise ValueError(f"no text: {cell!r}")
    return [text.strip() for text in texts if text and text.strip()]


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, as Python reads them from a file. `str.splitlines` ends a line at
    more characters, as U+2028, which captions hold.
    """
    return io.StringIO(text, newline=None).readlines()


class _TextFiles(Captions):
    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, name: str) -> list[str]:
        path = (self._root / name).with_suffix(BESIDE)
        if not path.is_file():
            raise DataError(f"{shown(path)}: no such file: the image {shown(name)} has no caption")
        captions = texts_of(lines_of(read_text(path)))
        if not captions:
            raise DataError(f"{shown(path)}: is empty: the image {shown(name)} has no caption")
        return captions


class _Table(Captions):
    def __init__(self, root: Path, column: str) -> None:
        self._column, self._captions = column, dict[str, list[str]]()
        path = next((root / name for name in _TABLES if (root / name).is_file()), None)
        if path is None:
            raise DataError(
                f"{root}: no {' or '.join(_TABLES)} there, which would hold the column {column};"
                f" --captions {BESIDE} reads a text file beside each image"
            )
        self._path = path
        rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
        for number, row in rows:
            for wanted in (_FILE, column):
                if wanted not in row:
                    raise DataError(
                        f"{path}: row {number} has no column {wanted!r}, but {_listed(row)}"
                    )
            cell = row[column]
            with reading(path, f"table: row {number}: {column}"):
                self._captions.setdefault(shown(row[_FILE]), []).extend(texts_of(cell))

    def of(self, name: str) -> list[str]:
        if captions := self._captions.get(shown(name)):
            return captions
        lack = "its captions are blank" if shown(name) in self._captions else "no row names it"
        raise DataError(
            f"{self._path}: the image {shown(name)} has no caption in {self._column}: {lack}"
        )


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip():
            with reading(path, f"table: line {number} is not JSON"):
                row = decoder.decode(line)
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with reading(path, "table of comma-separated values"):
        rows = csv.DictReader(lines_of(read_text(path)))
        yield from ((rows.line_num, row) for row in rows)


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"
