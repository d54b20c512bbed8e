"""Latents in columns of parquet files: `latents` or `moments`, floats in lists (C, H, W), or `mean`
and `std` of the posteriors; and labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.data.listing import Files
from promoe_ds.data.reading import shown
from promoe_ds.data.sources.cached import CachedRecord, sides_of
from promoe_ds.data.sources.parquet import Rows, Tables
from promoe_ds.data.sources.samples import Columns, PackedSamples
from promoe_ds.errors import DataError

_POSTERIOR = ["mean", "std"]
#: Least standard deviation: the bound that readers of moments put on its logarithm.
_LEAST_STD = float(np.exp(-15.0))


class ParquetLatents(PackedSamples[CachedRecord]):
    """Latents in parquet files as one set of samples."""

    def __init__(self, files: Files, columns: Columns) -> None:
        """Read the footers and the labels.

        Raises: DataError if there are no such columns.
        """
        tables = Tables(files)
        self._sides = _POSTERIOR
        if not set(_POSTERIOR) <= set(tables.names):
            self.kind, self._sides = sides_of(tables.paths[0], tables.names)
        for side in self._sides:
            tables.type_of(side)
        super().__init__(files, tables.counts)
        self.labels, self.classes = tables.labels(columns.label)
        self._rows = Rows(tables, self._sides)

    def take(self, index: int) -> CachedRecord:
        """Return the values of a row.

        Raises: DataError for a row without, or lists of several lengths.
        """
        batch, row = self._rows.take(index)
        path = self.root / self.name(index)
        sides = [_nested(path, side, batch.column(side)[row]) for side in self._sides]
        if self._sides is _POSTERIOR and sides[0].shape == sides[1].shape:
            mean, std = sides
            sides = [np.concatenate([mean, 2 * np.log(np.maximum(std, _LEAST_STD))])]
        return CachedRecord(path, self.kind, sides)


def _nested(path: Path, name: str, value: Any) -> np.ndarray:
    """Return lists of lists as an array."""
    from pyarrow import types

    if not value.is_valid:
        raise DataError(f"{shown(path)}: {name} is null")
    if not hasattr(value, "values"):
        raise DataError(f"{shown(path)}: {name} is {value.type}, no list of numbers")
    values = value.values
    shape = [len(values)]
    while not types.is_primitive(values.type):
        lengths = values.value_lengths().unique().to_pylist() if len(values) else []
        if len(lengths) != 1 or lengths[0] is None:
            raise DataError(f"{shown(path)}: {name} is no array: lists of lengths {lengths}")
        shape.append(lengths[0])
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)
