"""Packed latents on disk, read memory-mapped.

A folder of packed shards holds `*.safetensors`, taken in the order of their names, and `index.json`
if this package wrote it (see `shards`). Values are of any float dtype, as the autoencoder made
them.
Letters: B samples, C channels on disk, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import DrawnLatents, first_not_finite
from promoe_ds.data.shards import INDEX, UNFINISHED, LatentIndex, Shard, read_index
from promoe_ds.data.text.packed import PackedTexts
from promoe_ds.data.text_encoder import TextIdentity
from promoe_ds.data.trees import scan_tree
from promoe_ds.data.unpacked import NPZ_SUFFIX, NpzLatents
from promoe_ds.data.vae import MOMENTS
from promoe_ds.errors import DataError


def open_latents(config: RunConfig, device: torch.device) -> PackedLatents | NpzLatents:
    """Open a folder of packed shards, or a tree of npz files as other trainers cache them.

    Raises: DataError if there is neither, or it does not fit the recipe.
    """
    folder = Path(config.data.path)
    own_files = *_shard_files(folder), folder / INDEX, folder / UNFINISHED
    is_packed = any(file.is_file() for file in own_files)
    if not is_packed and any(folder.glob(f"*/{INDEX}")):
        raise DataError(
            f"data.path={folder}: holds a folder of latents for each of several sizes: name one of"
            " them, or list all sizes in model.buckets"
        )
    if config.model.condition == "text" and not (folder / INDEX).is_file():
        raise DataError(
            f"data.path={folder}: model.condition=text needs packed latents with captions, but"
            f" there is no {INDEX}: encode the images, then their captions by tools/encode_text.py"
        )
    if is_packed:
        return PackedLatents(config)
    try:
        tree = scan_tree(folder, (NPZ_SUFFIX,))
    except DataError as error:
        raise DataError(
            f"data.path={folder}: no *.safetensors shard there, and no tree of {NPZ_SUFFIX} files:"
            f" {error}. docs/reference/inputs.md lists what is read, and converts .npy features"
        ) from None
    return NpzLatents(config, tree)


class PackedLatents(DrawnLatents):
    """A folder of shards as one indexable set."""

    def __init__(self, config: RunConfig) -> None:
        """Open every shard's header and compare it, and the index, with the recipe.

        Raises: DataError naming the folder, the shard or the label that does not fit.
        """
        where = folder = Path(config.data.path)
        index = read_index(folder)
        if index is not None:
            where = folder / INDEX
            files = _listed_files(folder, index)
        elif (folder / UNFINISHED).is_file():
            raise DataError(
                f"{folder}: these latents are not complete, there is {UNFINISHED} and no {INDEX}:"
                " run promoe-encode again with the same arguments, it resumes where it stopped"
            )
        else:
            files = _shard_files(folder)
        self._shards = [Shard(file) for file in files]
        if not any(map(len, self._shards)):
            raise DataError(f"data.path={folder}: the shards hold no sample")
        self._first = first = self._shards[0]
        self.kind = first.kind
        if index is not None and index.vae is None and config.data.vae is not None:
            raise DataError(
                f"{where}: does not say which autoencoder the latents come from, the recipe wants"
                f" data.vae={config.data.vae}: pack them anew with --vae-name"
            )
        super().__init__(
            config,
            where,
            has_twins=first.flipped,
            classes=len(index.classes) if index else None,
            vae=index.vae if index else None,
            measured=index.statistics if index else None,
        )
        for shard in self._shards:
            _check_shard(shard, config)
            if shard.layout != first.layout:
                raise DataError(
                    f"{shard.path}: holds {shard.layout}, {first.path.name} {first.layout}"
                )
        is_text = config.model.condition == "text"
        self._texts = PackedTexts(folder, index, config) if is_text else None
        self._groups = config.num_groups
        # Mapped like the records: those of 100 million images would take 800 MB.
        self._label_rows = [shard.labels.numpy() for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._ends = self._starts[1:]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def text_identity(self) -> TextIdentity | None:
        """Which encoder the captions were encoded by."""
        return None if self._texts is None else self._texts.identity

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return records and labels.

        Raises: DataError naming a record that is damaged or not finite.
        """
        raw = torch.empty((len(indices), *self._first.shape[1:]), dtype=self._first.dtype)
        rows = raw.view(len(indices), -1).view(torch.uint8).numpy()
        taken = list(zip(*(each.tolist() for each in self._places(indices)), flips, strict=True))
        for out, (place, row, flip) in zip(rows, taken, strict=True):
            out[:] = self._shards[place].record(row, flip)
        records = raw.float()
        # Records under checksums were finite when they were written.
        if self._first.checksums is None and (bad := first_not_finite(records)) is not None:
            shard, row = self._shards[taken[bad][0]], taken[bad][1]
            raise DataError(
                f"{shard.path}: record {row} ({shard.name(row)}) is not finite: encode this shard"
                " anew"
            )
        labels = [int(self._label_rows[place][row]) for place, row, _ in taken]
        return records, torch.tensor(labels, dtype=torch.int64)

    def conditions(
        self, indices: np.ndarray, labels: Tensor, positions: np.ndarray | None
    ) -> Condition:
        """Return the labels, or the captions that are packed beside the latents."""
        if self._texts is None:
            return super().conditions(indices, labels, positions)
        shards, rows = self._places(indices)
        condition = self._texts.take(shards.tolist(), rows.tolist(), positions)
        if not self._groups:
            return condition
        # The class of a captioned image is the group that statistics sort it by.
        groups = torch.where(condition.is_null_B, self._groups, labels)
        return replace(condition, groups_B=groups, num_groups=self._groups)

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each record, and its row there."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - self._starts[shards]


def _shard_files(folder: Path) -> list[Path]:
    """Return a folder's shards in the order of their names, but for hidden files, which other
    systems leave beside them.
    """
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _listed_files(folder: Path, index: LatentIndex) -> list[Path]:
    """Return the shards that an index lists.

    Raises: DataError naming one that is missing or of another size.
    """
    files = [folder / shard.file for shard in index.shards]
    for file, record in zip(files, index.shards, strict=True):
        found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        if found != f"{record.bytes} bytes":
            raise DataError(
                f"{file}: {found}, {INDEX} says {record.bytes} bytes: copy or encode this shard"
                " anew"
            )
    return files


def _check_shard(shard: Shard, config: RunConfig) -> None:
    model, labels = config.model, shard.labels
    shape = (model.in_channels * (2 if shard.kind == MOMENTS else 1), *model.latent_size)
    if shard.shape[1:] != shape or labels.shape != shard.shape[:1]:
        raise DataError(
            f"{shard.path}: {shard.kind} {shard.shape} and labels {tuple(labels.shape)} do not fit"
            f" the recipe's (n, {', '.join(map(str, shape))}) and (n,): encode at that size, or"
            " change model.in_channels and model.input_size"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{shard.path}: labels are {labels.dtype}, expected integers")
    # Of captions without groups no label is ever read.
    groups = config.num_groups
    if not groups or not len(labels):
        return
    least, most = int(labels.min()), int(labels.max())
    if not 0 <= least <= most < groups:
        raise DataError(
            f"{shard.path}: labels reach from {least} to {most}, but {config.groups_field}={groups}"
        )
