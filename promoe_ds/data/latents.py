"""Latents on disk: packed safetensors shards, read memory-mapped.

Layout of the folder: `*.safetensors`, taken in the order of their names, each with `latents` (n, Z, H, W), any float
dtype, unscaled, and `labels` (n,), int64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import DataError


class PackedLatents:
    """A folder of shards as one indexable set."""

    def __init__(self, config: RunConfig) -> None:
        """Open every shard's header and check it against the recipe.

        Raises: DataError naming the folder, the shard or the label that does not fit.
        """
        path = config.data.path
        if path is None:
            raise DataError("data.path is not set: data.dataset=latents needs the folder of *.safetensors shards "
                            "(--set data.path=DIR)")
        self._files = sorted(Path(path).glob("*.safetensors"))
        if not self._files:
            raise DataError(f"data.path={path}: no *.safetensors shard there")
        self._scale = config.data.latent_scale
        shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
        self._shards, labels = [], []
        for file in self._files:
            shard, shard_labels = _open_shard(file, shape, config.model.num_classes)
            self._shards.append(shard)
            labels.append(shard_labels)
        self._labels = torch.cat(labels)
        if not len(self._labels):
            raise DataError(f"data.path={path}: the shards hold no sample")
        self._ends = np.cumsum([len(part) for part in labels])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return scaled fp32 latents (n, Z, H, W) and labels (n,)."""
        rows = []
        for index in indices:
            shard = int(np.searchsorted(self._ends, index, side="right"))
            local = int(index - (self._ends[shard - 1] if shard else 0))
            rows.append(self._shards[shard].get_slice("latents")[local:local + 1])
        return torch.cat(rows).float() * self._scale, self._labels[torch.from_numpy(np.asarray(indices))]


def _open_shard(file: Path, shape: tuple[int, int, int], num_classes: int):
    try:
        shard = safe_open(file, framework="pt")
        found = tuple(shard.get_slice("latents").get_shape())
        labels = shard.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a readable latent shard ({error})") from None
    if found[1:] != shape or labels.shape != (found[0],):
        raise DataError(f"{file}: latents {found} and labels {tuple(labels.shape)} do not fit the recipe's (n, "
                        f"{', '.join(map(str, shape))}) and (n,)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{file}: labels are {labels.dtype}, expected integers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(f"{file}: labels reach from {int(labels.min())} to {int(labels.max())}, but "
                        f"model.num_classes={num_classes}")
    return shard, labels.long()
