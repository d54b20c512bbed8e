"""Latents in files of torch: a dict of `latents` or `moments` (n, C, H, W), perhaps their mirrored
twins, and `labels` (n,); mapped, not read whole.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.listing import Files
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.sources.cached import CachedRecord, sides_of
from promoe_ds.data.sources.labels import Labels
from promoe_ds.data.sources.samples import Columns, PackedSamples, place_of
from promoe_ds.errors import DataError
from promoe_ds.file_kind import TORCH


class TorchLatents(PackedSamples[CachedRecord]):
    """Tensors of latents as one set of samples."""

    def __init__(self, files: Files, columns: Columns) -> None:
        """Map the files and read the labels.

        Raises: DataError naming a file that holds no such tensors, or other ones than the first.
        """
        paths = files.paths()
        self._tensors = [_tensors(path) for path in paths]
        self.kind, self._sides = sides_of(paths[0], self._tensors[0])
        labels = Labels(files.root, columns.label, "tensor of labels")
        name = labels.column(self._tensors[0])
        wanted = [*self._sides, name] if name else self._sides
        for path, tensors in zip(paths, self._tensors, strict=True):
            if missing := [each for each in wanted if each not in tensors]:
                raise DataError(f"{shown(path)}: no {missing[0]}, but {', '.join(tensors)}")
            lengths = {len(tensors[each]) for each in wanted}
            if len(lengths) > 1:
                raise DataError(f"{shown(path)}: tensors of {sorted(lengths)} records in one file")
            if name:
                labels.add(_integers(path, name, tensors[name]))
        counts = [len(tensors[self._sides[0]]) for tensors in self._tensors]
        super().__init__(files, counts)
        self.labels, self.classes = labels.finish(sum(counts))

    def take(self, index: int) -> CachedRecord:
        """Return the values of a record."""
        file, row = place_of(self.ends, index)
        sides = [self._tensors[file][side][row] for side in self._sides]
        # numpy knows no bfloat16; integers stay, to be refused.
        floats = [side.float() if side.is_floating_point() else side for side in sides]
        return CachedRecord(
            self.root / self.name(index), self.kind, [each.numpy() for each in floats]
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    with reading(path, "dict of tensors", kind=TORCH):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {
            str(name): each
            for name, each in loaded.items()
            if isinstance(each, Tensor) and each.ndim > 0
        }


def _integers(path: Path, name: str, labels: Tensor) -> list[int]:
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"{shown(path)}: {name} are {labels.dtype} {tuple(labels.shape)}, wanted (n,) integers"
        )
    return np.asarray(labels).tolist()
