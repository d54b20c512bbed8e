"""Packed latents on disk, read memory-mapped.

A folder of packed shards holds `*.safetensors`, taken in the order of their names (see `shards`),
and `index.json` if this package wrote it (see `index`). Values are unscaled, of any float dtype.
Letters: B samples, C channels on disk, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import DrawnLatents, first_not_finite
from promoe_ds.data.index import INDEX, UNFINISHED, check_index, read_index, trust_vae
from promoe_ds.data.npz import NPZ_SUFFIX, NpzLatents
from promoe_ds.data.shards import Shard
from promoe_ds.data.trees import scan_tree
from promoe_ds.errors import DataError


def open_latents(config: RunConfig, device: torch.device) -> PackedLatents | NpzLatents:
    """Open a folder of packed shards, or a tree of npz files as other trainers cache them.

    Raises: DataError if there is neither, or it does not fit the recipe.
    """
    folder = Path(config.data.path)
    if shard_files(folder) or any((folder / name).is_file() for name in (INDEX, UNFINISHED)):
        return PackedLatents(config)
    try:
        tree = scan_tree(folder, (NPZ_SUFFIX,))
    except DataError as error:
        raise DataError(
            f"data.path={folder}: no *.safetensors shard there, and no tree of {NPZ_SUFFIX} files:"
            f" {error}. docs/inputs.md lists what is read, and converts .npy features"
        ) from None
    return NpzLatents(config, tree)


class PackedLatents(DrawnLatents):
    """A folder of shards as one indexable set."""

    def __init__(self, config: RunConfig) -> None:
        """Open every shard's header and check it, and the index, against the recipe.

        Raises: DataError naming the folder, the shard or the label that does not fit.
        """
        folder = Path(config.data.path)
        index = read_index(folder)
        if index is not None:
            check_index(index, folder, config)
            files = [folder / shard.file for shard in index.shards]
            for file, record in zip(files, index.shards, strict=True):
                _check_size(file, record.bytes)
        elif (folder / UNFINISHED).is_file():
            raise DataError(
                f"{folder}: these latents are not complete, there is {UNFINISHED} and no {INDEX}:"
                " run promoe-encode again with the same arguments, it goes on where it stopped"
            )
        else:
            trust_vae(folder, config)
            files = shard_files(folder)
        self._shards = [Shard(file) for file in files]
        if not any(map(len, self._shards)):
            raise DataError(f"data.path={folder}: the shards hold no sample")
        self._first = first = self._shards[0]
        self.kind = first.kind
        for position, shard in enumerate(self._shards):
            _check_shard(shard, config)
            if (shard.kind, shard.dtype, shard.flipped) != (first.kind, first.dtype, first.flipped):
                raise DataError(
                    f"{shard.path}: holds {_described(shard)}, {first.path.name}"
                    f" {_described(first)}"
                )
            if index is not None and len(shard) != index.shards[position].count:
                raise DataError(
                    f"{shard.path}: {len(shard)} records, {INDEX} says"
                    f" {index.shards[position].count}"
                )
        super().__init__(config, folder, has_twins=first.flipped)
        self._labels = torch.cat([shard.labels.long() for shard in self._shards])
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._ends = self._starts[1:]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return records and labels.

        Raises: DataError naming a record that is damaged or not finite.
        """
        records = self._records(indices, flips)
        # Records under checksums were finite when they were written.
        if not self._first.checked and (bad := first_not_finite(records)) is not None:
            shard = int(np.searchsorted(self._ends, indices[bad], side="right"))
            row = int(indices[bad] - self._starts[shard])
            path, name = self._shards[shard].path, self._shards[shard].name(row)
            raise DataError(f"{path}: record {row} ({name}) is not finite: encode this shard anew")
        return records, self._labels[torch.from_numpy(indices)]

    def _records(self, indices: np.ndarray, flips: np.ndarray) -> Tensor:
        """Return what is on disk, (B, C, H, W) fp32."""
        raw = torch.empty((len(indices), *self._first.shape[1:]), dtype=self._first.dtype)
        rows = raw.view(len(indices), -1).view(torch.uint8).numpy()
        places = np.searchsorted(self._ends, indices, side="right")
        local = indices - self._starts[places]
        for out, shard, row, flip in zip(
            rows, places.tolist(), local.tolist(), flips.tolist(), strict=True
        ):
            self._shards[shard].copy_record(row, flip, out)
        return raw.float()


def shard_files(folder: Path) -> list[Path]:
    """Return a folder's shards in the order of their names, but for hidden files, which other
    systems leave beside them.
    """
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing, {INDEX} lists it")
    if file.stat().st_size != size:
        raise DataError(
            f"{file}: {file.stat().st_size} bytes, {INDEX} says {size}: copy or encode this shard"
            " anew"
        )


def _check_shard(shard: Shard, config: RunConfig) -> None:
    size, labels = config.model.input_size, shard.labels
    shape = (config.model.in_channels * (2 if shard.kind == "moments" else 1), size, size)
    if shard.shape[1:] != shape or labels.shape != shard.shape[:1]:
        raise DataError(
            f"{shard.path}: {shard.kind} {shard.shape} and labels {tuple(labels.shape)} do not fit"
            f" the recipe's (n, {', '.join(map(str, shape))}) and (n,)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{shard.path}: labels are {labels.dtype}, expected integers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.model.num_classes:
        raise DataError(
            f"{shard.path}: labels reach from {int(labels.min())} to {int(labels.max())}, but "
            f"model.num_classes={config.model.num_classes}"
        )


def _described(shard: Shard) -> str:
    return (
        f"{shard.kind} as {str(shard.dtype).removeprefix('torch.')},"
        f" {'with' if shard.flipped else 'without'} mirrored twins"
    )
