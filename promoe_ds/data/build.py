"""From a recipe to a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.digits import load_digits_split
from promoe_ds.data.encoded import EncodedImages
from promoe_ds.data.index import INDEX, UNFINISHED
from promoe_ds.data.latents import NPZ_SUFFIX, NpzLatents, PackedLatents, shard_files
from promoe_ds.data.trees import scan_tree
from promoe_ds.errors import DataError
from promoe_ds.randomness import generator


class LatentDataset(Protocol):
    """An indexable set of latents and their conditions."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, Condition]:
        """Return fp32 latents (n, Z, H, W), scaled as the network wants them, and their n conditions.

        `positions` in the training stream (see `order`) decide what is drawn anew each time, if anything is; without them
        nothing is drawn.
        """


class ArrayDataset:
    """A set that lies in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, null_label: int) -> None:
        """Hold images (N, Z, H, W), fp32, and labels (N,), int64."""
        self._images, self._labels, self._null = images, labels, null_label

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, ClassCondition]:
        """Return copies of the chosen images and labels."""
        return torch.from_numpy(self._images[indices]), ClassCondition(torch.from_numpy(self._labels[indices]), self._null)


class SyntheticLatents:
    """Standard-normal latents with random labels, for timing and for tests of scale; nothing can be learned."""

    def __init__(self, config: RunConfig) -> None:
        """Use the recipe's shapes, classes and seed."""
        self._model, self._seed, self._count = config.model, config.train.seed, config.data.synthetic_samples

    def __len__(self) -> int:
        return self._count

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, ClassCondition]:
        """Return the latents and labels of these indices, always the same."""
        model, latents, labels = self._model, [], []
        for index in indices:
            draw = generator(self._seed, "synthetic", int(index))
            latents.append(draw.standard_normal((model.in_channels, model.input_size, model.input_size), dtype=np.float32))
            labels.append(draw.integers(model.num_classes))
        return torch.from_numpy(np.stack(latents)), ClassCondition(torch.tensor(labels, dtype=torch.int64), model.null_label)


def build_dataset(config: RunConfig, device: torch.device | None = None) -> LatentDataset:
    """Open the data set of a recipe.

    Args:
        device: where an autoencoder runs, if images are encoded on the fly; the CPU if left out.
    Raises: DataError if it is missing or does not fit the model.
    """
    data = config.data
    if data.dataset == "digits":
        digits = load_digits_split(data.heldout_fraction, heldout=False)
        return ArrayDataset(digits.images * np.float32(data.latent_scale), digits.labels, config.model.null_label)
    if data.dataset == "synthetic":
        return SyntheticLatents(config)
    if data.path is None:
        wanted = "the folder of *.safetensors shards" if data.dataset == "latents" else "a tree of images, one folder a class"
        raise DataError(f"data.path is not set: data.dataset={data.dataset} needs {wanted} (--set data.path=DIR)")
    if data.dataset == "images":
        return EncodedImages(config, device or torch.device("cpu"))
    folder = Path(data.path)
    if shard_files(folder) or any((folder / name).is_file() for name in (INDEX, UNFINISHED)):
        return PackedLatents(config)
    try:
        tree = scan_tree(folder, (NPZ_SUFFIX,))
    except DataError as error:
        raise DataError(f"data.path={folder}: no *.safetensors shard there, and no tree of {NPZ_SUFFIX} files: {error}. "
                        "docs/inputs.md lists what is read, and converts .npy features") from None
    return NpzLatents(config, tree)
