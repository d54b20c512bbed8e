"""Several data sets, each of one size of latents, as one; and where the packed ones are.

`data.path` holds a folder of packed latents for each size, of any name; docs/guides/latents.md
documents it. Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config.model import size_name
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import LatentDataset, with_normalization
from promoe_ds.data.normalization.choice import choose_normalization
from promoe_ds.data.normalization.statistics import merge_known
from promoe_ds.data.reading import shown, some_of
from promoe_ds.data.shards import INDEX, UNFINISHED, LatentIndex, index_of
from promoe_ds.data.text_encoder import TextIdentity
from promoe_ds.errors import DataError


class BucketedLatents:
    """The data sets of all buckets, one after another; what is taken at once has one size.

    lengths: samples of each bucket, in the recipe's order.
    """

    def __init__(self, config: RunConfig, buckets: Sequence[LatentDataset]) -> None:
        """Join data sets in the order of `model.buckets`.

        Raises: DataError naming one with fewer samples than a batch, or encoded by another text
            encoder than the others.
        """
        self._buckets = buckets
        self.lengths = tuple(map(len, buckets))
        self._ends = np.cumsum(self.lengths)
        self.largest = buckets[config.model.sizes.index(config.model.latent_size)]
        batch = config.train.global_batch_size
        for size, length in zip(config.model.sizes, self.lengths, strict=True):
            if length < batch:
                raise DataError(
                    f"model.buckets: {size_name(size)} has {length} samples, fewer than"
                    f" train.global_batch_size={batch}: encode its images into another bucket, or"
                    " lower the batch"
                )
        identities = [getattr(each, "text_identity", None) for each in buckets]
        #: Which encoder the captions were encoded by, if there are any.
        self.text_identity: TextIdentity | None = identities[0]
        if any(each != identities[0] for each in identities):
            raise DataError(
                f"data.path={config.data.path}: the captions of the buckets were encoded by several"
                " text encoders: encode all by one"
            )

    def __len__(self) -> int:
        return sum(self.lengths)

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Condition]:
        """Return the latents (B, Z, H, W) and conditions of some samples of one bucket.

        Raises: ValueError for samples of several sizes; what the bucket's data set raises.
        """
        buckets = np.searchsorted(self._ends, indices, side="right")
        bucket = int(buckets[0])
        if (buckets != bucket).any():
            raise ValueError("the samples are of several buckets: take them one by one")
        start = int(self._ends[bucket]) - self.lengths[bucket]
        return self._buckets[bucket].take(np.asarray(indices) - start, positions)


def bucket_lengths(dataset: LatentDataset) -> tuple[int, ...]:
    """Return the samples of each bucket of a data set, which may be the only one."""
    return dataset.lengths if isinstance(dataset, BucketedLatents) else (len(dataset),)


def largest_bucket(dataset: LatentDataset) -> LatentDataset:
    """Return the samples whose size is `model.input_size`, for what looks at one size alone."""
    return dataset.largest if isinstance(dataset, BucketedLatents) else dataset


def latent_folders(path: Path) -> list[Path]:
    """Return the folders of packed latents that a path names: itself, or that of each bucket in it.

    Raises: DataError for one that is not complete, or is none.
    """
    if (path / INDEX).is_file():
        return [path]
    below = path.iterdir() if path.is_dir() else ()
    folders = sorted(each for each in below if each.is_dir() and not each.name.startswith("."))
    strange = [each for each in folders if not (each / INDEX).is_file()]
    if unfinished := [each for each in (path, *strange) if (each / UNFINISHED).is_file()]:
        raise DataError(
            f"{shown(unfinished[0])}: these latents are not complete: run promoe-encode again with"
            " the same arguments, it resumes where it stopped"
        )
    if strange or not folders:
        where = f" in {some_of([each.name for each in strange])}" if strange else ""
        raise DataError(
            f"{path}: no {INDEX}{where}: expected packed latents, or a folder of them for each size"
        )
    return folders


def configs_of_buckets(config: RunConfig) -> list[RunConfig]:
    """Return the recipe of each bucket's own data set: one size, and its folder if it has one.

    All are normalised alike: what was measured is that of all of them together.
    Raises: DataError for folders that do not fit `model.buckets`, or were not measured although
        `data.latent_normalization` is by channel.
    """
    sizes, path = config.model.sizes, config.data.path
    folders = dict.fromkeys(sizes, path)
    if path is not None:
        found = _folders(Path(path), config)
        folders = {size: str(folder) for size, (folder, _) in found.items()}
        if config.data.latent_normalization == "channel":
            measured = merge_known([index.statistics for _, index in found.values()])
            chosen = choose_normalization(config.data, None, measured, Path(path))
            config = with_normalization(config, chosen)
    return [
        config.model_copy(
            update={
                "model": config.model.model_copy(update={"input_size": size, "buckets": ()}),
                "data": config.data.model_copy(update={"path": folders[size]}),
            }
        )
        for size in sizes
    ]


def _folders(path: Path, config: RunConfig) -> dict[tuple[int, int], tuple[Path, LatentIndex]]:
    """Return the folder of each size below `path`, and its index.

    Raises: DataError if a size of the recipe has none, a folder's size is not in the recipe, or
        folders do not belong together.
    """
    if (path / INDEX).is_file():
        raise DataError(
            f"data.path={path}: holds latents of one size: name the folder that holds a folder of"
            " latents for each of model.buckets, or leave model.buckets out"
        )
    indices = {folder: index_of(folder) for folder in latent_folders(path)}
    sizes, found = config.model.sizes, dict[tuple[int, int], tuple[Path, LatentIndex]]()
    for folder, index in indices.items():
        size = index.shape[1:]
        if size in found:
            raise DataError(f"{folder}: has latents of {size_name(size)}, as {found[size][0]} has")
        if size not in sizes:
            raise DataError(
                f"{folder}: has latents of {size_name(size)}, which is none of model.buckets"
                f" ({', '.join(map(size_name, sizes))}): add it, or move the folder away"
            )
        found[size] = folder, index
    if missing := [size_name(size) for size in sizes if size not in found]:
        raise DataError(
            f"data.path={path}: no folder of latents of {', '.join(missing)} (model.buckets) in it,"
            f" found {', '.join(map(size_name, found)) or 'none'}: encode with --buckets"
        )
    first, *others = indices
    for folder in others:
        for name in ("classes", "vae"):
            if getattr(indices[folder], name) != getattr(indices[first], name):
                raise DataError(
                    f"{folder}: differs from {first} in its {name}: encode all buckets together"
                )
    return found
