"""From a recipe to a data set."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.digits import load_digits_split
from promoe_ds.data.latents import PackedLatents
from promoe_ds.randomness import generator


class LatentDataset(Protocol):
    """An indexable set of latents and labels."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return fp32 latents (n, Z, H, W), scaled as the network wants them, and int64 labels (n,)."""


class ArrayDataset:
    """A set that lies in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Hold images (N, Z, H, W), fp32, and labels (N,), int64."""
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return copies of the chosen images and labels."""
        return torch.from_numpy(self._images[indices]), torch.from_numpy(self._labels[indices])


class SyntheticLatents:
    """Standard-normal latents with random labels, for timing and for tests of scale; nothing can be learned."""

    def __init__(self, config: RunConfig) -> None:
        """Use the recipe's shapes, classes and seed."""
        self._model, self._seed, self._count = config.model, config.train.seed, config.data.synthetic_samples

    def __len__(self) -> int:
        return self._count

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the latents and labels of these indices, always the same."""
        model, latents, labels = self._model, [], []
        for index in indices:
            draw = generator(self._seed, "synthetic", int(index))
            latents.append(draw.standard_normal((model.in_channels, model.input_size, model.input_size), dtype=np.float32))
            labels.append(draw.integers(model.num_classes))
        return torch.from_numpy(np.stack(latents)), torch.tensor(labels, dtype=torch.int64)


def build_dataset(config: RunConfig) -> LatentDataset:
    """Open the data set of a recipe.

    Raises: DataError if it is missing or does not fit the model.
    """
    if config.data.dataset == "digits":
        digits = load_digits_split(config.data.heldout_fraction, heldout=False)
        return ArrayDataset(digits.images * np.float32(config.data.latent_scale), digits.labels)
    if config.data.dataset == "latents":
        return PackedLatents(config)
    return SyntheticLatents(config)
