"""Latents on disk: packed shards, read memory-mapped, or one npz file an image as other trainers cache them.

A folder of packed shards holds `*.safetensors`, taken in the order of their names (see `shards`), and `index.json` if this
package wrote it (see `index`). Values are unscaled, of any float dtype.
Letters: B samples, C channels on disk, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.augment import draw_flips, draw_latents
from promoe_ds.data.images import TreeReader, check_classes
from promoe_ds.data.index import INDEX, UNFINISHED, check_index, read_index, trust_vae
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.shards import Shard, first_not_finite
from promoe_ds.data.trees import Tree
from promoe_ds.errors import DataError

#: Names of a record and its mirrored twin, which may be missing, in the npz files of the published code and of DiffMoE; both
#: are moments.
NPZ_NAMES = (("latent", "latent_flip"), ("moments", "moments_flip"))
NPZ_SUFFIX = ".npz"


class PackedLatents:
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
            raise DataError(f"{folder}: these latents are not complete, there is {UNFINISHED} and no {INDEX}: run "
                            "promoe-encode again with the same arguments, it goes on where it stopped")
        else:
            trust_vae(folder, config)
            files = shard_files(folder)
        self._shards = [Shard(file) for file in files]
        for position, shard in enumerate(self._shards):
            _check_shard(shard, config)
            if (shard.kind, shard.dtype, shard.flipped) != (self.kind, self.dtype, self.flipped):
                first = self._shards[0]
                raise DataError(f"{shard.path}: holds {_described(shard)}, {first.path.name} {_described(first)}")
            if index is not None and len(shard) != index.shards[position].count:
                raise DataError(f"{shard.path}: {len(shard)} records, {INDEX} says {index.shards[position].count}")
        self._flip = wants_flip(config, self.flipped, str(folder))
        self._scale, self._seed, self._null = config.data.latent_scale, config.train.seed, config.model.null_label
        self._labels = torch.cat([shard.labels.long() for shard in self._shards])
        if not len(self._labels):
            raise DataError(f"data.path={folder}: the shards hold no sample")
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    @property
    def kind(self) -> str:
        """`latents` or `moments`."""
        return self._shards[0].kind

    @property
    def dtype(self) -> torch.dtype:
        """Of the records on disk."""
        return self._shards[0].dtype

    @property
    def flipped(self) -> bool:
        """Whether every record has a mirrored twin."""
        return self._shards[0].flipped

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, ClassCondition]:
        """Return scaled fp32 latents (B, Z, H, W) and their classes; mirrored and drawn from their posteriors by position.

        Raises: DataError naming a record that is damaged or not finite.
        """
        indices = np.asarray(indices)
        flips = draw_flips(self._seed, positions, len(indices), flip=self._flip)
        records = self._records(indices, flips)
        # Records under checksums were finite when they were written.
        if not self._shards[0].checked and (bad := first_not_finite(records)) is not None:
            shard, row = self._locate(int(indices[bad]))
            raise DataError(f"{shard.path}: record {row} ({shard.name(row)}) is not finite: encode this shard anew")
        latents = draw_latents(records, self._seed, positions) if self.kind == "moments" else records
        return latents.mul_(self._scale), ClassCondition(self._labels[torch.from_numpy(indices)], self._null)

    def _records(self, indices: np.ndarray, flips: np.ndarray) -> Tensor:
        """Return what is on disk, (B, C, H, W) fp32."""
        first = self._shards[0]
        raw = torch.empty((len(indices), *first.shape[1:]), dtype=self.dtype)
        rows = raw.view(len(indices), -1).view(torch.uint8).numpy()
        places = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends])[places]
        for out, shard, local, flip in zip(rows, places.tolist(), (indices - starts).tolist(), flips.tolist(), strict=True):
            self._shards[shard].copy_record(local, flip, out)
        return raw.float()

    def _locate(self, index: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - int(self._ends[shard - 1] if shard else 0)


class NpzLatents:
    """A tree of class folders with one npz file an image: `latent`, `latent_flip` or `moments`, `moments_flip`, or without twins.

    Both name posteriors' moments (2 Z, H, W), unscaled. Slow: for anything but a trial, pack them once with
    `promoe-encode --from-npz`. The files do not say which autoencoder they come from.
    """

    def __init__(self, config: RunConfig, tree: Tree) -> None:
        """Read the files of `tree`.

        Raises: DataError if it has more classes than the recipe, or its first file cannot be read.
        """
        self._tree = tree
        check_classes(self._tree.root, len(self._tree.classes), config.model.num_classes)
        trust_vae(self._tree.root, config)
        sides = len(read_npz_moments(self._tree.root / self._tree.names[0]))
        self._shape = (sides, 2 * config.model.in_channels, config.model.input_size, config.model.input_size)
        self._scale, self._seed, self._null = config.data.latent_scale, config.train.seed, config.model.null_label
        self._flip = wants_flip(config, sides == 2, str(self._tree.root))
        self._reader = TreeReader(self._tree, lambda path: read_npz_moments(path, self._shape), config.data.workers)

    def __len__(self) -> int:
        return len(self._tree)

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, ClassCondition]:
        """Return scaled fp32 latents (B, Z, H, W) and their classes; mirrored and drawn from their posteriors by position.

        Raises: DataError naming the file that cannot be read or does not fit.
        """
        records = self._reader.try_all([int(index) for index in indices])
        pairs: list[np.ndarray] = []
        for record in records:
            if isinstance(record, DataError):
                raise record
            pairs.append(record)
        flips = draw_flips(self._seed, positions, len(records), flip=self._flip)
        moments = torch.from_numpy(np.stack([pair[int(flip)] for pair, flip in zip(pairs, flips, strict=True)]))
        labels = torch.from_numpy(self._tree.labels[np.asarray(indices)])
        return draw_latents(moments, self._seed, positions).mul_(self._scale), ClassCondition(labels, self._null)


def shard_files(folder: Path) -> list[Path]:
    """Return a folder's shards in the order of their names, but for hidden files, which other systems leave beside them."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def read_npz_moments(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a file's moments and, where it holds them, those of the mirrored image: (1 or 2, 2 Z, H, W) fp32.

    Raises: DataError naming a file that is damaged, of another kind or, where `shape` is given, of another shape.
    """
    with reading(path, "latent file"), np.load(path, allow_pickle=False) as data:
        names = next((names for names in NPZ_NAMES if names[0] in data), None)
        if names is None:
            raise DataError(f"{shown(path)}: holds {', '.join(map(shown, data.files)) or 'nothing'}, expected "
                            f"{' or '.join(plain for plain, _ in NPZ_NAMES)}, with or without its twin ({NPZ_NAMES[0][1]}, "
                            f"{NPZ_NAMES[1][1]})")
        sides = [data[name] for name in names if name in data]
    # Some caches kept the batch dimension of one.
    sides = [side[0] if side.ndim == 4 and len(side) == 1 else side for side in sides]
    found = " and ".join(f"{side.dtype} {side.shape}" for side in sides)
    if any(side.dtype.kind != "f" for side in sides):
        raise DataError(f"{shown(path)}: moments are {found}, expected floats")
    if sides[0].ndim != 3 or sides[0].shape != sides[-1].shape or shape not in (None, (len(sides), *sides[0].shape)):
        wanted = f"{shape[0]} x ({' x '.join(map(str, shape[1:]))})" if shape else "one or two alike of three dimensions"
        raise DataError(f"{shown(path)}: moments {found} do not fit, expected {wanted}")
    if len(sides[0]) % 2:
        raise DataError(f"{shown(path)}: moments {found} are no means and variances: their channels cannot be halved")
    moments = np.stack(sides).astype(np.float32)
    if not np.isfinite(moments).all():
        raise DataError(f"{shown(path)}: not finite: encode this image anew")
    return moments


def wants_flip(config: RunConfig, possible: bool, where: str) -> bool:
    """Resolve `data.flip`.

    Raises: DataError if mirrored samples are asked for and there are none.
    """
    if config.data.flip is True and not possible:
        raise DataError(f"{where}: holds no mirrored latents, but data.flip=true: encode them with both, or leave data.flip out")
    return possible and config.data.flip is not False


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing, {INDEX} lists it")
    if file.stat().st_size != size:
        raise DataError(f"{file}: {file.stat().st_size} bytes, {INDEX} says {size}: copy or encode this shard anew")


def _check_shard(shard: Shard, config: RunConfig) -> None:
    size, labels = config.model.input_size, shard.labels
    shape = (config.model.in_channels * (2 if shard.kind == "moments" else 1), size, size)
    if shard.shape[1:] != shape or labels.shape != shard.shape[:1]:
        raise DataError(f"{shard.path}: {shard.kind} {shard.shape} and labels {tuple(labels.shape)} do not fit the recipe's (n, "
                        f"{', '.join(map(str, shape))}) and (n,)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{shard.path}: labels are {labels.dtype}, expected integers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.model.num_classes:
        raise DataError(f"{shard.path}: labels reach from {int(labels.min())} to {int(labels.max())}, but "
                        f"model.num_classes={config.model.num_classes}")


def _described(shard: Shard) -> str:
    return f"{shard.kind} as {str(shard.dtype).removeprefix('torch.')}, {'with' if shard.flipped else 'without'} mirrored twins"
