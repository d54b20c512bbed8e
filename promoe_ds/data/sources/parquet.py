"""Parquet as the hub has it: a column of images, one of labels, columns of texts.

Images are struct{bytes, path}, or plain bytes. Files are read row group by row group, a few rows at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from promoe_ds.data.images import Blob
from promoe_ds.data.listing import Files
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.sources.labels import Labels
from promoe_ds.data.sources.samples import Columns, PackedSamples, place_of
from promoe_ds.data.text.captions import Captions, texts_of
from promoe_ds.errors import ConfigError, DataError, cause_of
from promoe_ds.file_kind import PARQUET

#: Name of the images' column, where the user names none.
_IMAGE = "image"
#: Rows in memory at once, and bytes that are read from a file at once.
_ROWS, _BUFFER = 64, 2**20


class Tables:
    """The footers of parquet files: rows, row groups, columns."""

    def __init__(self, files: Files) -> None:
        """Read them.

        Raises: DataError naming a file that is no parquet.
        """
        self.files, self.paths = files, files.paths()
        self.counts = list[int]()
        self._schemas = list[Any]()
        #: Of row groups that are not empty: the number of the file, their own, and their rows.
        self.groups = list[tuple[int, int, int]]()
        for number, path in enumerate(self.paths):
            with _reading(path), _open(path) as file:
                rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                self._schemas.append(file.schema_arrow)
            self.counts.append(sum(rows))
            self.groups += [(number, group, count) for group, count in enumerate(rows) if count]
        self.names = list[str](self._schemas[0].names)

    def type_of(self, column: str) -> Any:
        """Return the type of a column, the same in all files.

        Raises: DataError naming a file where it is missing or of another type.
        """
        for path, schema in zip(self.paths, self._schemas, strict=True):
            if column not in schema.names:
                raise DataError(f"{shown(path)}: no column {column!r}, but {', '.join(self.names)}")
            first, found = (each.field(column).type for each in (self._schemas[0], schema))
            if found != first:
                raise DataError(
                    f"{shown(path)}: {column} is {found}, in {self.paths[0].name} {first}"
                )
        return first

    def labels(self, wanted: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return labels (N,) int64 and the classes' names.

        Args:
            wanted: the user's name of their column, None for the usual one, '' for none.
        Raises: DataError for a column that holds no labels, or not all.
        """
        found = Labels(self.files.root, wanted, "column of labels")
        if not (name := found.column(self.names)):
            return found.finish(sum(self.counts))
        from pyarrow import types

        kind = self.type_of(name)
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_integer(kind) or _is_text(kind)):
            raise DataError(
                f"{shown(self.paths[0])}: {name} is {kind}, no integer and no text: name another"
                " column with --label-column, or none with --label-column ''"
            )
        for path in self.paths:
            with _reading(path), _open(path) as file:
                values = file.read(columns=[name], use_threads=False).column(0).combine_chunks()
            if values.null_count:
                row = values.is_null().index(True).as_py()
                raise DataError(f"{shown(path)}: row {row} has no {name}")
            coded = values if types.is_dictionary(values.type) else values.dictionary_encode()
            found.add(coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False))
        return found.finish(sum(self.counts), self._class_names(name))

    def _class_names(self, column: str) -> list[str] | None:
        """Return the names of a ClassLabel, as `datasets` writes them beside the schema."""
        with suppress(KeyError, TypeError, msgspec.DecodeError):
            described = msgspec.json.decode(self._schemas[0].metadata[b"huggingface"])
            return list(map(str, described["info"]["features"][column]["names"]))
        return None


class Rows:
    """Rows of columns of parquet files: a batch of them is in memory, and what the file's pages
    hold beside it.
    """

    def __init__(self, tables: Tables, columns: Sequence[str]) -> None:
        """Read nothing yet."""
        self._paths, self._columns = tables.paths, list(columns)
        self._groups = np.array(tables.groups, dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._group = self._opened = -1
        self._file: Any = None
        self._first = 0
        self._batch: Any = ()
        self._batches: Iterator[Any] = iter(())
        self._problem: DataError | None = None

    def take(self, index: int) -> tuple[Any, int]:
        """Return a batch of rows, and the place of a row in it: fast in ascending order.

        Raises: DataError if the row group is damaged.
        """
        group, row = place_of(self._ends, index)
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, 0, ()
            self._batches, self._problem = self._read(group), None
        if self._problem is not None:
            raise self._problem
        try:
            while row >= self._first + len(self._batch):
                self._first += len(self._batch)
                with _reading(self._paths[self._groups[group, 0]]):
                    self._batch = next(self._batches)
        except DataError as error:
            self._problem = error  # the group is not tried again for each of its rows
            raise
        return self._batch, row - self._first

    def _read(self, group: int) -> Iterator[Any]:
        """Yield the batches of a row group."""
        file, number, _ = self._groups[group].tolist()
        if file != self._opened:
            self._file, self._opened = _open(self._paths[file]), file
        yield from self._file.iter_batches(
            batch_size=_ROWS, row_groups=[number], columns=self._columns, use_threads=False
        )


class ParquetImages(PackedSamples[Blob]):
    """Images in a column of parquet files."""

    def __init__(self, files: Files, columns: Columns) -> None:
        """Read the footers and the labels.

        Raises: DataError if there is no column of images, or no labels in that of labels.
        """
        tables = Tables(files)
        self._column = columns.image or _image_column(tables)
        kind = tables.type_of(self._column)
        if not _is_image(kind):
            raise DataError(
                f"{shown(tables.paths[0])}: {self._column} is {kind}, no image: expected bytes, or"
                " struct<bytes, path>"
            )
        super().__init__(files, tables.counts, self._column)
        self.labels, self.classes = tables.labels(columns.label)
        self._is_struct = kind.num_fields > 0
        column = f"{self._column}.bytes" if self._is_struct else self._column
        self._rows = Rows(tables, [column])

    def take(self, index: int) -> Blob:
        """Return the image of a row.

        Raises: DataError for a row without one, or a damaged row group.
        """
        batch, row = self._rows.take(index)
        where, column = self.root / self.name(index), batch.column(0)
        image = (column.flatten()[0] if self._is_struct else column)[row]
        if not image.is_valid:
            raise DataError(f"{shown(where)}: {self._column} is null: no image")
        return Blob(where, image.as_py)


class ParquetCaptions(Captions):
    """Captions in a column of the parquet files that images come from."""

    def __init__(self, files: Files, column: str) -> None:
        """Read the footers.

        Raises: DataError if there is no such column of texts.
        """
        tables = Tables(files)
        kind = tables.type_of(column)
        if not _is_text(getattr(kind, "value_type", kind)):  # of a list of any kind, or coded
            raise DataError(f"{shown(tables.paths[0])}: {column} is {kind}, no text")
        self._files, self._column = files, column
        self._ends, self._rows = np.cumsum(tables.counts), Rows(tables, [column])

    def of(self, name: str) -> list[str]:
        """Return the captions of a row."""
        file, row = self._files.file_of(name)
        first = int(self._ends[file - 1]) if file else 0
        if not (row.isdecimal() and first + int(row) < self._ends[file]):
            raise DataError(f"{shown(self._files.root / name)}: no such row")
        batch, place = self._rows.take(first + int(row))
        if captions := texts_of(batch.column(0)[place].as_py()):
            return captions
        raise DataError(f"{shown(self._files.root / name)}: {self._column} is blank: no caption")


def _image_column(tables: Tables) -> str:
    if _IMAGE in tables.names:
        return _IMAGE
    like = [name for name in tables.names if _is_image(tables.type_of(name))]
    if len(like) == 1:
        return like[0]
    raise DataError(
        f"{shown(tables.paths[0])}: no column {_IMAGE!r}, and {len(like)} that may hold images, of"
        f" {', '.join(tables.names)}: name it with --image-column"
    )


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _open(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"{shown(path)}: needs pyarrow ({cause_of(error)}): pip install 'promoe_ds[data]'"
        ) from None
    return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)


def _reading(path: Path) -> Any:
    return reading(path, "parquet file", kind=PARQUET)
