"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 images, ten classes, no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.errors import DataError
from promoe_ds.randomness import generator

_SPLIT_SEED = 0  # of the data set, not of a run: the held-out images are the same for everybody
_LARGEST_VALUE = 16.0


def load_digits_split(heldout_fraction: float, *, heldout: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the training or the held-out digits: images (N, 1, 8, 8), fp32 in [-1, 1], and labels
    (N,), int64.

    Args:
        heldout_fraction: of each class, in (0, 1); the choice is fixed.
        heldout: which side.
    Raises: DataError if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data.dataset=digits needs scikit-learn: pip install 'promoe_ds[report]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    is_heldout = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator(_SPLIT_SEED, "data", digit).permutation(np.flatnonzero(labels == digit))
        is_heldout[members[: round(heldout_fraction * len(members))]] = True
    chosen = is_heldout == heldout
    images = pixels[chosen].reshape(-1, 1, 8, 8) / (_LARGEST_VALUE / 2) - 1.0
    return images.astype(np.float32), labels[chosen].astype(np.int64)


class TrainingDigits:
    """The digits that are not held out, in memory."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Load them.

        Raises: DataError if scikit-learn is missing.
        """
        self._images, self._labels = load_digits_split(config.data.heldout_fraction, heldout=False)
        self._normalization = LatentNormalization.of(config.data)
        self._null = config.model.null_label

    def __len__(self) -> int:
        return len(self._labels)

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, ClassCondition]:
        """Return the chosen images, (B, 1, 8, 8) fp32, and their labels."""
        labels = torch.from_numpy(self._labels[indices])
        images = self._normalization.normalize(torch.from_numpy(self._images[indices]))
        return images, ClassCondition(labels, self._null)
